"""Chunked attention and complex rotary embeddings in the words of a graph, run in ONNX Runtime."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_ir.tape import Tape

from tests.lower.onnx.test_dialects import DIM, HEADS, HIDDEN, KV, emitter, session, typed
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.complex_numbers import Pairs, real_pairs
from vlmexport.lower.onnx.dialect import AttentionCall
from vlmexport.lower.onnx.dialects.standard import StandardDialect
from vlmexport.split.chunks import seen_in_chunk

CHUNK = 4
FLOAT = ir.DataType.FLOAT
# Padding on the left, none, and between a prompt and what was written behind it.
MASKS = ([0, 0, 0, *[1] * 10], [1] * 13, [*[1] * 6, 0, 0, *[1] * 5])


@pytest.mark.parametrize("past", [0, 9])
def test_tokens_see_their_own_chunk_wherever_padding_lies(past: int) -> None:
    mask = torch.tensor(MASKS)
    total = mask.shape[1]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(mask), HEADS, total - past, DIM, generator=generator)
    k, v = (torch.randn(len(mask), KV, total, DIM, generator=generator) for _ in range(2))
    got = _run(q, k, v, past, mask, CHUNK)
    wanted, others = (_expected(q, k, v, seen_in_chunk(mask, total - past, size)) for size in (CHUNK, CHUNK + 1))
    real = mask[:, past:].bool()  # what padding sees is nobody's
    scale = wanted[real].abs().max()
    assert (got - wanted)[real].abs().max() <= 1e-5 * scale
    assert (got - others)[real].abs().max() > 1e-2 * scale
    assert (_run(q, k, v, past, mask, 0) - wanted)[real].abs().max() > 1e-2 * scale


def test_layers_with_chunks_and_without_share_one_graph() -> None:
    """The masks are made once for each size, under names of their own."""
    tape, dialect = Tape(), StandardDialect(23)
    call = _call(tape, dialect)
    masks = [dialect._mask(tape, -1, chunk) for chunk in (0, CHUNK, 0, CHUNK, 8)]
    assert masks[0] is masks[2]
    assert masks[1] is masks[3]
    assert len(set(masks)) == 3
    assert call.chunk == 0


def test_pairs_are_the_complex_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    angle = torch.randn(2, 5, 4, generator=generator)
    x = torch.randn(2, 5, 3, 8, generator=generator)

    def turned() -> torch.Tensor:
        table = torch.polar(torch.ones_like(angle), angle) * 0.5
        numbers = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * table[:, :, None, :].to(x.device)).flatten(3)

    wanted, before = turned(), torch.polar
    with real_pairs():
        got = turned()
        assert torch.equal(torch.view_as_real(torch.complex(angle, angle)), torch.stack((angle, angle), -1))
    assert torch.polar is before
    assert (got - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_pairs_have_places_and_shapes_and_no_other_functions() -> None:
    numbers = torch.randn(3, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    pairs = Pairs(torch.view_as_real(numbers))
    assert pairs.shape == numbers.shape
    assert torch.equal(pairs[..., :2].pair, torch.view_as_real(numbers[..., :2]))
    assert torch.equal((2.0 * pairs[1]).pair, torch.view_as_real(2.0 * numbers[1]))
    with pytest.raises(UnsupportedModelError, match="computes conj of complex numbers"):
        pairs.conj()


def _call(tape: Tape, dialect: StandardDialect) -> AttentionCall:
    heads = {"q": HEADS, "k": KV, "v": KV}
    qkv = {n: typed(n, FLOAT, ["batch_size", h, "sequence_length", DIM]) for n, h in heads.items()}
    past = {n: typed(n, FLOAT, ["batch_size", KV, "past_sequence_length", DIM]) for n in ("past_key", "past_value")}
    shared = {
        "inputs_embeds": typed("inputs_embeds", FLOAT, ["batch_size", "sequence_length", HIDDEN]),
        "attention_mask": typed("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"]),
    }
    dialect.prologue(tape, shared, past["past_key"])
    return AttentionCall(*qkv.values(), None, HEADS, KV, DIM, DIM**-0.5, 0.0, -1, *past.values())


def _run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int, mask: torch.Tensor, chunk: int) -> torch.Tensor:
    """Attention ``[B, S, N * D]`` of the dialect's graph."""
    tape, dialect = Tape(), StandardDialect(23)
    call = dataclasses.replace(_call(tape, dialect), chunk=chunk)
    out = dialect.attention(tape, call)
    given = [call.query, call.key, call.value, call.past_key, call.past_value]
    inputs = [*given, typed("attention_mask", ir.DataType.INT64, ["batch_size", "total_sequence_length"])]
    graph_mask = next(v for node in tape.nodes for v in node.inputs if v is not None and v.name == "attention_mask")
    inputs[-1] = graph_mask
    graph: Any = session(tape, inputs, [out.output], emitter(FLOAT), 23)
    feed = {"q": q, "k": k[:, :, past:], "v": v[:, :, past:], "past_key": k[:, :, :past], "past_value": v[:, :, :past]}
    arrays = {n: np.ascontiguousarray(t.numpy()) for n, t in {**feed, "attention_mask": mask}.items()}
    return torch.from_numpy(graph.run(["out0"], arrays)[0])


def _expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    k, v = (t.repeat_interleave(HEADS // KV, dim=1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
