"""AWQ GEMM checkpoints: codes come out as an encoder of the tests' own put them in, and variants are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model.importers.encoders import make_awq
from tests.model.test_load import edit_config, edit_weights
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import load_vlm

UP_PROJ = "model.text_model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_those_of_the_encoder(tiny_idefics3: Path, tmp_path: Path, symmetric: bool) -> None:
    folder, codes = make_awq(tiny_idefics3, tmp_path / "q", symmetric=symmetric)
    vlm = load_vlm(str(folder))
    assert vlm.quantized is not None
    assert set(vlm.quantized.codes) == set(codes)
    parameters = vlm.parameters_by_name()
    for name, expected in codes.items():
        found = vlm.quantized.codes[name]
        assert np.array_equal(found.codes.numpy(), expected.codes), name
        assert np.array_equal(found.scale.numpy(), expected.scale), name
        assert (found.zero_point is None) == symmetric
        if found.zero_point is not None:
            assert np.array_equal(found.zero_point.numpy(), expected.zero)
        assert np.array_equal(parameters[name].numpy(), expected.meaning()), name
    assert vlm.quantized.summary == f"awq 4-bit g32 {'sym' if symmetric else 'asym'}"


@pytest.fixture
def awq(tiny_idefics3: Path, tmp_path: Path) -> Path:
    return make_awq(tiny_idefics3, tmp_path / "awq")[0]


def test_bfloat16_scales_keep_their_value(awq: Path) -> None:
    name = f"{UP_PROJ}.scales"
    kept: dict[str, torch.Tensor] = {}

    def to_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
        kept["scales"] = tensors[name] = tensors[name].to(torch.bfloat16)

    edit_weights(awq, to_bfloat16)
    vlm = load_vlm(str(awq))
    assert vlm.quantized is not None
    found = vlm.quantized.codes[f"{UP_PROJ}.weight"].scale
    assert found.dtype == torch.float16
    assert torch.equal(found.float(), kept["scales"].t().float())


def test_scales_that_float16_does_not_hold_stay_float32(awq: Path) -> None:
    name = f"{UP_PROJ}.scales"
    edit_weights(awq, lambda t: t.update({name: torch.full_like(t[name], 1e-7, dtype=torch.bfloat16)}))
    vlm = load_vlm(str(awq))
    assert vlm.quantized is not None
    assert vlm.quantized.codes[f"{UP_PROJ}.weight"].scale.dtype == torch.float32
    assert vlm.quantized.formats[f"{UP_PROJ}.weight"].wide_scales


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "exllama"])
def test_other_kernels_layouts_are_refused(awq: Path, version: str) -> None:
    edit_config(awq, quantization_config={"quant_method": "awq", "bits": 4, "version": version})
    with pytest.raises(UnsupportedModelError, match=f"packed for the {version} kernel; only the gemm layout"):
        load_vlm(str(awq))


def test_other_bits_are_refused(awq: Path) -> None:
    edit_config(awq, quantization_config={"quant_method": "awq", "bits": 3, "version": "GEMM"})
    with pytest.raises(UnsupportedModelError, match="says 3 bits; the gemm layout holds 4"):
        load_vlm(str(awq))


def test_zero_points_under_a_symmetric_config_are_refused(awq: Path) -> None:
    config = {"quant_method": "awq", "bits": 4, "zero_point": False, "version": "gemm"}
    edit_config(awq, quantization_config=config)
    with pytest.raises(BadInputError, match=r"qzeros: the config says zero_point false"):
        load_vlm(str(awq))


@pytest.mark.parametrize(
    ("part", "cut", "message"),
    [
        ("qweight", (slice(None), slice(1)), r"qweight is 128x1, .* say 128x32"),
        ("qweight", (slice(100), slice(None)), r"weight is 256x100 in the file, 256x128 in the model"),
        ("qweight", (slice(99), slice(None)), "99 input features do not divide into 4"),
        ("qweight", (slice(0), slice(None)), "qweight is 0x32; the format says two axes, none of them 0"),
        ("qzeros", (slice(3), slice(None)), r"qzeros is 3x32, .* say 4x32"),
        ("scales", (slice(None), slice(12)), r"qweight is 128x32, .* say 128x1"),
    ],
)
def test_corrupted_tensors_are_named(awq: Path, part: str, cut: tuple[slice, slice], message: str) -> None:
    edit_weights(awq, lambda t: t.update({f"{UP_PROJ}.{part}": t[f"{UP_PROJ}.{part}"][cut].contiguous()}))
    with pytest.raises(BadInputError, match=rf"{UP_PROJ}.*{message}"):
        load_vlm(str(awq))
