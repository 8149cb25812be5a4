"""A language model with learned relative positions (BLIP-2 with T5): exact in the standard form of attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from tests.verify.mutate import Stored
from tests.zoo.cross import blip2_t5_examples, make_blip2_t5
from tests.zoo.measure import ONNX_LIMIT, largest
from tests.zoo.models import HIDDEN
from tests.zoo.proof import FLOATS, Zooed, export
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx import encoder, standard_attention
from vlmexport.manifest import open_artifact
from vlmexport.model.load import load_vlm
from vlmexport.split.attention import refuse_changed_scores
from vlmexport.split.capture import split_model
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.difference import REPLAY_LIMIT
from vlmexport.split.parts import Role
from vlmexport.split.relative import find_relative

STANDARD = dataclasses.replace(FLOATS, attention="standard")
_EMBEDDING = "language_model.decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _parts(folder: Path, **settings: Any) -> Zooed:
    vlm = load_vlm(str(make_blip2_t5(folder, **settings)))
    examples = blip2_t5_examples(vlm)
    return Zooed(vlm, split_model(vlm, examples), examples)


@pytest.mark.slow
def test_t5_is_exact_in_the_standard_form_and_not_with_other_buckets(tmp_path: Path) -> None:
    """Tied and scaled logits, a plain FFN and the table of T5 itself; the row of the zoo is gated and untied."""
    settings = {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "num_decoder_layers": 2}
    scaled = {"tie_word_embeddings": True, "scale_decoder_outputs": True, "feed_forward_proj": "relu"}
    zooed = _parts(tmp_path / "model", **settings, **scaled)
    decoder = zooed.split.parts[Role.DECODER].module
    assert isinstance(decoder, DecoderPart) and decoder.relative is not None and decoder.logit_scale is not None
    assert decoder.logit_scale.factor == pytest.approx(HIDDEN**-0.5, rel=1e-5)
    assert (decoder.relative.far, decoder.relative.buckets.unique().tolist()) == (113, list(range(32)))
    assert zooed.split.replay_difference <= REPLAY_LIMIT
    with pytest.raises(UnsupportedModelError, match=r"^blip-2: its attention adds .* choose --attention standard$"):
        export(zooed, FLOATS, tmp_path / "gqa")
    artifact = export(zooed, STANDARD, tmp_path / "out")
    assert largest(zooed, artifact) <= ONNX_LIMIT
    kept = {tensor.name for tensor in artifact.manifest.unquantized if tensor.part == "decoder"}
    assert _EMBEDDING in kept
    with Stored(artifact.path / "decoder.onnx", "relative.buckets") as held:
        held[...] = np.roll(held, 1)
    assert largest(zooed, open_artifact(artifact.path, check_hashes=False)) > ONNX_LIMIT


class _Stack(nn.Module):
    """Attention of one layer with something added to its scores, called as transformers' stacks are."""

    def __init__(self, added: Callable[[torch.Tensor, nn.Embedding], torch.Tensor]) -> None:
        super().__init__()
        self.table, self.added = nn.Embedding(9, 2), added
        self.config = transformers.T5Config(d_model=4, num_heads=2)
        self.dtype = torch.float32

    def set_attn_implementation(self, name: str) -> None:
        self.config._attn_implementation = name

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> None:
        tokens = torch.arange(inputs_embeds.shape[1])
        summand = self.added(tokens[None] - tokens[:, None], self.table)
        query = torch.zeros(1, 2, len(tokens), 2)
        attend = transformers.AttentionInterface()[self.config._attn_implementation]
        attend(self, query, query, query, None, position_bias=summand)


def _near(distances: torch.Tensor, table: nn.Embedding) -> torch.Tensor:
    return table(distances.clamp(-4, 4) + 4).permute(2, 0, 1)[None]


def test_buckets_are_read_off_a_run() -> None:
    found = find_relative("t5", _Stack(_near))
    assert found is not None and found.buckets.tolist() == list(range(9))
    distances = torch.arange(30)[None] - torch.arange(20)[:, None]
    assert torch.equal(found.bias(20, 30), _near(distances, found.embedding))
    assert find_relative("t5", _Stack(lambda d, t: torch.zeros(1, 2, *d.shape))) is None


@pytest.mark.parametrize(
    "added",
    [
        lambda d, t: 2 * _near(d, t),  # not the embedding itself
        lambda d, t: t((d - d[:1]).abs() % 9).permute(2, 0, 1)[None],  # of the query's place, not of the distance
        lambda d, t: t(d.abs() % 9).permute(2, 0, 1)[None],  # no end of the buckets
    ],
)
def test_what_is_no_embedding_of_distances_is_refused(added: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^t5: the attention of _Stack adds something to its scores"):
        find_relative("t5", _Stack(added))


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
