"""GPTQ by llmcompressor, in its own environment: ``MODEL OUT SAMPLES LENGTH``. Started by quantize_cost.py."""

from __future__ import annotations

import sys

import torch


def main() -> None:
    model, out, samples, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.randint(0, 440, (samples, length), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, actorder="static")
    recipe = GPTQModifier(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=args)},
        ignore=["lm_head"], dampening_frac=0.01,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    oneshot(
        model=loaded, tokenizer=AutoTokenizer.from_pretrained(model), dataset=data, recipe=recipe,
        max_seq_length=length, num_calibration_samples=samples, output_dir=out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
