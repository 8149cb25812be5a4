"""Codes as ggml's blocks: gguf-py dequantizes the bytes to the very weight that the codes stand for."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest
import torch

from vlmexport.errors import BadInputError
from vlmexport.lower.gguf.codes import codes_type, pack_codes
from vlmexport.quantize.calibrated import quantize_calibrated
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.code_types import exact_scheme
from vlmexport.quantize.ggml.types import GGML_TYPES
from vlmexport.quantize.registry import IMPORTED
from vlmexport.quantize.rtn import limited_scale, quantize_rtn
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.statistics import InputStatistics
from vlmexport.quantize.tensor import QuantizedTensor

FORMS = ((4, True), (4, False), (8, True))
SCHEMES = [
    QuantScheme(bits, symmetric, group, name, clip)
    for bits, symmetric in FORMS
    for group in (32, 64, -1)
    for name, clip in (("rtn", False), ("hqq", False), ("gptq", True), ("awq+gptq", False))
    if not (name == "hqq" and symmetric)
]


def weight(rows: int = 24, columns: int = 128, seed: int = 0) -> torch.Tensor:
    """Rows of very unlike sizes: the last ones need subnormal scales."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return made * torch.logspace(2, -7, rows)[:, None]


def quantized(scheme: QuantScheme, w: torch.Tensor) -> QuantizedTensor:
    statistics = InputStatistics.empty(w.shape[1])
    statistics.add(torch.randn(64, w.shape[1], generator=torch.Generator().manual_seed(1)))
    return quantize_calibrated(w, statistics, scheme)[0]


