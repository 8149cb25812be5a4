"""compressed-tensors checkpoints, packed by that library itself: codes, meaning, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from tests.model.importers.encoders import Codes, Tensors, draw_codes, is_decoder_linear, rewrite
from tests.model.test_load import edit_config, edit_weights
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import load_vlm

O_PROJ = "model.text_model.layers.0.self_attn.o_proj"


class Library:
    """An `Encode` that has compressed-tensors pack drawn codes, and keeps what the library decompresses them to."""

    def __init__(self, layout: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> None:
        self.codes: dict[str, Codes] = {}
        self.meaning: dict[str, torch.Tensor] = {}
        self.scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(**weights),
            input_activations=None if activations is None else QuantizationArgs(**activations),
        )
        self._layout = layout
        self._compressor: Any = BaseCompressor.get_value_from_registry(layout)

    def __call__(self, name: str, tensor: torch.Tensor) -> Tensors | None:
        if not is_decoder_linear(name):
            return None
        args = self.scheme.weights
        size = args.group_size or tensor.shape[1]
        codes = draw_codes((tensor.shape[0], tensor.shape[1]), args.num_bits, size, args.symmetric, len(self.codes))
        scale = torch.from_numpy(codes.scale).float()
        state = {"weight": torch.from_numpy(codes.meaning()), "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = torch.from_numpy(codes.zero - (1 << (args.num_bits - 1))).to(torch.int8)
        made: Tensors = self._compressor.compress(state, self.scheme)
        self.codes[name] = codes
        self.meaning[name] = self._compressor.decompress(made, self.scheme)["weight"].float()
        return made

    def config(self) -> dict[str, Any]:
        return {
            "quant_method": "compressed-tensors",
            "format": self._layout,
            "quantization_status": "compressed",
            "config_groups": {"group_0": self.scheme.model_dump(mode="json")},
            "ignore": ["lm_head"],
        }


def make(source: Path, folder: Path, layout: str = "pack-quantized", **weights: Any) -> tuple[Path, Library]:
    library = Library(layout, weights or {"num_bits": 4, "strategy": "group", "group_size": 32})
    return rewrite(source, folder, library, library.config()), library


GROUPED = {"strategy": "group", "group_size": 32}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "scope"), [*((bits, GROUPED) for bits in (2, 3, 4, 5, 6, 7, 8)), (4, {"strategy": "channel"})]
)
def test_packed_codes_are_those_that_the_library_packed(
    tiny_idefics3: Path, tmp_path: Path, bits: int, symmetric: bool, scope: dict[str, Any]
) -> None:
    folder, library = make(tiny_idefics3, tmp_path / "q", num_bits=bits, symmetric=symmetric, **scope)
    vlm = load_vlm(str(folder))
    assert vlm.quantized is not None
    assert set(vlm.quantized.codes) == set(library.codes)
    parameters = vlm.parameters_by_name()
    for name, expected in library.codes.items():
        found = vlm.quantized.codes[name]
        assert np.array_equal(found.codes.numpy(), expected.codes), name
        assert (found.zero_point is None) == symmetric
        if found.zero_point is not None:
            assert np.array_equal(found.zero_point.numpy(), expected.zero)
        assert torch.equal(parameters[name], library.meaning[name]), name


@pytest.mark.parametrize(("strategy", "symmetric"), [("channel", True), ("channel", False), ("tensor", True)])
def test_int8_codes_and_a_note_on_dynamic_activations(
    tiny_idefics3: Path, tmp_path: Path, strategy: str, symmetric: bool
) -> None:
    activations = {"num_bits": 8, "dynamic": True, "strategy": "token"}
    library = Library("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": symmetric}, activations)
    config = library.config()
    folder = rewrite(tiny_idefics3, tmp_path / "q", library, config)
    if strategy == "tensor":
        config["config_groups"]["group_0"]["weights"]["strategy"] = "tensor"
        edit_config(folder, quantization_config=config)
        edit_weights(folder, lambda t: t.update({n: t[n][:1, 0] for n in t if n.endswith("weight_scale")}))
    vlm = load_vlm(str(folder))
    assert vlm.quantized is not None
    assert vlm.quantized.notes == ("its dynamic int8 activations are not part of the import: only weights are",)
    for name, expected in library.codes.items():
        assert np.array_equal(vlm.quantized.codes[name].codes.numpy(), expected.codes), name
        if strategy == "channel":
            assert torch.equal(vlm.parameters_by_name()[name], library.meaning[name]), name
    assert vlm.quantized.summary == f"compressed-tensors 8-bit per channel {'sym' if symmetric else 'asym'}"


def test_fp8_bytes_and_their_meaning(tiny_idefics3: Path, tmp_path: Path) -> None:
    args = {"num_bits": 8, "type": "float", "strategy": "channel"}
    folder, library = make(tiny_idefics3, tmp_path / "q", "float-quantized", **args)
    vlm = load_vlm(str(folder))
    assert vlm.quantized is not None
    assert vlm.quantized.summary == "compressed-tensors fp8 per channel"
    for name, meaning in library.meaning.items():
        assert torch.equal(vlm.parameters_by_name()[name], meaning), name
        assert vlm.quantized.codes[name].codebook is not None


@pytest.fixture
def packed(tiny_idefics3: Path, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    folder, library = make(tiny_idefics3, tmp_path / "packed")
    return folder, library.config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, r"has format 'nvfp4-pack-quantized'; read are pack-quantized"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "quantizes its KV cache"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "rotates activations"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "is sparse .sparse-24-bitmask."),
        ({"sparsity_config": "sparse"}, "is sparse .sparse."),
    ],
)
def test_more_than_weights_is_refused(
    packed: tuple[Path, dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    folder, config = packed
    edit_config(folder, quantization_config={**config, **change})
    with pytest.raises(UnsupportedModelError, match=message):
        load_vlm(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_activations": {"num_bits": 8, "dynamic": False}}, "static int8 activations with scales of its own"),
        ({"output_activations": {"num_bits": 8}}, "quantizes outputs of layers"),
        ({"weights": {"num_bits": 8, "type": "float", "strategy": "block"}}, "scales per block are not imported"),
        ({"weights": None}, "says nothing of weights"),
        ({"weights": {"num_bits": 8, "strategy": "group", "group_size": 32}}, "no packing of 8 bits"),
        (
            {"weights": {"num_bits": 4, "strategy": "group", "group_size": 64}},
            "groups of 32 without zero points, which no",
        ),
        ({"weights": {"num_bits": 4, **GROUPED, "symmetric": False}}, "which no config group says"),
        ({"weights": {"num_bits": "many", **GROUPED}}, "with many bits are not imported"),
        ({"weights": {"num_bits": 4, "strategy": "group", "group_size": "x"}}, "group_size 'x'; it must be a number"),
        ({"input_activations": "int8"}, "has input_activations 'int8'"),
    ],
)
def test_groups_that_the_tensors_contradict_are_refused(
    packed: tuple[Path, dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    folder, config = packed
    group = {**config["config_groups"]["group_0"], **change}
    edit_config(folder, quantization_config={**config, "config_groups": {"group_0": group}})
    with pytest.raises(BadInputError, match=message) as caught:
        load_vlm(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("groups", [{}, None, {"group_0": None}])
def test_no_groups_are_refused(packed: tuple[Path, dict[str, Any]], groups: Any) -> None:
    folder, config = packed
    edit_config(folder, quantization_config={**config, "config_groups": groups})
    with pytest.raises(BadInputError, match="has no config_groups"):
        load_vlm(str(folder))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_shape", torch.tensor([128, 96]), "weight_packed has 16 words for 96 input features"),
        ("weight_shape", torch.tensor([128]), r"weight_shape says \[128\]"),
        ("weight_scale", torch.ones(64, 4), r"weight_scale is 64x4, .* say 128x4"),
        ("weight_scale", torch.ones(128, 4, dtype=torch.int32), "weight_scale is int32; the format says"),
        ("weight_packed", torch.zeros(64, 16, dtype=torch.int32), r"weight_packed is 64x16, .* say 128x16"),
        ("weight_packed", torch.tensor(3, dtype=torch.int32), "weight_packed has 0 words for 128 input features"),
        ("weight_g_idx", torch.arange(128).flip(0) // 32, r"weight_g_idx puts input features into groups out of order"),
    ],
)
def test_corrupted_tensors_are_named(
    packed: tuple[Path, dict[str, Any]], part: str, value: torch.Tensor, message: str
) -> None:
    edit_weights(packed[0], lambda t: t.update({f"{O_PROJ}.{part}": value}))
    with pytest.raises(BadInputError, match=rf"{O_PROJ}\.{message}"):
        load_vlm(str(packed[0]))


def test_int8_codes_of_more_bits_than_said_are_refused(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, library = make(tiny_idefics3, tmp_path / "q", "int-quantized", num_bits=8, strategy="channel")
    config = library.config()
    config["config_groups"]["group_0"]["weights"]["num_bits"] = 4
    edit_config(folder, quantization_config=config)
    with pytest.raises(BadInputError, match="weight holds codes that 4 bits do not"):
        load_vlm(str(folder))


def test_vision_weights_keep_their_floats(packed: tuple[Path, dict[str, Any]], tiny_idefics3: Path) -> None:
    original = load_vlm(str(tiny_idefics3)).parameters_by_name()
    loaded = load_vlm(str(packed[0])).parameters_by_name()
    kept = [name for name in original if "vision_model" in name]
    assert kept
    assert all(torch.equal(loaded[name], original[name]) for name in kept)
