"""GPTQ or AWQ by gptqmodel, in its own environment: ``MODEL OUT SAMPLES LENGTH METHOD``; see quantize_cost.py."""

from __future__ import annotations

import sys


def main() -> None:
    import torch
    from gptqmodel import GPTQModel
    from gptqmodel.quantization import QuantizeConfig

    model, out, samples, length, method = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    ids = torch.randint(0, 440, (samples, length), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row.unsqueeze(0), "attention_mask": torch.ones(1, length, dtype=torch.long)} for row in ids]
    options = {"quant_method": "awq", "format": "gemm", "sym": False} if method == "awq" else {"pack_impl": "original"}
    config = QuantizeConfig(bits=4, group_size=32, **options)
    loaded = GPTQModel.load(model, config, device="cpu")
    loaded.quantize(data, batch_size=1)
    loaded.save(out)


if __name__ == "__main__":
    main()
