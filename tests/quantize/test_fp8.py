"""FP8 against torch's own cast, compressed-tensors, and the format's definition."""

import math

import pytest
import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize import fp8
from vlmexport.quantize.fp8 import e4m3_codebook, quantize_fp8
from vlmexport.quantize.scheme import make_scheme

SCHEME = make_scheme("fp8")


def weight(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)) * 0.02
    made[:, 3] *= 40
    made[5] = 0
    made[6] *= 1e-6
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_are_those_of_torchs_cast(dtype: torch.dtype) -> None:
    w = weight(dtype).float()
    q = quantize_fp8(weight(dtype), SCHEME)
    scale = w.abs().amax(1, keepdim=True) / 448
    scale[scale == 0] = 1
    cast = (w / scale).to(torch.float8_e4m3fn)
    assert torch.equal(q.codes, cast.view(torch.uint8))
    assert torch.equal(q.dequantize(), cast.float() * scale)


def test_codes_and_scales_are_those_of_compressed_tensors() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args = quantization.QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True)
    w = weight()
    scale, zero_point = helpers.calculate_qparams(w.amin(1, keepdim=True), w.amax(1, keepdim=True), args)
    theirs = forward.quantize(w, scale, zero_point, args, dtype=torch.float8_e4m3fn)
    q = quantize_fp8(w, SCHEME)
    assert torch.equal(q.scale, scale)
    assert torch.equal(q.codes, theirs.view(torch.uint8))
    assert torch.equal(q.dequantize(), forward.dequantize(theirs, scale, zero_point, args))


def test_the_codebook_is_the_formats_definition() -> None:
    for code, value in enumerate(e4m3_codebook().tolist()):
        sign, exponent, fraction = (-1) ** (code >> 7), (code >> 3) & 15, code & 7
        if exponent == 15 and fraction == 7:
            assert math.isnan(value)
        elif exponent == 0:
            assert value == sign * fraction * 2.0**-9
        else:
            assert value == sign * (1 + fraction / 8) * 2.0 ** (exponent - 7)


def test_every_value_is_within_half_a_step_of_its_code() -> None:
    w = weight()
    q = quantize_fp8(w, SCHEME)
    # Three bits of fraction: steps of an eighth of the binade, 2**-9 of the scale below the smallest normal.
    half_step = torch.maximum(w.abs() / 16, q.scale * 2.0**-10)
    assert ((q.dequantize() - w).abs() <= half_step * (1 + 1e-6)).all()


def test_the_largest_values_never_become_nan() -> None:
    w = torch.linspace(1, 3, 64).repeat(500, 1) * torch.rand(500, 1, generator=torch.Generator().manual_seed(1))
    q = quantize_fp8(torch.cat([w, -w]), SCHEME)
    assert not torch.isin(q.codes, torch.tensor([0x7F, 0xFF], dtype=torch.uint8)).any()
    assert (q.codes[:500, -1] == 0x7E).all()
    assert (q.codes[500:, -1] == 0xFE).all()


def test_a_row_of_zeros_stays_zero() -> None:
    assert torch.equal(quantize_fp8(torch.zeros(2, 32), SCHEME).dequantize(), torch.zeros(2, 32))


def test_chunks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize_fp8(weight(), SCHEME)
    monkeypatch.setattr(fp8, "_CHUNK_ELEMENTS", 96 * 5)
    assert quantize_fp8(weight(), SCHEME).digest() == whole.digest()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    w = weight()
    w[3, 5] = bad
    with pytest.raises(BadInputError, match=r"layers\.0\.up\.weight: the weight holds NaN or infinity"):
        quantize_fp8(w, SCHEME, "layers.0.up.weight")


def test_other_bits_and_groups_are_refused() -> None:
    with pytest.raises(BadInputError, match="fp8 takes 8 bits, not 4"):
        make_scheme("fp8", bits=4)
    with pytest.raises(BadInputError, match="group size is 32; fp8 takes -1"):
        make_scheme("fp8", group_size=32)
