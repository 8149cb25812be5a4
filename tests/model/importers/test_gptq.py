"""GPTQ checkpoints: codes come out as an encoder of the tests' own put them in, and variants are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.model.importers.encoders import make_gptq
from tests.model.test_load import edit_config, edit_weights
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import load_vlm

Q_PROJ = "model.text_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (3, False), (4, True), (4, False), (8, False)])
def test_codes_are_those_of_the_encoder(
    tiny_idefics3: Path, tmp_path: Path, version: str, bits: int, symmetric: bool
) -> None:
    folder, codes = make_gptq(tiny_idefics3, tmp_path / "q", bits=bits, symmetric=symmetric, version=version)
    vlm = load_vlm(str(folder))
    assert vlm.quantized is not None
    assert set(vlm.quantized.codes) == set(codes)
    for name, expected in codes.items():
        found = vlm.quantized.codes[name]
        assert np.array_equal(found.codes.numpy(), expected.codes), name
        assert np.array_equal(found.scale.numpy(), expected.scale), name
        assert (found.zero_point is None) == symmetric
        if found.zero_point is not None:
            assert np.array_equal(found.zero_point.numpy(), expected.zero)
        assert (found.bits, found.group_size) == (bits, 32)


def test_the_model_runs_what_the_codes_mean(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, codes = make_gptq(tiny_idefics3, tmp_path / "q", symmetric=False)
    vlm = load_vlm(str(folder))
    parameters = vlm.parameters_by_name()
    for name, expected in codes.items():
        assert parameters[name].dtype == torch.float32
        assert np.array_equal(parameters[name].numpy(), expected.meaning()), name


def test_names_follow_the_model_and_not_the_file(tiny_llava: Path, tmp_path: Path) -> None:
    folder, codes = make_gptq(tiny_llava, tmp_path / "q")
    vlm = load_vlm(str(folder))
    assert vlm.quantized is not None
    assert not set(vlm.quantized.codes) & set(codes)  # transformers renames every one of them as it loads
    name = "model.language_model.layers.1.mlp.down_proj.weight"
    stored = next(n for n in codes if n.endswith("layers.1.mlp.down_proj.weight"))
    assert np.array_equal(vlm.quantized.codes[name].codes.numpy(), codes[stored].codes)


def test_formats_tell_what_the_files_hold(tiny_idefics3: Path, tmp_path: Path) -> None:
    vlm = load_vlm(str(make_gptq(tiny_idefics3, tmp_path / "q", group=64)[0]))
    assert vlm.quantized is not None
    assert vlm.quantized.summary == "gptq 4-bit g64 sym"
    kept = vlm.quantized.formats[f"{Q_PROJ}.weight"]
    # 128 x 128: half a byte a code; 2 groups a row, 2 bytes of scale and half a byte of zero point each; 4 of g_idx.
    assert kept.stored == 128 * 64 + 128 * 2 * 2 + 128 * 2 // 2 + 128 * 4
    assert vlm.facts.dtype == "float32"


def test_a_whole_row_is_one_group(tiny_idefics3: Path, tmp_path: Path) -> None:
    vlm = load_vlm(str(make_gptq(tiny_idefics3, tmp_path / "q", group=128)[0]))
    assert vlm.quantized is not None
    assert vlm.quantized.codes[f"{Q_PROJ}.weight"].group_size == 128


@pytest.fixture
def gptq(tiny_idefics3: Path, tmp_path: Path) -> Path:
    return make_gptq(tiny_idefics3, tmp_path / "gptq")[0]


def test_a_zero_bias_that_the_model_lacks_is_let_through(gptq: Path) -> None:
    edit_weights(gptq, lambda t: t.update({f"{Q_PROJ}.bias": torch.zeros(128)}))
    assert load_vlm(str(gptq)).quantized is not None
    edit_weights(gptq, lambda t: t.update({f"{Q_PROJ}.bias": torch.ones(128)}))
    with pytest.raises(BadInputError, match=rf"no place in the model: {Q_PROJ}\.bias"):
        load_vlm(str(gptq))


def test_act_order_without_static_groups_is_refused(gptq: Path) -> None:
    def shuffle(tensors: dict[str, torch.Tensor]) -> None:
        order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
        tensors[f"{Q_PROJ}.g_idx"] = tensors[f"{Q_PROJ}.g_idx"][order]

    edit_weights(gptq, shuffle)
    with pytest.raises(UnsupportedModelError, match=rf"{Q_PROJ}\.g_idx .*out of order.*--quant gptq"):
        load_vlm(str(gptq))


def test_version_1_read_as_version_2_is_noticed(gptq: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}
    edit_config(gptq, quantization_config=config)
    with pytest.raises(BadInputError, match=r"qzeros: the config says sym .* are not 8; the other version"):
        load_vlm(str(gptq))


@pytest.mark.parametrize(
    ("method", "bits", "message"),
    [("gptq", [4], r"says bits \[4\]"), (["gptq"], 4, r"method \['gptq'\]"), (None, 4, "method None")],
)
def test_a_config_of_other_types_is_refused(gptq: Path, method: object, bits: object, message: str) -> None:
    edit_config(gptq, quantization_config={"quant_method": method, "bits": bits})
    with pytest.raises(UnsupportedModelError, match=message):
        load_vlm(str(gptq))


def test_a_layout_for_one_kernel_is_refused(gptq: Path) -> None:
    edit_config(gptq, quantization_config={"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"})
    with pytest.raises(UnsupportedModelError, match=r"packed as 'marlin'.*gptq, gptq_v2"):
        load_vlm(str(gptq))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", lambda t: t[:-1], "qweight has 15 words for the 128 input features"),
        ("qweight", lambda t: t[:, :-8], r"scales is 4x128, and the other tensors of its layer say 4x120"),
        ("qweight", lambda t: t.float(), "qweight is float32; the format says int32"),
        ("qzeros", lambda t: t[:, :-1], r"qzeros is 4x15, .* say 4x16"),
        ("scales", lambda t: t[:3], "scales has 3 groups for 128 input features"),
        ("scales", lambda t: t.flatten(), "scales is 512; the format says two axes"),
        ("scales", lambda t: t * float("nan"), "a scale is NaN or infinite"),
        ("g_idx", lambda t: t[0], "qweight has 16 words for the 1 input features"),
        ("g_idx", lambda t: t[:64], "qweight has 16 words for the 64 input features"),
    ],
)
def test_corrupted_tensors_are_named(gptq: Path, part: str, change: object, message: str) -> None:
    assert callable(change)
    edit_weights(gptq, lambda t: t.update({f"{Q_PROJ}.{part}": change(t[f"{Q_PROJ}.{part}"]).contiguous()}))
    with pytest.raises(BadInputError, match=rf"{Q_PROJ}\S* ?.*{message}|{Q_PROJ}\.{message}") as caught:
        load_vlm(str(gptq))
    assert "\n" not in str(caught.value)
    assert str(gptq) in str(caught.value)


@pytest.mark.parametrize("part", ["qzeros", "scales", "g_idx"])
def test_a_missing_part_is_named(gptq: Path, part: str) -> None:
    edit_weights(gptq, lambda t: t.__delitem__(f"{Q_PROJ}.{part}"))
    with pytest.raises(BadInputError, match=rf"{Q_PROJ}\.{part} is missing"):
        load_vlm(str(gptq))


def test_a_matrix_of_another_shape_than_the_model_is_refused(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, _ = make_gptq(tiny_idefics3, tmp_path / "q")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            tensors[f"{Q_PROJ}.{part}"] = tensors[f"{Q_PROJ.replace('self_attn.q', 'mlp.down')}.{part}"].clone()

    edit_weights(folder, swap)
    with pytest.raises(BadInputError, match=r"q_proj\.weight is 128x256 in the file, 128x128 in the model"):
        load_vlm(str(folder))


def test_floats_under_a_quantized_config_are_refused(tiny_idefics3: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(tiny_idefics3, tmp_path / "floats"))
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(BadInputError, match="the config says gptq, but no tensor is packed so"):
        load_vlm(str(folder))


def test_bits_that_the_config_does_not_say_are_refused(gptq: Path) -> None:
    edit_config(gptq, quantization_config={"quant_method": "gptq", "bits": 8})
    with pytest.raises(BadInputError, match=r"qweight has 32 words .* no packing of 8 bits, which the config says"):
        load_vlm(str(gptq))
    edit_config(gptq, quantization_config={"quant_method": "gptq", "bits": 8, "dynamic": {"+:.*": {"bits": 4}}})
    assert load_vlm(str(gptq)).quantized is not None
    edit_config(gptq, quantization_config={"quant_method": "gptq", "bits": 5})
    with pytest.raises(UnsupportedModelError, match="says bits 5; read are 2, 3, 4, 8"):
        load_vlm(str(gptq))