def unpacked(data: np.ndarray, kind: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("asked", SCHEMES, ids=lambda s: f"{s.algorithm}-{s.bits}-{s.symmetric}-{s.group_size}")
def test_blocks_stand_for_exactly_what_the_codes_do(asked: QuantScheme) -> None:
    scheme = exact_scheme(asked)
    kind = codes_type(scheme)
    codes = quantized(scheme, weight())
    data = pack_codes(codes, kind)
    assert data.shape == (24, 128 // 32 * GGML_TYPES[kind].bytes)
    assert codes.scale.dtype == torch.float16
    assert float((unpacked(data, kind) - codes.dequantize()).abs().max()) == 0.0


def test_the_weight_that_needs_subnormal_scales_is_rounded_to_them_and_not_lost() -> None:
    w = weight()
    codes = quantized(exact_scheme(QuantScheme()), w)
    tiny = (codes.scale > 0) & (codes.scale < torch.finfo(torch.float16).tiny)
    assert tiny.any()
    steps = codes.scale.float().repeat_interleave(32, dim=1)
    assert ((codes.dequantize() - w).abs() <= steps * 0.51 + 2.0**-24 * 8).all()


def test_without_limited_scales_q4_1_is_refused_and_not_rounded() -> None:
    codes = quantize_rtn(weight()[:8], QuantScheme(symmetric=False))
    assert codes.scale.dtype == torch.float16
    with pytest.raises(BadInputError, match=r"up\.weight: an offset of .* is no float16.*Q4_K_M"):
        pack_codes(codes, "Q4_1", "up.weight")
    wide = dataclasses.replace(codes, scale=codes.scale.float() * 1.0001, zero_point=None)
    with pytest.raises(BadInputError, match=r"a scale of .* is no float16"):
        pack_codes(wide, "Q4_0")


def test_float32_scales_that_float16_holds_are_handed_over() -> None:
    codes = quantize_rtn(weight(), exact_scheme(QuantScheme()))
    wide = dataclasses.replace(codes, scale=codes.scale.float())
    assert np.array_equal(pack_codes(wide, "Q4_0"), pack_codes(codes, "Q4_0"))


def test_rows_of_codes_move_as_rows_of_weights_do() -> None:
    codes = quantize_rtn(weight(), exact_scheme(QuantScheme(symmetric=False)))
    assert codes.zero_point is not None
    moved = dataclasses.replace(
        codes,
        codes=values.apply(codes.codes, "permute", (3,))[0],
        scale=values.apply(codes.scale, "permute", (3,))[0],
        zero_point=values.apply(codes.zero_point, "permute", (3,))[0],
    )
    want = values.apply(codes.dequantize(), "permute", (3,))[0]
    assert torch.equal(unpacked(pack_codes(moved, "Q4_1"), "Q4_1"), want)


def test_a_symmetric_tensor_goes_to_q4_1_as_well() -> None:
    codes = quantize_rtn(weight(), exact_scheme(QuantScheme(symmetric=False)))
    symmetric = dataclasses.replace(codes, zero_point=None)
    assert torch.equal(unpacked(pack_codes(symmetric, "Q4_1"), "Q4_1"), symmetric.dequantize())


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (QuantScheme(bits=3), "3-bit symmetric codes have no GGUF type"),
        (QuantScheme(bits=8, symmetric=False), "8-bit asymmetric codes"),
        (QuantScheme(group_size=16), "groups of 16 have no GGUF type"),
        (QuantScheme(algorithm="nf4", group_size=64), "nf4 has levels of its own"),
        (QuantScheme(algorithm="torchao:int4wo"), "keeps float32 scales"),
        (QuantScheme(overrides={"*v_proj": QuantScheme(bits=2)}), "2-bit symmetric"),
    ],
)
def test_schemes_without_a_type_are_refused_with_those_that_have_one(scheme: QuantScheme, words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        exact_scheme(scheme)


def test_types_of_schemes() -> None:
    assert [codes_type(QuantScheme(b, s)) for b, s in FORMS] == ["Q4_0", "Q4_1", "Q8_0"]
    assert [exact_scheme(QuantScheme(b, s)).scale_bits for b, s in FORMS] == [11, 7, 11]
    kept = QuantScheme(algorithm=IMPORTED)
    assert exact_scheme(kept) == kept


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("Q5_0", {}, "Q5_0 is no type for codes"),
        ("Q8_0", {}, "Q8_0 does not hold its 4-bit sym codes"),
        ("Q4_0", {"zero_point": torch.zeros(24, 4, dtype=torch.uint8)}, "does not hold its 4-bit asym"),
        ("Q4_0", {"codebook": torch.zeros(16)}, "does not hold its 4-bit codebook"),
        ("Q4_0", {"group_size": 16, "scale": torch.ones(24, 8, dtype=torch.float16)}, "group size is 16"),
    ],
)
def test_codes_that_a_type_does_not_hold_are_refused(kind: str, change: dict[str, object], words: str) -> None:
    codes = quantize_rtn(weight(), QuantScheme(scale_bits=11))
    with pytest.raises(BadInputError, match=words):
        pack_codes(dataclasses.replace(codes, **change), kind)  # type: ignore[arg-type]


def test_scales_have_the_asked_bits_and_are_the_nearest_such() -> None:
    wide = torch.logspace(-9, 4.8, 5000)
    for bits in (7, 11):
        got = limited_scale(wide, bits)
        mantissa, exponent = torch.frexp(got.double())
        assert torch.equal(mantissa * 2**bits, (mantissa * 2**bits).round())
        step = torch.exp2((torch.frexp(wide).exponent - bits).clamp_min(-24).double())
        assert ((got.double() - wide.double()).abs() <= step / 2).all()
        assert int(exponent[got > 0].min()) >= -23
    assert torch.isinf(limited_scale(torch.tensor([7e4]), 11)).all()


def test_scales_above_float16_are_refused_by_name() -> None:
    with pytest.raises(BadInputError, match=r"up\.weight: a scale of 1\.43e\+05 is above what float16 holds"):
        quantize_rtn(torch.full((2, 32), 1e6), exact_scheme(QuantScheme()), "up.weight")


def test_a_scheme_says_its_scale_bits_in_json_and_refuses_wrong_ones() -> None:
    scheme = QuantScheme(symmetric=False, scale_bits=7)
    assert QuantScheme.from_dict(scheme.to_dict()) == scheme
    with pytest.raises(BadInputError, match="scale bits is 12; choose 1 to 11"):
        QuantScheme(scale_bits=12)
    with pytest.raises(BadInputError, match="fp8 makes scales of its own"):
        QuantScheme(8, True, -1, "fp8", scale_bits=11)
