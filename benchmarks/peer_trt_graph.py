"""The decoder as `torch.onnx.export` makes it, for `trt_build.py`: decomposed attention and norms, caches that grow.

Run as a program: ``peer_trt_graph.py SHAPE OUT``, SHAPE being a `DecoderShape` in JSON. It writes an FP16 Llama of that
shape with random weights; embeddings in, logits of the last position out.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM


class WithCache(torch.nn.Module):
    """Flat tensors in and out around the model's cache object."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]) -> Any:
        """Logits of the last position and the longer caches."""
        cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        out = self.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        return out.logits, [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]


def export(shape: dict[str, int], out: str) -> None:
    """Export with dynamic batch, sequence and past lengths."""
    config = LlamaConfig(
        hidden_size=shape["hidden"], num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"], intermediate_size=shape["intermediate"],
        vocab_size=shape["vocab"], max_position_embeddings=shape["cache"],
    )  # fmt: skip
    torch.set_default_dtype(torch.float16)
    llama: Any = LlamaForCausalLM(config).eval()
    past = [torch.zeros(2, shape["kv_heads"], 3, shape["head_dim"]) for _ in range(2 * shape["layers"])]
    inputs = (torch.zeros(2, 5, shape["hidden"]), torch.ones((2, 8), dtype=torch.int64), past)
    dim = torch.export.Dim.DYNAMIC
    shapes = ({0: dim, 1: dim}, {0: dim, 1: dim}, [{0: dim, 2: dim}] * len(past))
    names = ["inputs_embeds", "attention_mask", *(f"past.{i}" for i in range(len(past)))]
    torch.onnx.export(
        WithCache(llama), inputs, out, dynamo=True, dynamic_shapes=shapes, external_data=True, input_names=names
    )


if __name__ == "__main__":
    export(json.loads(sys.argv[1]), sys.argv[2])
