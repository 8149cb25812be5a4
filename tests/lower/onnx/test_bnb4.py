"""The operator's initializers are bitsandbytes' own bytes."""

import dataclasses

import pytest
import torch

from vlmexport.lower.onnx.bnb4 import pack_bnb4
from vlmexport.quantize.fp8 import quantize_fp8
from vlmexport.quantize.nf4 import quantize_nf4
from vlmexport.quantize.scheme import make_scheme


def weight() -> torch.Tensor:
    return torch.randn(24, 256, generator=torch.Generator().manual_seed(0))


def test_bytes_and_absmax_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight(), blocksize=64, quant_type="nf4")
    codes, absmax = pack_bnb4(quantize_nf4(weight(), make_scheme("nf4")))
    assert torch.equal(torch.from_numpy(codes), packed.reshape(-1))
    assert torch.equal(torch.from_numpy(absmax), state.absmax)


def test_the_first_code_is_in_the_high_bits() -> None:
    q = quantize_nf4(weight(), make_scheme("nf4"))
    codes, _ = pack_bnb4(dataclasses.replace(q, codes=torch.arange(16, dtype=torch.uint8).repeat(24, 16)))
    assert codes[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]


def test_other_levels_are_not_packed() -> None:
    with pytest.raises(ValueError, match="NF4 codes only"):
        pack_bnb4(quantize_fp8(weight(), make_scheme("fp8")))
    q = quantize_nf4(weight(), make_scheme("nf4"))
    with pytest.raises(ValueError, match="NF4 codes only"):
        pack_bnb4(dataclasses.replace(q, codebook=torch.linspace(-1, 1, 16)))
