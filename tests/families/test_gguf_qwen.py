"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: rules against llama.cpp's converter, refusals, and numbers in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers

from tests.families.cases_gguf_multimodal import CASES, MarkedCase, run_case
from tests.families.converter_references import key_differences, tensor_differences
from tests.families.faults import Change, reversed_outputs, swapped, with_keys
from tests.families.gguf_proof import KL_LIMIT
from tests.families.tiny_qwen import FAMILIES, make_tiny_qwen
from tests.families.tiny_text import STATISTICS
from vlmexport.errors import ArtifactError, UnsupportedModelError
from vlmexport.families import gguf_qwen, gguf_qwen_vl
from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_plan import plan_gguf
from vlmexport.model.load import VLM, load_vlm

OPTIONS = GgufOptions(quant="F16", imatrix="none")
EMBEDDING_LIMIT = 2e-3  # F16 weights, and ggml's table of GELU
QWEN = {case.family: case for case in CASES if case.family.startswith("qwen")}
# Keys that the converter leaves to llama.cpp's defaults, which are the same.
EXPLICIT = ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size")
OF_THE_MODEL = {
    "clip.vision.image_min_pixels": (3136, None),
    "clip.vision.image_max_pixels": (1003520, None),
    "clip.vision.spatial_merge_size": (2, None),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VLM]:
    """A tiny model of a family, made once."""

    @cache
    def load(family: str) -> VLM:
        return load_vlm(str(make_tiny_qwen(family, tmp_path_factory.mktemp(family) / "model")))

    return load


