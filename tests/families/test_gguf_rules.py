"""Rules, keys and refusals of the GGUF families, without llama.cpp."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.families.tiny_gguf import FAMILIES, make_checkpoint
from vlmexport.errors import UnsupportedModelError
from vlmexport.families import (
    gguf_idefics3,
    gguf_internvl,
    gguf_llama,
    gguf_llava,
    gguf_pixtral,
    gguf_text_module,
    gguf_vision_module,
)
from vlmexport.families.gguf_common import llama3_factors, rope_metadata
from vlmexport.families.gguf_vision import blocks_used, resampling_notes, unused_blocks
from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_plan import family_halves, plan_gguf
from vlmexport.gguf_processor import preprocessor_config
from vlmexport.model.load import VLM, load_vlm

OPTIONS = GgufOptions(quant="F16", mmproj_type="F16", imatrix="none")
SUPPORTED = [family for family in FAMILIES if family != "llava_clip"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, VLM]:
    """Every family's tiny checkpoint, loaded once."""
    folder = tmp_path_factory.mktemp("families")
    return {family: load_vlm(str(make_checkpoint(family, folder / family))) for family in FAMILIES}


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_weight_has_one_place_or_a_reason(family: str, models: dict[str, VLM]) -> None:
    vlm = models[family]
    plan = plan_gguf(vlm, OPTIONS)
    sources = {tensor.source for tensor in plan.tensors}
    assert sources.isdisjoint(plan.unused)
    assert sources | set(plan.unused) == {*vlm.model.state_dict(), *([""] if plan.computed else [])}
    assert len({tensor.name for tensor in plan.tensors}) == len(plan.tensors)


@pytest.mark.parametrize(
    ("family", "arch", "projector"),
    [
        ("idefics3", "llama", "idefics3"),
        ("smolvlm", "llama", "idefics3"),
        ("llava", "llama", "mlp"),
        ("pixtral", "llama", "pixtral"),
        ("mistral3", "llama", "pixtral"),
        ("ministral3", "mistral3", "pixtral"),
        ("internvl", "qwen2", "internvl"),
    ],
)
def test_architectures(family: str, arch: str, projector: str, models: dict[str, VLM]) -> None:
    plan = plan_gguf(models[family], OPTIONS)
    assert (plan.arch, plan.projector) == (arch, projector)
    assert all(key.startswith(f"{arch}.") for key in plan.metadata["text"])
    assert plan.metadata["mmproj"]["clip.projector_type"] == projector


def test_keys_of_the_bundled_model_are_the_converters() -> None:
    """As convert_hf_to_gguf.py (llama.cpp b11549) writes them, ``tokenizer.*`` and ``general.*`` aside."""
    plan = plan_gguf(load_vlm("demo"), OPTIONS)
    assert plan.metadata["text"] == {
        "llama.block_count": 4,
        "llama.context_length": 2048,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.vocab_size": 512,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
    }
    assert plan.metadata["mmproj"] == {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "idefics3",
        "clip.use_gelu": True,
        "clip.vision.projection_dim": 256,
        "clip.vision.image_size": 32,
        "clip.vision.patch_size": 8,
        "clip.vision.embedding_length": 192,
        "clip.vision.feed_forward_length": 512,
        "clip.vision.block_count": 4,
        "clip.vision.attention.head_count": 3,
        "clip.vision.attention.layer_norm_epsilon": 1e-6,
        "clip.vision.image_mean": [0.5, 0.5, 0.5],
        "clip.vision.image_std": [0.5, 0.5, 0.5],
        "clip.vision.projector.scale_factor": 2,
        "clip.vision.preproc_image_size": 64,
    }
    assert (len(plan.of("text")), len(plan.of("mmproj"))) == (39, 70)
    patches = [t for t in plan.of("mmproj") if t.name in ("v.patch_embd.weight", "v.position_embd.weight")]
    assert [t.type for t in patches] == ["F32", "F32"]


def test_tied_embeddings_have_no_output(tmp_path: Path) -> None:
    plan = plan_gguf(load_vlm(str(make_checkpoint("smolvlm", tmp_path, tie_word_embeddings=True))), OPTIONS)
    assert "output.weight" not in {tensor.name for tensor in plan.tensors}
    assert "lm_head.weight" in plan.unused


