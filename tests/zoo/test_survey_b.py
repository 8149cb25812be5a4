"""What `tests/zoo/survey_b.py` is for: each new form by itself, what makes it fail, and refusals in words.

Every family of that module is proven on every target, or its refusal told, by test_support.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.kimi_k25.modeling_kimi_k25 import get_vision_frame_index, get_vision_temporal_merge_index
from transformers.models.muse_glimmer.modeling_muse_glimmer import get_vision_pixel_shuffle_index
from transformers.models.nemotron_h_omni import configuration_nemotron_h_omni, modeling_nemotron_h_omni

from tests.zoo import registry
from tests.zoo.models import VOCAB
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx import embedding, neutral
from vlmexport.lower.onnx.wide_heads import wide_attention
from vlmexport.model.kv import LayerKV
from vlmexport.model.load import load_vlm
from vlmexport.split import expanded, packed
from vlmexport.split.attention import plain_attention
from vlmexport.split.capture import split_model
from vlmexport.split.decoder import DecoderCall, DecoderPart, find_capped_scale
from vlmexport.split.expanded import expanded_kv, refuse_more
from vlmexport.split.kept_rows import KeptRows, find_kept_rows
from vlmexport.split.logits import LogitScale

_SPARSE = "such sparse attention is not supported yet$"
REFUSED: dict[str, str] = {
    "minimax_m3_vl": rf"layer 1 \(minimax_m3_sparse\) of the decoder keeps idx_keys beside .*{_SPARSE}",
    "mistral_large4": rf"layer 0 \(indexed_attention\) of the decoder keeps indexer_keys beside .*{_SPARSE}",
    "glm5_next": rf"layer 1 \(indexed_attention\) of the decoder keeps indexer_keys beside .*{_SPARSE}",
    "step3p7": r"no module computes the image features that get_image_features returns \(they are packed or changed",
    "fuyu": "get_image_features gives hidden states of the text's own width and no features; such models are not",
}
_CASES = [pytest.param(name, marks=() if name == "minimax_m3_vl" else pytest.mark.family) for name in REFUSED]


@pytest.mark.slow
@pytest.mark.parametrize("family", _CASES)
def test_what_has_no_form_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    vlm, examples = registry.make(family, tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"^{family}: {REFUSED[family]}"):
        split_model(vlm, examples)


def test_a_cache_that_holds_more_than_keys_and_values_is_refused() -> None:
    layer = SimpleNamespace(keys=torch.zeros(1, 2, 3, 4), values=torch.zeros(1, 2, 3, 4), seen=torch.zeros(1))
    refuse_more("mine: layer 0", layer)
    layer.chosen = torch.zeros(1, 3, 4)
    with pytest.raises(UnsupportedModelError, match=r"^mine: layer 0 of the decoder keeps chosen beside keys and"):
        refuse_more("mine: layer 0", layer)


def _latents(v_head_dim: int) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "q_lora_rank": 16,
             "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1,
             "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "vocab_size": VOCAB,
             "pad_token_id": 0}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.DeepseekV3Config(**sizes, v_head_dim=v_head_dim, head_dim=8, rope_parameters=rope)
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    return SimpleNamespace(model=model, facts=SimpleNamespace(hidden_size=32, model_type="latents"))


def test_layers_that_keep_latents_keep_their_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = _latents(24)
    assert expanded_kv(vlm) == dict.fromkeys(range(2), LayerKV(2, 24))
    attended = expanded._attended

    def changing(decoder: Any, embeds: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Layer 1 has other keys when more tokens follow."""
        found = attended(decoder, embeds)
        return found | {1: (found[1][0] * embeds.shape[1], found[1][1])}

    monkeypatch.setattr(expanded, "_attended", changing)
    assert expanded_kv(vlm) == {0: LayerKV(2, 24)}


