"""LFM2-VL: rules against llama.cpp's converter, refusals, and numbers in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Lfm2VlConfig

from tests.families.cases_gguf_multimodal import CASES, MarkedCase, run_case
from tests.families.converter_references import key_differences, tensor_differences
from tests.families.faults import Change, swapped, with_keys
from tests.families.gguf_proof import KL_LIMIT
from tests.families.tiny_lfm2 import make_tiny_lfm2
from tests.families.tiny_text import STATISTICS
from vlmexport.errors import UnsupportedModelError
from vlmexport.families import gguf_lfm2, gguf_lfm2_vision
from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_plan import plan_gguf
from vlmexport.model.load import VLM, load_vlm

OPTIONS = GgufOptions(quant="F16", imatrix="none")
EMBEDDING_LIMIT = 2e-3  # F16 weights, and ggml's table of GELU
LFM2 = [case for case in CASES if case.family == "lfm2_vl"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_vlm(str(make_tiny_lfm2(tmp_path_factory.mktemp("lfm2") / "model")))


def _weights(vlm: VLM) -> dict[str, Any]:
    return dict(vlm.model.state_dict(keep_vars=True))


def test_every_tensor_is_the_converters(tiny: VLM) -> None:
    plan = plan_gguf(tiny, OPTIONS)
    assert set(plan.unused) == {"lm_head.weight"}
    for file in ("text", "mmproj"):
        assert tensor_differences(_weights(tiny), plan, file) == []


def test_keys_differ_from_the_converters_only_where_they_say_more(tiny: VLM) -> None:
    plan = plan_gguf(tiny, OPTIONS)
    assert key_differences(plan, "text") == {
        "lfm2.attention.key_length": (32, None),
        "lfm2.attention.value_length": (32, None),
        "lfm2.rope.dimension_count": (32, None),
    }
    # The converter writes 256 for every model; the table of positions has 8 x 8 patches of 16 pixels here.
    assert key_differences(plan, "mmproj") == {"clip.vision.image_size": (128, 256)}


def test_swapped_layers_of_the_projector_differ_from_the_converter(tiny: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right, fault = gguf_lfm2_vision.vision, swapped("mm.1", "mm.2")
    monkeypatch.setattr(gguf_lfm2_vision, "vision", lambda *args: fault(right(*args)))
    differing = tensor_differences(_weights(tiny), plan_gguf(tiny, OPTIONS), "mmproj")
    assert differing == ["mm.1.bias", "mm.1.weight", "mm.2.bias", "mm.2.weight"]


def test_convolutions_keep_f32(tiny: VLM) -> None:
    types = {t.name: t.type for t in plan_gguf(tiny, GgufOptions(quant="Q8_0", imatrix="none")).tensors}
    assert types["blk.0.shortconv.conv.weight"] == "F32"
    assert types["blk.0.shortconv.in_proj.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        ({"intermediate_size": 6656, "block_auto_adjust_ff_dim": True, "block_multiple_of": 256}, 4608),
        ({"intermediate_size": 1000, "block_ffn_dim_multiplier": 1.5, "block_multiple_of": 32}, 1024),
        ({"intermediate_size": 4608, "block_auto_adjust_ff_dim": False}, 4608),
    ],
)
def test_the_width_of_the_mlp_is_the_models_own(keys: dict[str, Any], width: int) -> None:
    config = Lfm2VlConfig(text_config={"model_type": "lfm2", **keys}).get_text_config()
    assert gguf_lfm2.text(config, []).metadata["lfm2.feed_forward_length"] == width


def test_layers_of_convolutions_have_no_heads_of_keys(tiny: VLM) -> None:
    keys = plan_gguf(tiny, OPTIONS).metadata["text"]
    assert keys["lfm2.attention.head_count_kv"] == [0, 2, 0, 2]


def test_a_bias_of_the_convolution_is_refused() -> None:
    config = Lfm2VlConfig().get_text_config()
    with pytest.raises(UnsupportedModelError, match=r"conv\.conv\.bias would be lost"):
        gguf_lfm2.text(config, ["layers.0.conv.conv.bias"])


@pytest.mark.parametrize(
    ("keys", "preprocessor", "words"),
    [
        ({}, {"do_image_splitting": False}, "do_image_splitting of its image processor is False"),
        ({}, {"max_image_tokens": 512}, "max_image_tokens of its image processor is 512"),
        ({}, {"downsample_factor": 4}, "merged by 4"),
        ({}, {"resample": 0}, "resample 0"),
        ({}, {"resample": "bicubic"}, "resample of its image processor is 'bicubic'"),
        ({"projector_bias": False}, {}, "has biases"),
        ({"projector_hidden_act": "relu"}, {}, "has GELU"),
        ({"vision_config": {"model_type": "siglip2_vision_model", "hidden_act": "gelu"}}, {}, "tanh formula"),
    ],
)
def test_a_tower_that_llamacpp_computes_otherwise_is_refused(
    keys: dict[str, Any], preprocessor: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        gguf_lfm2_vision.vision(Lfm2VlConfig(**keys), {**STATISTICS, **preprocessor}, [])


@pytest.mark.slow
@pytest.mark.parametrize("case", LFM2, ids=str)
def test_llamacpp_equals_pytorch(case: MarkedCase, tmp_path: Path) -> None:
    proof = run_case(case, tmp_path)
    assert proof.images == case.width * case.height // 1024
    assert proof.embeddings <= EMBEDDING_LIMIT
    assert proof.worst <= KL_LIMIT


FAULTS: dict[str, tuple[str, Change]] = {
    "gate and up swapped": ("text", swapped("blk.{i}.ffn_gate", "blk.{i}.ffn_up")),
    "another base": ("text", with_keys({"lfm2.rope.freq_base": 10000.0})),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_the_proof_red(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = FAULTS[fault]
    module = gguf_lfm2 if name == "text" else gguf_lfm2_vision
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: change(right(*args)))
    assert run_case(LFM2[0], tmp_path).worst > 10 * KL_LIMIT