def test_the_last_block_of_llava_is_left_out_with_its_reason(models: dict[str, VLM]) -> None:
    plan = plan_gguf(models["llava"], OPTIONS)
    unused = [name for name in plan.unused if ".encoder.layers.2." in name]
    assert len(unused) == 16
    assert "vision_feature_layer is -2" in plan.unused[unused[0]]
    assert plan.metadata["mmproj"]["clip.vision.block_count"] == 2
    assert plan.metadata["mmproj"]["clip.vision.feature_layer"] == [2]


@pytest.mark.parametrize(("layer", "blocks"), [(-1, 3), (-2, 2), (3, 3), (1, 1), ([-2], 2)])
def test_blocks_used(layer: Any, blocks: int, models: dict[str, VLM]) -> None:
    config = copy.deepcopy(models["llava"].config)
    config.vision_feature_layer = layer
    assert blocks_used(config) == blocks


def test_the_break_row_is_borrowed_from_the_table(models: dict[str, VLM]) -> None:
    vlm = models["mistral3"]
    tensor = next(t for t in plan_gguf(vlm, OPTIONS).tensors if t.name == "v.token_embd.img_break")
    assert tensor.source == "model.language_model.embed_tokens.weight"
    assert tensor.transform is not None
    assert tensor.transform.arguments == (preprocessor_config(vlm)["added_tokens"]["[IMG_BREAK]"],)
    assert tensor.shape == (128,)
    assert tensor.type == "F32"


def test_llama3_factors_are_transformers_own() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    assert torch.allclose(torch.tensor(llama3_factors(rope, 128)), plain / scaled, rtol=1e-5)


def test_a_sliding_window_limits_the_context(models: dict[str, VLM]) -> None:
    config = copy.deepcopy(models["pixtral"].config.get_text_config())
    config.sliding_window = 512
    assert gguf_llama.text(config, ()).metadata["llama.context_length"] == 512


def test_yarn_keys(models: dict[str, VLM]) -> None:
    config = copy.deepcopy(models["llava"].config.get_text_config())
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    config.rope_parameters = rope
    keys, _ = rope_metadata(config, "llama")
    assert keys == {
        "llama.rope.freq_base": 1e4,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 512,
    }
    config.rope_parameters = {**rope, "attention_factor": 2.0}
    assert rope_metadata(config, "llama")[0]["llama.rope.scaling.attn_factor"] == pytest.approx(2 / 1.138629436)
    config.rope_parameters = {**rope, "beta_fast": 16.0}
    with pytest.raises(UnsupportedModelError, match=r"16\.0 and 1\.0"):
        rope_metadata(config, "llama")
    assert rope_metadata(config, "mistral3", betas=True)[0]["mistral3.rope.scaling.yarn_beta_fast"] == 16.0