@pytest.mark.parametrize(("of_keys", "of_values"), [(16, 24), (24, 16), (16, 16)])
def test_heads_of_different_sizes_are_one_attention(
    of_keys: int, of_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 5, of_keys, generator=generator) for _ in range(2))
    value = torch.randn(1, 2, 5, of_values, generator=generator)
    module = nn.Module()
    module.is_causal = True
    wanted = plain_attention(module, query, key, value, None, scaling=0.3)[0]

    def attention(*given: Any, scale: float) -> torch.Tensor:
        query, key, value, _layer = given
        assert query.shape == key.shape == value.shape
        made: torch.Tensor = plain_attention(module, query, key, value, None, scaling=scale)[0]
        return made

    monkeypatch.setattr(neutral, "attention", attention)
    got = wide_attention(query, key, value, 0, {"scale": 0.3})
    torch.testing.assert_close(got, wanted)


def test_logits_that_are_scaled_and_then_capped() -> None:
    head = nn.Linear(8, 40, bias=False)
    config = SimpleNamespace(final_logit_softcapping=5.0, output_multiplier=0.25)
    config.get_text_config, config.to_dict = lambda: config, lambda: {"output_multiplier": 0.25}

    class Decoder(nn.Module):
        def forward(self, inputs_embeds: torch.Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=inputs_embeds)

    decoder = Decoder()
    decoder.config = config
    part = DecoderPart(decoder, head)
    embeds = 8 * torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = 5 * torch.tanh(0.25 * head(embeds) / 5)
        found = find_capped_scale(part, DecoderCall({"inputs_embeds": embeds}, wanted))
        assert found == (LogitScale(0.25), 20.0)
        part.logit_scale, part.logit_cap = found
        torch.testing.assert_close(part.logits(embeds), wanted)
        assert find_capped_scale(part, DecoderCall({"inputs_embeds": embeds}, wanted.roll(1, -1))) is None


def test_rows_of_padding_are_found_by_their_places() -> None:
    places = torch.tensor([[[0, 0], [1, 0], [-1, -1]], [[0, 0], [-1, -1], [-1, -1]]])
    made = torch.arange(12.0).reshape(2, 3, 2)
    example, rows = {"pixel_values": torch.zeros(2, 3, 9), "places": places}, made.flatten(0, 1)[[0, 1, 3]]
    assert find_kept_rows([example], [made], [rows]) == KeptRows("places")
    assert find_kept_rows([example], [made], [made.flatten(0, 1)]) is None
    assert find_kept_rows([example], [made], [rows.flip(0)]) is None


def test_helpers_of_towers_of_their_own_are_as_the_models() -> None:
    grid = torch.tensor([[1, 4, 6], [1, 2, 8], [1, 6, 2]])
    ours = packed._Packed()
    ours.patches = int(grid.prod(dim=1).sum())
    assert torch.equal(ours.get_vision_frame_index(grid), get_vision_frame_index(grid))
    assert torch.equal(ours.get_vision_pixel_shuffle_index(grid, 2), get_vision_pixel_shuffle_index(grid, 2))
    merged = get_vision_temporal_merge_index(grid, 2, 2)
    assert torch.equal(ours.get_vision_temporal_merge_index(grid, 2, 2), merged)
    one = torch.tensor([[1, 2, 3]])
    assert ours.get_vision_position_ids(one, 1).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_rows_of_a_table_are_mixed_as_pytorch_does() -> None:
    generator = torch.Generator().manual_seed(0)
    table, weights = torch.randn(9, 4, generator=generator), torch.randn(5, 3, generator=generator)
    indices = torch.randint(0, 9, (5, 3), generator=generator)
    wanted = nn.functional.embedding_bag(indices, table, per_sample_weights=weights, mode="sum")
    torch.testing.assert_close(packed._mixed_rows(indices, table, per_sample_weights=weights, mode="sum"), wanted)
    with pytest.raises(UnsupportedModelError, match="mixes rows of a table in a way that is not supported yet"):
        packed._mixed_rows(indices, table, mode="mean")