def _weights(vlm: VLM) -> dict[str, Any]:
    return dict(vlm.model.state_dict(keep_vars=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_converters(family: str, loaded: Callable[[str], VLM]) -> None:
    vlm = loaded(family)
    plan = plan_gguf(vlm, OPTIONS)
    assert not plan.unused
    assert {tensor.source for tensor in plan.tensors} == set(_weights(vlm))
    for file in ("text", "mmproj"):
        assert tensor_differences(_weights(vlm), plan, file) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_differ_from_the_converters_only_where_they_say_more(family: str, loaded: Callable[[str], VLM]) -> None:
    plan = plan_gguf(loaded(family), OPTIONS)
    extra = {f"{plan.arch}.{key}" for key in EXPLICIT}
    text = key_differences(plan, "text")
    assert set(text) <= extra
    assert all(theirs is None for _, theirs in text.values())
    more = {key: pair for key, pair in OF_THE_MODEL.items() if family.startswith("qwen2") or "pixels" in key}
    assert key_differences(plan, "mmproj") == more


def test_swapped_frames_differ_from_the_converter(
    loaded: Callable[[str], VLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, right = loaded("qwen2_vl"), gguf_qwen_vl.vision
    fault = reversed_outputs("patch_embed.proj.weight")
    monkeypatch.setattr(gguf_qwen_vl, "vision", lambda *args: fault(right(*args)))
    differing = tensor_differences(_weights(vlm), plan_gguf(vlm, OPTIONS), "mmproj")
    assert differing == ["v.patch_embd.weight", "v.patch_embd.weight.1"]


def test_the_deepstack_layers_are_named_in_both_files(loaded: Callable[[str], VLM]) -> None:
    plan = plan_gguf(loaded("qwen3_vl"), OPTIONS)
    assert plan.metadata["text"]["qwen3vl.n_deepstack_layers"] == 2
    assert plan.metadata["mmproj"]["clip.vision.is_deepstack_layers"] == [True, False, True, False]
    assert {t.name for t in plan.tensors if "deepstack.2.fc2" in t.name} == {
        "v.deepstack.2.fc2.weight",
        "v.deepstack.2.fc2.bias",
    }


def test_deepstack_mergers_are_not_left_out(loaded: Callable[[str], VLM], monkeypatch: pytest.MonkeyPatch) -> None:
    right = gguf_qwen_vl.deepstack_rules
    monkeypatch.setattr(gguf_qwen_vl, "deepstack_rules", lambda number, layer: right(number, layer)[:2])
    with pytest.raises(UnsupportedModelError, match=r"linear_fc2\.weight has no place"):
        plan_gguf(loaded("qwen3_vl"), OPTIONS)


HUB_2_5_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}


def test_a_config_of_the_hub() -> None:
    config = transformers.Qwen2_5_VLConfig(**HUB_2_5_7B)
    text = gguf_qwen.text(config.get_text_config(), [])
    assert text.metadata["qwen2vl.rope.dimension_sections"] == [16, 24, 24, 0]
    assert text.metadata["qwen2vl.rope.freq_base"] == 1e6
    assert text.metadata["qwen2vl.context_length"] == 128000
    pixels = {**STATISTICS, "min_pixels": 3136, "max_pixels": 12845056, "resample": 2}
    vision = gguf_qwen_vl.vision(config, pixels, [])
    assert vision.metadata["clip.vision.n_wa_pattern"] == 8
    assert vision.metadata["clip.vision.image_min_pixels"] == 3136
    # 16384 tokens would need a window mask of 17 GB.
    assert vision.metadata["clip.vision.image_max_pixels"] == 4096 * 28 * 28
    edges, large, resampling = vision.notes
    assert "multiples of 28 pixels" in edges
    assert "to 4096 tokens, the model's processor to 16384" in large
    assert "by bicubic interpolation, the model's processor by bilinear" in resampling


def _config(family: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    stem = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
    return getattr(transformers, f"{stem[family]}Config")(text_config=text, vision_config=vision)


TEXT_REFUSALS = {
    "hidden_act": ("qwen2_vl", {"hidden_act": "gelu"}, "SiLU"),
    "sections": ("qwen3_vl", {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2, 3]}}, "mrope_section"),
    "scaling": (
        "qwen2_5_vl",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "no equal",
    ),
    "sparse step": ("qwen3_vl_moe", {"decoder_sparse_step": 2}, "without experts"),
}


@pytest.mark.parametrize("case", TEXT_REFUSALS)
def test_a_decoder_that_llamacpp_computes_otherwise_is_refused(case: str) -> None:
    family, text, words = TEXT_REFUSALS[case]
    with pytest.raises(UnsupportedModelError, match=words):
        gguf_qwen.text(_config(family, text, {}).get_text_config(), [])


def test_a_bias_without_a_place_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"o_proj\.bias would be lost"):
        config = _config("qwen3_vl", {}, {}).get_text_config()
        gguf_qwen.text(config, ["layers.0.self_attn.o_proj.bias"])


def test_heads_that_are_not_the_hidden_size_are_refused() -> None:
    config = _config("qwen2_vl", {}, {}).get_text_config()
    config.head_dim = 64
    with pytest.raises(UnsupportedModelError, match="not the hidden size"):
        gguf_qwen.text(config, [])


VISION_REFUSALS = {
    "frames": ("qwen2_vl", {"temporal_patch_size": 4}, "two frames"),
    "merge": ("qwen3_vl", {"spatial_merge_size": 4}, "2 x 2"),
    "window": ("qwen2_5_vl", {"window_size": 224}, "112 pixels"),
    "pattern": ("qwen2_5_vl", {"fullatt_block_indexes": [3, 9]}, "every n-th"),
    "pattern ends early": ("qwen2_5_vl", {"depth": 32, "fullatt_block_indexes": [7, 15]}, "every n-th"),
    "no windows": ("qwen2_5_vl", {"depth": 2, "fullatt_block_indexes": [0, 1]}, "has windows"),
    "swapped MLP": ("qwen2_vl", {"mlp_ratio": 1}, "swapped"),
    "activation": ("qwen2_vl", {"hidden_act": "gelu"}, "quick GELU"),
    "position table": ("qwen3_vl", {"num_position_embeddings": 200}, "not a square"),
    "deepstack order": ("qwen3_vl", {"deepstack_visual_indexes": [8, 4]}, "do not rise"),
}


@pytest.mark.parametrize("case", VISION_REFUSALS)
def test_a_tower_that_llamacpp_computes_otherwise_is_refused(case: str) -> None:
    family, vision, words = VISION_REFUSALS[case]
    with pytest.raises(UnsupportedModelError, match=words):
        gguf_qwen_vl.vision(_config(family, {}, vision), STATISTICS, [])


def test_another_rotary_base_of_the_tower_is_refused() -> None:
    encoder = SimpleNamespace(model_type="qwen2_vl_vision", rope_parameters={"rope_theta": 5000.0})
    with pytest.raises(UnsupportedModelError, match="rope_theta is 5000"):
        gguf_qwen_vl._check_rope(encoder)


@pytest.mark.slow
@pytest.mark.parametrize("case", QWEN.values(), ids=str)
def test_llamacpp_equals_pytorch(case: MarkedCase, tmp_path: Path) -> None:
    proof = run_case(case, tmp_path)
    assert proof.images == 30
    assert proof.embeddings <= EMBEDDING_LIMIT
    assert proof.worst <= KL_LIMIT


# Swapped frames are not among them: a still picture is two equal frames, so only the converter's file tells.
FAULTS: dict[str, tuple[str, Any, str, Change]] = {
    "merger layers swapped": ("qwen3_vl", gguf_qwen_vl, "vision", swapped("v.deepstack.0.fc1", "v.deepstack.2.fc1")),
    "other windows": ("qwen2_5_vl", gguf_qwen_vl, "vision", with_keys({"clip.vision.n_wa_pattern": 4})),
    "other sections": ("qwen2_vl", gguf_qwen, "text", with_keys({"qwen2vl.rope.dimension_sections": [16, 0, 0, 0]})),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_the_proof_red(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, module, name, change = FAULTS[fault]
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: change(right(*args)))
    assert run_case(QWEN[family], tmp_path).worst > 10 * KL_LIMIT


@pytest.mark.slow
def test_llamacpp_does_not_load_a_text_file_with_fewer_deepstack_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, fault = gguf_qwen_vl.vision, with_keys({"qwen3vl.n_deepstack_layers": 1}, text=True)
    monkeypatch.setattr(gguf_qwen_vl, "vision", lambda *args: fault(right(*args)))
    with pytest.raises(ArtifactError, match="mismatch between text model"):
        run_case(QWEN["qwen3_vl"], tmp_path)