TEXT_REFUSALS = [
    ("llava", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("llava", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic' has no equal"),
    ("llava", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llava", {"rope_parameters": None}, "without a rope_theta"),
    ("internvl", {"head_dim": 48}, "4 heads of 48 are not the hidden size 128"),
    ("internvl", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3' has no equal"),
]


@pytest.mark.parametrize(("family", "change", "message"), TEXT_REFUSALS)
def test_text_refusals(family: str, change: dict[str, Any], message: str, models: dict[str, VLM]) -> None:
    config = copy.deepcopy(models[family].config.get_text_config())
    for key, value in change.items():
        setattr(config, key, value)
    with pytest.raises(UnsupportedModelError, match=message):
        gguf_llama.text(config, ())


def test_a_bias_without_a_place_is_refused(models: dict[str, VLM]) -> None:
    config = models["internvl"].config.get_text_config()
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj\.bias would be lost"):
        gguf_llama.text(config, ("layers.0.mlp.up_proj.bias",))


VISION_REFUSALS = [
    ("idefics3", gguf_idefics3, {}, {"do_image_splitting": False}, "do_image_splitting is false"),
    ("idefics3", gguf_idefics3, {}, {"max_image_size": {"longest_edge": 64}}, "tiles are 64 pixels wide"),
    ("idefics3", gguf_idefics3, {}, {"size": {"height": 64, "width": 64}}, "scales pictures by a longest_edge"),
    ("idefics3", gguf_idefics3, {}, {"image_mean": None}, "image_mean of its image processor is None"),
    ("idefics3", gguf_idefics3, {}, {"rescale_factor": 1.0}, "rescales by 1.0"),
    ("idefics3", gguf_idefics3, {"vision_config.hidden_act": "gelu"}, {}, "hidden_act is 'gelu'"),
    ("llava", gguf_llava, {"vision_feature_select_strategy": "default"}, {}, "no class token to drop"),
    ("llava", gguf_llava, {"vision_feature_layer": [-2, -5]}, {}, r"vision_feature_layer is \[-2, -5\]"),
    ("llava", gguf_llava, {"projector_hidden_act": "relu"}, {}, "projector_hidden_act is 'relu'"),
    ("llava", gguf_llava, {"model_type": "llava_next"}, {}, "without image_newline"),
    ("llava", gguf_llava, {"vision_config.model_type": "dinov2"}, {}, "dinov2 encoder"),
    ("llava_clip", gguf_llava, {}, {}, "llama.cpp#25814"),
    ("pixtral", gguf_llava, {}, {"added_tokens": {}}, r"no \[IMG_BREAK\] token"),
    ("mistral3", gguf_pixtral, {"vision_config.hidden_act": "relu"}, {}, "hidden_act is 'relu'"),
    ("mistral3", gguf_pixtral, {"vision_config.rope_parameters": {"rope_theta": 5.0}}, {}, "rope_theta of the encoder"),
    ("internvl", gguf_internvl, {"vision_config.norm_type": "rms_norm"}, {}, "norm_type is 'rms_norm'"),
    ("internvl", gguf_internvl, {"vision_config.use_qk_norm": True}, {}, "use_qk_norm is set"),
    ("internvl", gguf_internvl, {"downsample_ratio": 0.7}, {}, "downsample_ratio 0.7"),
]


@pytest.mark.parametrize(("family", "module", "change", "settings", "message"), VISION_REFUSALS)
def test_vision_refusals(
    family: str, module: Any, change: dict[str, Any], settings: dict[str, Any], message: str, models: dict[str, VLM]
) -> None:
    vlm = models[family]
    config = copy.deepcopy(vlm.config)
    for path, value in change.items():
        *parents, key = path.split(".")
        owner = config
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, key, value)
    with pytest.raises(UnsupportedModelError, match=message):
        module.vision(config, {**preprocessor_config(vlm), **settings}, ())


@pytest.mark.parametrize("number", ["bicubic", 6, -1, 2.0, True])
def test_an_unknown_resampling_is_refused(number: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"own: resample of its image processor is {number!r}"):
        resampling_notes({"resample": number}, "own", "bicubic")


def test_another_resampling_is_told() -> None:
    assert resampling_notes({"resample": 3}, "own", "bicubic") == resampling_notes({}, "own", "bicubic") == ()
    assert "processor by lanczos" in resampling_notes({"resample": 1}, "own", "bicubic")[0]


def test_without_a_feature_layer_no_block_is_left_out(models: dict[str, VLM]) -> None:
    config = SimpleNamespace(model_type="own", vision_config=models["llava"].config.vision_config)
    assert unused_blocks(config, "layers.{i}") == {}


def test_a_projector_without_biases_gets_zeros(models: dict[str, VLM]) -> None:
    vlm = models["llava"]
    half = gguf_llava.vision(vlm.config, preprocessor_config(vlm), ())
    assert half.computed == {"mm.0.bias": [0.0] * 128, "mm.2.bias": [0.0] * 128}


def test_an_unknown_family_is_refused_by_name(models: dict[str, VLM]) -> None:
    vlm = models["llava"]
    config = copy.deepcopy(vlm.config)
    config.text_config.model_type = "florence"
    other = VLM(vlm.source, vlm.path, config, vlm.model, vlm.facts)
    with pytest.raises(UnsupportedModelError, match="florence: no GGUF form of this text model is known"):
        family_halves(other, (), ())


def test_llama4_is_refused_with_its_reason() -> None:
    for refuse in (gguf_text_module("llama4_text").text, lambda *a: gguf_vision_module("llama4").vision(*a, {})):
        with pytest.raises(UnsupportedModelError, match="column by column"):
            refuse(None, ())
