"""What `tests/zoo/more.py` is for: LLaVA with any text model, in the fast form of attention, and clear refusals.

Every family of that module is proven on every target by test_support; here is which form each gets, and why others get
none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.zoo.models import HIDDEN, VOCAB, _opt, _qformer, _vision
from tests.zoo.more import ENTRIES
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.rotary import Rotary, RotaryInTrace, RotaryOperator, find_rotary
from vlmexport.model.load import load_vlm
from vlmexport.split.decoder import text_decoder
from vlmexport.split.layers import find_layers

# Rotation by tables inside attention, or by an operator in front of it: of a part of each head, or by tables that
# differ from layer to layer (Gemma 3 turns by another base in its windows).
FORMS: dict[str, type] = {
    **{
        f"llava_{text}": Rotary for text in ("mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "olmo2", "cohere2")
    },
    "llava_granite": Rotary,
    "llava_phi": RotaryOperator,
    "llava_stablelm": RotaryOperator,
    "llava_glm4": RotaryOperator,
    "llava_gemma3": RotaryOperator,
}


# One of each is in `make test`: whole heads, a part of each, tables of their own for layers with windows.
_ONE_OF_EACH = ("llava_mistral", "llava_phi", "llava_gemma3")
_FORMS = [pytest.param(family, marks=() if family in _ONE_OF_EACH else pytest.mark.family) for family in FORMS]


@pytest.mark.slow
@pytest.mark.parametrize("family", _FORMS)
def test_the_form_of_rotation_of_each_text_model(family: str, tmp_path: Path) -> None:
    decoder = text_decoder(load_vlm(str(ENTRIES[family].make(tmp_path))).model)
    assert isinstance(find_rotary(decoder, list(find_layers(decoder)[1]), 1), FORMS[family])


def test_positions_that_are_added_stay_in_the_trace() -> None:
    decoder = transformers.OPTModel(
        transformers.OPTConfig(
            hidden_size=HIDDEN, ffn_dim=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=VOCAB,
            max_position_embeddings=64, word_embed_proj_dim=HIDDEN,
        )
    ).decoder  # fmt: skip
    assert isinstance(find_rotary(decoder, list(find_layers(decoder)[1]), 1), RotaryInTrace)


def _blip() -> Any:
    text = {**_TINY, "encoder_hidden_size": 32, "bos_token_id": 0, "sep_token_id": 1}
    config = transformers.BlipConfig(text_config=text, vision_config=_TOWER, projection_dim=32)
    return transformers.BlipForConditionalGeneration(config)


def _git() -> Any:
    return transformers.GitForCausalLM(transformers.GitConfig(vision_config=_TOWER, **_TINY))


def _pix2struct() -> Any:
    sizes = {"hidden_size": 32, "d_kv": 16, "d_ff": 48}
    text = {**sizes, "vocab_size": VOCAB, "num_layers": 1, "num_heads": 2}
    vision = {**sizes, "patch_embed_hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "seq_len": 16}
    config = transformers.Pix2StructConfig(text_config=text, vision_config=vision)
    return transformers.Pix2StructForConditionalGeneration(config)


def _idefics() -> Any:
    perceiver = {"resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16, "resampler_n_latents": 4}
    tower = {**_TOWER, "embed_dim": 32}
    text = {name: value for name, value in _TINY.items() if name != "max_position_embeddings"}
    config = transformers.IdeficsConfig(
        **text, additional_vocab_size=0, cross_layer_interval=1, vision_config=tower, perceiver_config=perceiver
    )
    return transformers.IdeficsForVisionText2Text(config)


def _udop() -> Any:
    config = transformers.UdopConfig(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, image_size=32, patch_size=16
    )
    return transformers.UdopForConditionalGeneration(config)


def _vision_encoder_decoder() -> Any:
    text = transformers.GPT2Config(
        n_embd=32, n_head=2, n_layer=1, vocab_size=VOCAB, is_decoder=True, add_cross_attention=True
    )
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(transformers.ViTConfig(**_TOWER), text)
    return transformers.VisionEncoderDecoderModel(both)


def _instructblipvideo() -> Any:
    config = transformers.InstructBlipVideoConfig(
        text_config=_opt(), vision_config=_vision("instructblipvideo_vision_model"), qformer_config=_qformer(),
        num_query_tokens=4, video_token_index=2,
    )  # fmt: skip
    return transformers.InstructBlipVideoForConditionalGeneration(config)


_TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "vocab_size": VOCAB, "max_position_embeddings": 64}  # fmt: skip
_TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                          "image_size": 32, "patch_size": 16}  # fmt: skip
_NO_PLACE = "the config has no image token id, so features have no place"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "blip": (
        _blip,
        "its LM head is inside text_decoder, and not given by the model itself; such models are not supported yet",
    ),
    "git": (_git, _NO_PLACE),
    "pix2struct": (_pix2struct, _NO_PLACE),
    "idefics": (_idefics, _NO_PLACE),
    "udop": (_udop, _NO_PLACE),
    "vision-encoder-decoder": (_vision_encoder_decoder, _NO_PLACE),
    "instructblipvideo": (_instructblipvideo, _NO_PLACE),
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_of_another_form_are_refused_in_one_line(family: str, tmp_path: Path) -> None:
    build, reason = REFUSED[family]
    build().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"^{family}: {reason}$"):
        load_vlm(str(tmp_path))
