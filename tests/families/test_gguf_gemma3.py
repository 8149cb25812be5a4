"""Gemma 3: rules against llama.cpp's converter, refusals, and numbers in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config

from tests.families.cases_gguf_multimodal import CASES, MarkedCase, run_case
from tests.families.converter_references import key_differences, tensor_differences
from tests.families.faults import Change, untouched, with_keys
from tests.families.gguf_proof import KL_LIMIT
from tests.families.tiny_gemma3 import make_tiny_gemma3
from tests.families.tiny_text import STATISTICS
from vlmexport.errors import UnsupportedModelError
from vlmexport.families import gguf_gemma3, gguf_gemma3_vision
from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_plan import plan_gguf
from vlmexport.model.load import VLM, load_vlm

OPTIONS = GgufOptions(quant="F16", imatrix="none")
EMBEDDING_LIMIT = 2e-3  # F16 weights, and ggml's table of GELU
GEMMA = [case for case in CASES if case.family == "gemma3"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_vlm(str(make_tiny_gemma3(tmp_path_factory.mktemp("gemma3") / "model")))


def _weights(vlm: VLM) -> dict[str, Any]:
    return dict(vlm.model.state_dict(keep_vars=True))


def test_every_tensor_is_the_converters(tiny: VLM) -> None:
    plan = plan_gguf(tiny, OPTIONS)
    assert {t.source for t in plan.tensors} | set(plan.unused) == set(_weights(tiny))
    assert {name.split(".head.")[0] for name in plan.unused} == {"lm_head.weight", "model.vision_tower"}
    for file in ("text", "mmproj"):
        assert tensor_differences(_weights(tiny), plan, file) == []


def test_keys_differ_from_the_converters_only_where_they_say_more(tiny: VLM) -> None:
    plan = plan_gguf(tiny, OPTIONS)
    assert key_differences(plan, "text") == {
        # llama.cpp would take every sixth layer for a global one.
        "gemma3.attention.sliding_window_pattern": ([True, False, True, True], None),
        "gemma3.rope.dimension_count": (32, None),
        "gemma3.vocab_size": (320, None),
    }
    assert key_differences(plan, "mmproj") == {}


def test_norms_without_their_one_differ_from_the_converter(tiny: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    right, fault = gguf_gemma3_vision.vision, untouched("mm_soft_emb_norm")
    monkeypatch.setattr(gguf_gemma3_vision, "vision", lambda *args: fault(right(*args)))
    differing = tensor_differences(_weights(tiny), plan_gguf(tiny, OPTIONS), "mmproj")
    assert differing == ["mm.soft_emb_norm.weight"]


def test_what_llamacpp_transposes_is_never_quantized(tiny: VLM) -> None:
    plan = plan_gguf(tiny, GgufOptions(quant="F16", mmproj_type="Q8_0", imatrix="none"))
    types = {t.name: t.type for t in plan.of("mmproj")}
    assert types["mm.input_projection.weight"] == "F32"
    assert types["v.blk.0.attn_q.weight"] == "Q8_0"


HUB_4B = {
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "mm_tokens_per_image": 256,
}
HUB_27B = {
    **HUB_4B,
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}


@pytest.mark.parametrize("hub", [HUB_4B, HUB_27B], ids=["4B", "27B"])
def test_a_config_of_the_hub(hub: dict[str, Any]) -> None:
    config = Gemma3Config(**hub)
    keys = gguf_gemma3.text(config.get_text_config(), []).metadata
    assert keys["gemma3.rope.scaling.type"] == "linear"
    assert keys["gemma3.rope.scaling.factor"] == 8.0
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)
    assert keys["gemma3.context_length"] == 131072
    assert keys["gemma3.attention.sliding_window"] == 1024
    assert keys["gemma3.attention.sliding_window_pattern"][:7] == [True] * 5 + [False, True]  # type: ignore[index]
    half = gguf_gemma3_vision.vision(config, STATISTICS, [])
    assert half.metadata["clip.vision.projector.scale_factor"] == 4
    assert "896 x 896" in half.notes[0]


TEXT_REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "attention scale": ({"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is 100"),
    "attention cap": ({"attn_logit_softcapping": 50.0}, "does not cap attention"),
    "bidirectional": ({"use_bidirectional_attention": True}, "the past only"),
    "activation": ({"hidden_activation": "silu"}, "tanh formula"),
    "local scaling": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            }
        },
        "local layers",
    ),
}


@pytest.mark.parametrize("case", TEXT_REFUSALS)
def test_a_decoder_that_llamacpp_computes_otherwise_is_refused(case: str) -> None:
    keys, words = TEXT_REFUSALS[case]
    with pytest.raises(UnsupportedModelError, match=words):
        gguf_gemma3.text(Gemma3Config(text_config=keys).get_text_config(), [])


def test_as_many_layers_as_27b_with_another_scale_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="takes 288"):
        gguf_gemma3.text(Gemma3Config(text_config={"num_hidden_layers": 62}).get_text_config(), [])


@pytest.mark.parametrize(
    ("keys", "preprocessor", "words"),
    [
        ({"vision_config": {"hidden_act": "gelu"}}, {}, "tanh formula"),
        ({"vision_config": {"hidden_size": 64, "intermediate_size": 64}}, {}, "swapped"),
        ({"mm_tokens_per_image": 200}, {}, "pools"),
        ({}, {"do_pan_and_scan": True}, "cut-outs"),
        ({}, {"image_mean": None}, "not three numbers"),
    ],
)
def test_a_tower_that_llamacpp_computes_otherwise_is_refused(
    keys: dict[str, Any], preprocessor: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        gguf_gemma3_vision.vision(Gemma3Config(**keys), {**STATISTICS, **preprocessor}, [])


@pytest.mark.slow
@pytest.mark.parametrize("case", GEMMA, ids=str)
def test_llamacpp_equals_pytorch(case: MarkedCase, tmp_path: Path) -> None:
    proof = run_case(case, tmp_path)
    assert proof.images == 16
    assert proof.embeddings <= EMBEDDING_LIMIT
    assert proof.worst <= KL_LIMIT


FAULTS: dict[str, tuple[str, Change]] = {
    "a norm without its one": ("text", untouched("q_norm")),
    "the projector's norm without its one": ("vision", untouched("mm_soft_emb_norm")),
    "another pattern of windows": (
        "text",
        with_keys({"gemma3.attention.sliding_window_pattern": [True, True, True, True]}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_turns_the_proof_red(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, change = FAULTS[fault]
    module = gguf_gemma3 if name == "text" else gguf_gemma3_vision
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: change(right(*args)))
    assert run_case(GEMMA[0], tmp_path).worst > 10 * KL_LIMIT
