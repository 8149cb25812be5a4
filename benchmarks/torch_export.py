"""What a user does by hand: ``torch.onnx.export(dynamo=True)`` of a Llama with its KV cache. Argument: MODEL OUT."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM


class WithCache(torch.nn.Module):
    """Flat tensors in and out around the model's cache object."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]) -> Any:
        """Logits and the new keys and values."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return out.logits, [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]


def main(model: str, out: str) -> None:
    """Export with dynamic batch, sequence and past lengths."""
    llama: Any = LlamaForCausalLM.from_pretrained(model, dtype="auto").eval()
    config = llama.config
    shape = (2, config.num_key_value_heads, 3, config.head_dim)
    past = [torch.zeros(shape, dtype=llama.dtype) for _ in range(2 * config.num_hidden_layers)]
    inputs = (torch.ones((2, 5), dtype=torch.int64), torch.ones((2, 8), dtype=torch.int64), past)
    dim = torch.export.Dim.DYNAMIC
    shapes = ({0: dim, 1: dim}, {0: dim, 1: dim}, [{0: dim, 2: dim}] * len(past))
    torch.onnx.export(WithCache(llama), inputs, out, dynamo=True, dynamic_shapes=shapes, external_data=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
