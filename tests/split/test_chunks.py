"""Layers that see chunks of tokens, and layers that count tokens, are found by what they do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Llama4TextConfig, Llama4TextModel
from transformers.masking_utils import create_chunked_causal_mask

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.attention import attention_implementation, plain_attention
from vlmexport.split.chunks import find_chunks, refuse_chunks, seen_in_chunk
from vlmexport.split.counted import CountedRows, counted_modules, find_counted
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.masks import _look

HIDDEN, CHUNK = 32, 16


def text(**settings: Any) -> Llama4TextModel:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        hidden_size=HIDDEN, intermediate_size=24, intermediate_size_mlp=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, vocab_size=64, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
        interleave_moe_layer_step=4, attention_chunk_size=CHUNK, floor_scale=4, no_rope_layers=[1, 0, 1],
        attn_implementation="eager", **settings,
    )  # fmt: skip
    return Llama4TextModel(config).eval()


def chunks_of(decoder: Any) -> tuple[int, ...]:
    part = DecoderPart(decoder, nn.Linear(HIDDEN, 4))
    return find_chunks("odd", part, lambda *given: {layer: seen.mask for layer, seen in _look(*given).items()})


def test_the_chunk_of_each_layer_is_found_and_the_model_left_as_it_was() -> None:
    decoder = text()
    assert chunks_of(decoder) == (CHUNK, 0, CHUNK)
    assert decoder.config.attention_chunk_size == CHUNK
    decoder.config.layer_types = ["full_attention"] * 3
    assert chunks_of(decoder) == ()


def test_a_decoder_without_a_size_of_chunks_is_not_run() -> None:
    decoder = text()
    decoder.config.attention_chunk_size = None
    decoder.forward = None
    assert chunks_of(decoder) == ()


def test_masks_of_another_form_are_refused() -> None:
    odd = torch.zeros(1, 1, 8, 8)
    with pytest.raises(UnsupportedModelError, match=f"odd: layer 1 .* nor those of a chunk of {CHUNK}"):
        find_chunks("odd", DecoderPart(text(), nn.Linear(HIDDEN, 4)), lambda *_given: {0: None, 1: odd})


@pytest.mark.parametrize("padding", [0, 2, 5])
def test_what_is_seen_is_what_transformers_shows_behind_padding_on_the_left(padding: int) -> None:
    decoder = text()
    decoder.config.attention_chunk_size = 4
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[0, :padding] = 0
    embeds = torch.zeros(2, 11, HIDDEN)
    wanted = create_chunked_causal_mask(
        config=decoder.config, inputs_embeds=embeds, attention_mask=mask, past_key_values=None
    )
    seen = seen_in_chunk(mask, 11, 4)
    assert torch.equal(seen & mask.bool()[:, None, :, None], (wanted == 0) & mask.bool()[:, None, :, None])
    assert not torch.equal(seen_in_chunk(mask, 11, 5)[1], seen[1])


@pytest.mark.parametrize(
    ("chunks", "counted", "form", "reason"),
    [
        ((16, 0), (), "gqa", "see chunks of 16 tokens.*; use --attention standard"),
        ((16, 0), (), "static", "see chunks of 16 tokens.*--attention standard` writes it"),
        ((), (1,), "gqa", "compute with the number of tokens so far"),
    ],
)
def test_other_forms_of_attention_are_refused(
    chunks: tuple[int, ...], counted: tuple[int, ...], form: str, reason: str
) -> None:
    part: Any = SimpleNamespace(chunks=chunks, counted=counted)
    with pytest.raises(UnsupportedModelError, match=f"^odd: layers of its decoder {reason}"):
        refuse_chunks("odd", part, form)
    refuse_chunks("odd", part, "standard")
    refuse_chunks("odd", SimpleNamespace(chunks=(), counted=()), form)  # type: ignore[arg-type]


def test_layers_that_count_tokens_are_found() -> None:
    assert find_counted("odd", text(), 0, 1) == (1,)
    assert find_counted("odd", text(attn_temperature_tuning=False), 0, 1) == ()
    with pytest.raises(UnsupportedModelError, match=r"odd: layer 1 .* positions are not places in the text"):
        find_counted("odd", text(), 1, 1)


def test_rows_behind_other_numbers_of_tokens_are_what_each_row_gives_alone() -> None:
    decoder = text()
    rows = torch.randn(2, 3, HIDDEN, generator=torch.Generator().manual_seed(1))
    starts = (2, 40)
    counted = CountedRows(counted_modules(decoder, (1,)), torch.tensor(starts)[:, None] + torch.arange(3))
    module: Any = decoder.layers[1].self_attn

    def run(hidden: torch.Tensor, count: int = 0) -> torch.Tensor:
        cache = SimpleNamespace(get_seq_length=lambda *_a: count, update=lambda k, v, *_a: (k, v))
        return module(hidden, position_embeddings=None, attention_mask=None, past_key_values=cache)[0]

    with torch.no_grad(), attention_implementation(decoder, "odd_counted", counted.attending(plain_attention)):
        alone = torch.cat([run(row[None], start) for row, start in zip(rows, starts, strict=True)])
        with counted.counted():
            together = run(rows)
        same_places = run(rows, starts[0])
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
    assert (same_places - alone).abs().max() > 1e-3 * alone.abs().max()


def test_a_layer_that_also_turns_by_a_table_of_its_row_is_refused() -> None:
    """It counts tokens and rotates: rows in one would need the tables of all rows."""
    decoder = text()
    module: Any = decoder.layers[0].self_attn
    forward = module.forward

    def counting(hidden_states: torch.Tensor, **given: Any) -> Any:
        count = given["past_key_values"].get_seq_length(0)
        return forward(hidden_states * (1 + count), **given)

    module.forward = counting
    with pytest.raises(UnsupportedModelError, match=r"odd: layer 0 .* computes more with it"):
        find_counted("odd", decoder, 0, 1)
