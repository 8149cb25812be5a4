"""The ``static`` decoder graph under ONNX Runtime (docs/manifest.md, layout ``tensorrt``): a cache of fixed length.

Past and present of a layer are bound to one buffer, into which the graph scatters the new keys and values, as TensorRT
demands it. There is no mask: what a token sees follows from the slot it is written to.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from vlmexport.errors import BadInputError
from vlmexport.model.kv import KVGeometry
from vlmexport.runtime.decoder import PART, Mask, SharedCache, static_width
from vlmexport.runtime.protocol import Array, Cache, Extras, PartOutputError, require_no_extras, require_right_padding
from vlmexport.runtime.sessions import NUMPY_TYPES, checked, part_errors, require_outputs
from vlmexport.runtime.static_cache import Ids, positions_to_keep, require_room

_SLOTS = 2  # axis of a cache ``[batch, heads, slots, head_dim]``


class StaticDecoder:
    """One decoder graph with a static cache; the same calls as `DecoderSession`.

    `capacity` is the number of tokens that the graph's cache holds. `device` is onnxruntime's device name of the
    buffers (``cpu`` or ``cuda``). Raises `PartOutputError` when the graph is not of this form.
    """

    def __init__(self, session: ort.InferenceSession, kv: KVGeometry, device: str = "cpu") -> None:
        self.session = session
        self.kv = kv
        self.device = device
        inputs = {i.name: i for i in session.get_inputs()}
        pairs = [(f"past_key_values.{i}.{k}", f"present.{i}.{k}") for i in range(kv.layers) for k in ("key", "value")]
        self.present_of = dict(pairs)
        for name in ("inputs_embeds", "write_indices", "logits_positions", *self.present_of):
            if name not in inputs:
                raise PartOutputError(PART, f"the graph has no input {name!r}; it has {list(inputs)[:4]}")
        require_outputs(session, PART, ["logits", *self.present_of.values()])
        first = inputs[pairs[0][0]]
        if len(first.shape) <= _SLOTS or not isinstance(first.shape[_SLOTS], int):
            raise PartOutputError(PART, f"{first.name} has shape {first.shape}; a static cache has a fixed length")
        self.capacity: int = first.shape[_SLOTS]
        self.kv_dtype = NUMPY_TYPES[first.type]
        self.sequence_dtype = NUMPY_TYPES[inputs["inputs_embeds"].type]
        logits = next(o for o in session.get_outputs() if o.name == "logits")
        self.vocab_size, self.logits_dtype = static_width(logits), NUMPY_TYPES[logits.type]

    def prefill(
        self, sequence: Array, attention_mask: Mask, keep: int, reserve: int, extras: Extras | None = None
    ) -> tuple[Array, Cache]:
        """Start a batch; see `Runner.prefill`. `reserve` changes nothing: the cache has the length that it has.

        Raises `BadInputError` when the prompt is longer than the cache.
        """
        require_no_extras(extras, "a decoder with a static cache")
        require_right_padding(attention_mask)
        batch = len(attention_mask)
        cache = self._new_cache(batch)
        logits = self._advance(sequence, attention_mask.sum(axis=1), cache, keep)
        return logits, cache

    def decode(self, sequence: Array, cache: Cache, keep: int, extras: Extras | None = None) -> Array:
        """Continue every row by ``sequence.shape[1]`` tokens; see `Runner.decode`. Batches may take several at once.

        Raises `BadInputError` when they do not fit behind what the cache holds.
        """
        require_no_extras(extras, "a decoder with a static cache")
        if not isinstance(cache, SharedCache):
            raise BadInputError(f"a {type(cache).__name__} is not a cache of this runner")
        batch, tokens = sequence.shape[:2]
        return self._advance(sequence, np.full(batch, tokens, np.int64), cache, keep)

    def _advance(self, sequence: Array, valid: Ids, cache: SharedCache, keep: int) -> Array:
        """Run `sequence`, of which each row's first `valid` tokens count, behind what the cache holds."""
        batch, tokens = sequence.shape[:2]
        require_room(cache.lengths, tokens, self.capacity)
        positions = positions_to_keep(valid, tokens, keep)
        logits = np.empty((batch, positions.shape[1], self.vocab_size), self.logits_dtype)
        (binding,) = cache.bindings
        with part_errors(PART, "does not run"):
            binding.bind_cpu_input("inputs_embeds", np.asarray(sequence, self.sequence_dtype, order="C"))
            binding.bind_cpu_input("write_indices", np.asarray(cache.lengths, np.int64))
            binding.bind_cpu_input("logits_positions", positions)
            binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
            self.session.run_with_iobinding(binding)
        cache.lengths = cache.lengths + valid
        return checked(PART, "logits", logits.astype(np.float32, copy=False))

    def _new_cache(self, batch: int) -> SharedCache:
        """Buffers of zeros, each bound as past and as present: the graph writes in place."""
        binding = self.session.io_binding()
        buffers = {}
        for past, present in self.present_of.items():
            empty = np.zeros((batch, self.kv.heads, self.capacity, self.kv.head_dim), self.kv_dtype)
            buffers[past] = ort.OrtValue.ortvalue_from_numpy(empty, self.device, 0)
            binding.bind_ortvalue_input(past, buffers[past])
            binding.bind_ortvalue_output(present, buffers[past])
        return SharedCache(np.zeros(batch, np.int64), (binding,), buffers, self.capacity)