class _Normed(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(super().forward(input), dim=-1)


class _Mixed(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).cumsum(dim=1)


def test_a_table_has_what_the_embedding_gives_for_each_token() -> None:
    module = _Normed(70, 8)
    table = module.weight.detach()
    assert embedding._lookup_scale(module, table) is None
    rows = embedding._looked_up_before(module, table)()
    torch.testing.assert_close(rows, nn.functional.normalize(table, dim=-1))
    mixed = _Mixed(70, 8)
    with pytest.raises(UnsupportedModelError, match="depends on the tokens beside it"):
        embedding._looked_up_before(mixed, mixed.weight.detach())


_TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_TOWER: dict[str, Any] = {**_TINY, "image_size": 32, "patch_size": 16}


def _kosmos2_5() -> Any:
    text = {"vocab_size": VOCAB, "embed_dim": 32, "layers": 1, "ffn_dim": 48, "attention_heads": 2}
    vision = {**_TINY, "patch_embed_hidden_size": 48, "head_dim": 16, "max_num_patches": 16}
    config = transformers.Kosmos2_5Config(text_config=text, vision_config=vision, latent_query_num=4)
    return transformers.Kosmos2_5ForConditionalGeneration(config)


def _pp_formulanet() -> Any:
    text = {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "decoder_layers": 1,
            "decoder_ffn_dim": 48, "decoder_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    vision = {**_TOWER, "output_channels": 16, "global_attn_indexes": [0], "mlp_dim": 48, "post_conv_in_channels": 16,
              "post_conv_mid_channels": 16, "post_conv_out_channels": 32, "decoder_hidden_size": 32}  # fmt: skip
    del vision["intermediate_size"]
    config = transformers.PPFormulaNetConfig(text_config=text, vision_config=vision)
    return transformers.PPFormulaNetForConditionalGeneration(config)


def _nemotron_h_omni() -> Any:
    text = {"model_type": "nemotron_h", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCAB,
            "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 2, "mamba_head_dim": 16,
            "ssm_state_size": 8, "n_groups": 1,
            "chunk_size": 8}  # fmt: skip
    vision = {"model_type": "radio", **_TOWER, "max_img_size": 32, "num_cls_tokens": 1, "num_registers": 1,
              "video_temporal_patch_size": 2}  # fmt: skip
    del vision["intermediate_size"]
    config = configuration_nemotron_h_omni.NemotronH_Omni_Reasoning_V3_Config(
        text_config=text, vision_config=vision, projector_hidden_size=32, vision_hidden_size=32, image_token_id=2,
        video_token_id=3,
    )  # fmt: skip
    return modeling_nemotron_h_omni.NemotronH_Omni_Reasoning_V3(config)


def _phi4_multimodal() -> Any:
    vision = {**_TOWER, "image_token_id": 2, "crop_size": 32}
    audio = {**_TINY, "num_blocks": 1, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32,
             "input_size": 16, "nemo_conv_channels": 16, "audio_token_id": 3}  # fmt: skip
    del audio["num_hidden_layers"]
    config = transformers.Phi4MultimodalConfig(
        **_TINY, num_key_value_heads=1, vocab_size=VOCAB, vision_config=vision, audio_config=audio, pad_token_id=0,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.Phi4MultimodalForCausalLM(config)


_NO_PLACE = "the config has no image token id, so features have no place$"
NOT_LOADED: dict[str, tuple[Callable[[], Any], str]] = {
    "kosmos-2.5": (_kosmos2_5, f"^kosmos-2.5: {_NO_PLACE}"),
    "pp_formulanet": (_pp_formulanet, f"^pp_formulanet: {_NO_PLACE}"),
    "nemotron_h_omni": (
        _nemotron_h_omni,
        "nemotron_h_omni: its LM head is inside language_model, and not given by the",
    ),
    "phi4_multimodal": (
        _phi4_multimodal,
        ": transformers has 'phi4_multimodal' in no class of models that take pictures",
    ),
}


@pytest.mark.parametrize("family", NOT_LOADED)
def test_families_of_another_form_are_refused_when_they_are_loaded(family: str, tmp_path: Path) -> None:
    build, reason = NOT_LOADED[family]
    build().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        load_vlm(str(tmp_path))
