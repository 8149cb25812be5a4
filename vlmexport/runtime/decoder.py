"""The decoder graph under ONNX Runtime: who owns the KV cache, what the mask says, how buffers are bound.

Two forms (docs/manifest.md; the third, ``static``, is in `static_decoder`). ``gqa``: one buffer per layer and kind,
longer than the valid tokens, bound as past *and* present, so a step writes in place. ``standard``: the graph returns a
longer cache every step, which is fed back.
A second graph with the same inputs and outputs may compute prompts, on the same buffers (``gqa`` only).
The class also runs other builders' decoder graphs with the same names, which is how they are compared fairly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.model.kv import KVGeometry, present_name
from vlmexport.model.per_token import PER_LAYER
from vlmexport.runtime.protocol import (
    BATCH_AXIS,
    Array,
    Cache,
    Extras,
    PartOutputError,
    next_shift,
    require_right_padding,
    token_axis,
)
from vlmexport.runtime.sessions import NUMPY_TYPES, checked, part_errors, require_outputs
from vlmexport.runtime.state_buffers import StateBuffers, empty_states

PART = "decoder"
# Tokens that a prompt graph computes at once: attention to a growing past skips what the causal mask would hide, and
# the numbers in between stay in the cache of a core. Measured in docs/decisions/0032.
CHUNK = 256
Mask: TypeAlias = NDArray[np.int64]


@dataclass
class SharedCache(Cache):
    """Buffers ``[batch, heads, capacity, head_dim]`` by layer and kind, bound once and written in place.

    `bindings` has one entry for each graph of the session. `states` are those of layers that keep no keys and values.
    """

    bindings: tuple[Any, ...]
    buffers: dict[str, ort.OrtValue]
    capacity: int
    states: StateBuffers = field(default_factory=lambda: StateBuffers((), 0, {}, "cpu"))

    def stored(self, layer: int, kind: Literal["key", "value"], start: int, stop: int) -> Array:
        """What the cache holds of positions `start` to `stop` (a copy): ``[batch, heads, stop - start, head_dim]``."""
        held: Array = self.buffers[f"past_key_values.{layer}.{kind}"].numpy()
        return held[:, :, start:stop].copy()


@dataclass
class GrowingCache(Cache):
    """The last ``present`` arrays by past name, and the mask of everything fed so far."""

    past: dict[str, Array] = field(default_factory=dict)
    mask: Mask = field(default_factory=lambda: np.zeros((0, 0), np.int64))


class DecoderSession:
    """One decoder graph and the bookkeeping of its caches.

    `session` may take ``inputs_embeds`` or ``input_ids``; ``num_logits_to_keep`` and the inputs of `BATCH_AXIS` are fed
    when the graph declares them. `device` is onnxruntime's device name of the KV buffers (``cpu`` or ``cuda``). When
    given, `prompt` computes every call of more than one token, `chunk` tokens at a time where there is no padding.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        kv: KVGeometry,
        attention: Literal["gqa", "standard"],
        device: str = "cpu",
        prompt: ort.InferenceSession | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.session = session
        self.sessions = (session,) if prompt is None else (session, prompt)
        self.chunk = chunk
        self.kv = kv
        self.attention = attention
        self.device = device
        self.input_types = {i.name: NUMPY_TYPES[i.type] for i in session.get_inputs()}
        self.sequence_input = "inputs_embeds" if "inputs_embeds" in self.input_types else "input_ids"
        self.extra_shapes = {i.name: list(i.shape) for i in session.get_inputs() if i.name in BATCH_AXIS}
        self.kept = kv.pasts()
        self.present_of = {past: present_name(past) for past in self.kept}
        self.fed_back = self.present_of | {state.past: state.present for state in kv.states}
        self._check_contract()
        self.kv_dtype = self.input_types[next(iter(self.kept))]
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        self.vocab_size, self.logits_dtype = static_width(logits), NUMPY_TYPES[logits.type]

    def _check_contract(self) -> None:
        needed = [self.sequence_input, "attention_mask", *self.fed_back]
        missing = [name for name in needed if name not in self.input_types]
        if missing:
            raise PartOutputError(PART, f"the graph has no input {missing[0]!r}; it has {list(self.input_types)[:4]}")
        for session in self.sessions:
            require_outputs(session, PART, ["logits", *self.fed_back.values()])
        if any({i.name for i in s.get_inputs()} != self.input_types.keys() for s in self.sessions):
            raise PartOutputError(PART, "the prompt graph has other inputs than the decode graph")
        if len(self.sessions) > 1 and self.attention != "gqa":
            raise PartOutputError(PART, "a prompt graph needs the gqa form, whose cache both graphs write in place")

    def prefill(
        self,
        sequence: Array,
        attention_mask: Mask,
        keep: int,
        reserve: int,
        extras: Extras | None = None,
        fixed: Mapping[str, Array] | None = None,
    ) -> tuple[Array, Cache]:
        """Start a batch; `sequence` is what the graph takes (embeddings or ids); see `Runner.prefill`.

        `fixed` is what the graph takes in every call of this batch.
        """
        batch, tokens = attention_mask.shape
        if self.attention == "gqa":
            require_right_padding(attention_mask)
            shared = self._new_cache(batch, tokens + reserve)
            shared.fixed.update(fixed or {})
            further = self._further(attention_mask, shared, extras)
            logits = self._run_shared(sequence, attention_mask, shared, keep, further)
            self._advance(shared, attention_mask, further)
            return logits, shared
        growing = GrowingCache(np.zeros(batch, np.int64), self._empty_past(batch), attention_mask[:, :0])
        growing.fixed.update(fixed or {})
        return self._run_growing(sequence, attention_mask, growing, keep, extras), growing

    def decode(self, sequence: Array, cache: Cache, keep: int, extras: Extras | None = None) -> Array:
        """Continue every row by ``sequence.shape[1]`` tokens; see `Runner.decode`."""
        batch, tokens = sequence.shape[:2]
        new = np.ones((batch, tokens), np.int64)
        if isinstance(cache, GrowingCache):
            return self._run_growing(sequence, new, cache, keep, extras)
        if not isinstance(cache, SharedCache):
            raise BadInputError(f"a {type(cache).__name__} is not a cache of this runner")
        if batch > 1 and tokens > 1:
            raise BadInputError(f"a batch of {batch} rows continues by one token at a time, not by {tokens}")
        lengths = cache.lengths + tokens
        total = int(lengths.max())
        if total > cache.capacity:
            self._grow(cache, max(total, 2 * cache.capacity))
        mask = (np.arange(total) < lengths[:, None]).astype(np.int64)
        further = self._further(new, cache, extras)
        logits = self._run_shared(sequence, mask, cache, keep, further)
        self._advance(cache, new, further)
        return logits

    def _further(self, new: Mask, cache: Cache, extras: Extras | None) -> dict[str, Array]:
        """What the graph takes beside embeddings and mask, for the tokens of `new` ``[batch, tokens]`` (0: padding).

        What `extras` does not give is that of text: positions that go on by one, and zeros.
        """
        given = dict(extras or {})
        if unknown := sorted(given.keys() - self.extra_shapes.keys()):
            raise BadInputError(f"the decoder graph takes no {unknown[0]}")
        for name, row in cache.repeated.items():
            given.setdefault(name, row.repeat(new.shape[1], axis=1))
        for name, shape in self.extra_shapes.items():
            if name in given:
                continue
            if name == PER_LAYER:
                raise BadInputError(
                    f"the decoder graph needs the {PER_LAYER} of every token; `Runner.per_layer` has them"
                )
            if name == "position_ids":
                counted = np.maximum(cache.lengths[:, None] + np.cumsum(new, axis=1) - 1, 0)
                given[name] = np.broadcast_to(counted + cache.position_shift[:, None], (*shape[:-2], *new.shape))
            else:
                axis = BATCH_AXIS[name]
                given[name] = np.zeros((*shape[:axis], *new.shape, *shape[axis + 2 :]), self.input_types[name])
        return given

    def _advance(self, cache: Cache, new: Mask, further: Mapping[str, Array]) -> None:
        cache.lengths = cache.lengths + new.sum(axis=1)
        if "position_ids" in further:
            cache.position_shift = next_shift(further["position_ids"], new, cache.lengths)

    def _new_cache(self, batch: int, capacity: int) -> SharedCache:
        bindings = tuple(session.io_binding() for session in self.sessions)
        states = StateBuffers(self.kv.states, batch, self.input_types, self.device)
        cache = SharedCache(np.zeros(batch, np.int64), bindings, {}, capacity, states)
        for past, kept in self.kept.items():
            shape = (batch, kept.heads, capacity, kept.head_dim)
            self._bind(cache, past, self._value(np.zeros(shape, self.kv_dtype)))
        return cache

    def _bind(self, cache: SharedCache, past: str, buffer: ort.OrtValue) -> None:
        cache.buffers[past] = buffer
        for binding in cache.bindings:
            binding.bind_ortvalue_input(past, buffer)
            binding.bind_ortvalue_output(self.present_of[past], buffer)

    def _grow(self, cache: SharedCache, capacity: int) -> None:
        for past, buffer in list(cache.buffers.items()):
            old = buffer.numpy()
            new = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            new[:, :, : cache.capacity] = old
            self._bind(cache, past, self._value(new))
        cache.capacity = capacity

    def _value(self, array: Array) -> ort.OrtValue:
        """The array as an OrtValue where the cache lives; on the CPU it is the array's own memory."""
        return ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)

    def _inputs(self, sequence: Array, mask: Mask, further: Mapping[str, Array], keep: int) -> dict[str, Array]:
        given: dict[str, Array] = {
            self.sequence_input: sequence,
            "attention_mask": mask,
            "num_logits_to_keep": np.array(keep, np.int64),
            **further,
        }
        types = self.input_types
        # asarray and not ascontiguousarray: the latter makes a scalar one-dimensional
        return {n: np.asarray(a, dtype=types[n], order="C") for n, a in given.items() if n in types}

    def _run_shared(
        self, sequence: Array, mask: Mask, cache: SharedCache, keep: int, further: Mapping[str, Array]
    ) -> Array:
        graph = len(self.sessions) - 1 if sequence.shape[1] > 1 else 0
        rows = []
        whole = "block_ids" in further and bool(further["block_ids"].any())  # a block is never cut
        for chunk, end, kept in self._chunks(0 if whole else graph, mask, sequence.shape[1], keep):
            tokens = np.arange(chunk.start, chunk.stop)
            part = {n: a.take(tokens, axis=token_axis(n, a)) for n, a in further.items()}
            feed = self._inputs(sequence[:, chunk], mask[:, :end], {**part, **cache.fixed}, kept)
            rows.append(self._run_bound(graph, feed, cache, kept))
        return self._finished(rows[-1] if keep else np.concatenate(rows, axis=1), mask, keep)

    def _chunks(self, graph: int, mask: Mask, tokens: int, keep: int) -> Iterator[tuple[slice, int, int]]:
        """Slices of the new tokens that run one after the other, where the mask ends for each, and the logits it keeps.

        GroupQueryAttention takes several tokens with a past in a batch of one only. A caller that keeps the last few
        logits gets them from the last slice, so that one must be long enough.
        """
        before = mask.shape[1] - tokens
        count = -(-tokens // self.chunk) if graph and len(mask) == 1 and mask.all() and keep <= 1 else 1
        edges = [tokens * i // count for i in range(count + 1)]
        for start, stop in pairwise(edges):
            yield slice(start, stop), before + stop, keep

    def _run_bound(self, graph: int, feed: dict[str, Array], cache: SharedCache, keep: int) -> Array:
        """One run of one graph on the cache's buffers: its logits as it returns them."""
        binding, sequence = cache.bindings[graph], feed[self.sequence_input]
        logits = np.empty((sequence.shape[0], self._kept(sequence, keep), self.vocab_size), self.logits_dtype)
        with part_errors(PART, "does not run"):
            for name, array in feed.items():
                binding.bind_cpu_input(name, array)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
            cache.states.bind(binding)
            self.sessions[graph].run_with_iobinding(binding)
        cache.states.advance()
        return logits

    def _run_growing(
        self, sequence: Array, new: Mask, cache: GrowingCache, keep: int, extras: Extras | None = None
    ) -> Array:
        whole = np.concatenate([cache.mask, new], axis=1)
        further = self._further(new, cache, extras)
        feed = self._inputs(sequence, whole, {**further, **cache.fixed}, keep) | cache.past
        with part_errors(PART, "does not run"):
            logits, *present = self.session.run(["logits", *self.fed_back.values()], feed)
        cache.past = dict(zip(self.fed_back, present, strict=True))
        cache.mask = whole
        self._advance(cache, new, further)
        shape = (sequence.shape[0], self._kept(sequence, keep), self.vocab_size)
        return self._finished(checked(PART, "logits", logits, shape), new, keep)

    def _kept(self, sequence: Array, keep: int) -> int:
        tokens = int(sequence.shape[1])
        return min(keep, tokens) if keep and "num_logits_to_keep" in self.input_types else tokens

    def _finished(self, logits: Array, mask: Mask, keep: int) -> Array:
        """Float32 logits of the kept positions; graphs that always return all positions are cut here."""
        if keep and logits.shape[1] > keep:
            last = np.minimum(mask.sum(axis=1), logits.shape[1])
            rows = last[:, None] + np.arange(-keep, 0)
            logits = np.take_along_axis(logits, np.maximum(rows, 0)[:, :, None], axis=1)
        return checked(PART, "logits", logits.astype(np.float32, copy=False))

    def _empty_past(self, batch: int) -> dict[str, Array]:
        shapes = {past: (batch, kept.heads, 0, kept.head_dim) for past, kept in self.kept.items()}
        empty: dict[str, Array] = {past: np.zeros(shape, self.kv_dtype) for past, shape in shapes.items()}
        return empty | empty_states(self.kv.states, batch, self.input_types)


def static_width(logits: Any) -> int:
    """The vocabulary size, which the graph's output `logits` must have fixed; else `PartOutputError`."""
    width = logits.shape[-1] if logits.shape else None
    if not isinstance(width, int):
        raise PartOutputError(PART, f"logits have shape {logits.shape}; the last dimension must be the vocabulary size")
    return width
