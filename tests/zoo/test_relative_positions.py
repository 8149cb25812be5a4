"""A language model with learned relative positions (BLIP-2 with T5): it splits, and is refused where it is lowered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.zoo.cross import _SPECIAL, _prompts
from tests.zoo.models import HIDDEN, IMAGE, VOCAB, _noise, _qformer, _vision
from tests.zoo.proof import FLOATS, Zooed, export
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx import encoder, standard_attention
from vlmexport.lower.onnx.trace import trace_decoder
from vlmexport.model.load import load_vlm
from vlmexport.split.attention import refuse_changed_scores
from vlmexport.split.capture import split_model
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.parts import Role

_REFUSED = r"^T5Attention: its attention has learned relative positions added to its scores \(position_bias\)"


def _make_blip2_t5(folder: Path) -> Path:
    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
    text = {
        "model_type": "t5", "d_model": HIDDEN, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "vocab_size": VOCAB, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    config = transformers.Blip2Config(
        text_config=text, vision_config=_vision("blip_2_vision_model"), qformer_config=_qformer(), num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )  # fmt: skip
    return save_tiny(transformers.Blip2ForConditionalGeneration(config), tokenizer, dict(STATISTICS), folder, "", 0)


@pytest.mark.slow
def test_t5_is_refused_where_its_relative_positions_would_be_left_out(tmp_path: Path) -> None:
    vlm = load_vlm(str(_make_blip2_t5(tmp_path / "model")))
    examples = _prompts(vlm, tuple({"pixel_values": _noise(n, 3, 32, 32, seed=n)} for n in (2, 1, 3)))
    split = split_model(vlm, examples)
    decoder = split.parts[Role.DECODER].module
    assert isinstance(decoder, DecoderPart)
    with pytest.raises(UnsupportedModelError, match=_REFUSED) as decoding:
        trace_decoder(vlm.model, decoder, fuse_rotary=False)
    with pytest.raises(UnsupportedModelError, match=_REFUSED) as exporting:
        export(Zooed(vlm, split, examples), FLOATS, tmp_path / "out")
    assert all("\n" not in str(found.value) for found in (decoding, exporting))


@pytest.mark.parametrize(
    ("name", "value"), [("position_bias", torch.zeros(1)), ("s_aux", torch.zeros(2)), ("softcap", 30.0)]
)
def test_no_operator_of_an_encoder_leaves_out_what_changes_its_scores(name: str, value: Any) -> None:
    rows = torch.zeros(1, 2, 3, 4)
    settings = {name: value}
    with pytest.raises(UnsupportedModelError, match=rf"^Identity: its attention has .* \({name}\)"):
        encoder._attend(nn.Identity(), rows, rows, rows, None, **settings)
    with pytest.raises(UnsupportedModelError, match=rf"^Identity: its attention has .* \({name}\)"):
        standard_attention._attend(nn.Identity(), "tower", rows, rows, rows, None, **settings)


def test_what_an_operator_says_and_what_is_none_is_not_refused() -> None:
    refuse_changed_scores(nn.Identity(), {"softcap": 30.0, "position_bias": None}, written=frozenset({"softcap"}))
    with pytest.raises(UnsupportedModelError, match="attention sinks"):
        refuse_changed_scores(nn.Identity(), {"softcap": 30.0, "s_aux": 1.0}, written=frozenset({"softcap"}))
