"""The decoder's engine: prompts and steps over a static KV cache that lies on the GPU and is written in place.

The contract is docs/manifest.md, "The `tensorrt` layout". Past and present of a layer have the same device address,
which TensorRT's KVCacheUpdate demands. Never run on a GPU: see the package.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmexport.errors import BadInputError
from vlmexport.model.kv import KVGeometry
from vlmexport.runtime.protocol import Array, Cache, PartOutputError, require_right_padding
from vlmexport.runtime.sessions import checked
from vlmexport.runtime.static_cache import Ids, Piece, pieces, positions_to_keep, require_room
from vlmexport.runtime.tensorrt.cuda import CudaError, Device, DeviceBuffer
from vlmexport.runtime.tensorrt.engine import Engine, Resident

PART = "decoder"


@dataclass(frozen=True)
class Step:
    """One optimization profile of an engine, and the most rows, tokens and logits (of a row) that it takes at once."""

    engine: Engine
    profile: int

    @property
    def largest(self) -> tuple[int, int, int]:
        """Rows, tokens, logits."""
        rows, tokens, _ = self.engine.range_of("inputs_embeds", self.profile)[1]
        return rows, tokens, self.engine.range_of("logits_positions", self.profile)[1][1]


@dataclass
class DeviceCache(Cache):
    """The caches of all layers on the device, by the name of the past input and of the present output."""

    tensors: dict[str, Resident]


class EngineDecoder:
    """Calls of the profiles ``prefill`` and ``decode``, which may be of one engine or of two.

    A call of several tokens is cut where it exceeds what the prefill profile takes: at its most tokens, and at its most
    logits (`MAX_KEPT`) where many are wanted. All positions (``keep=0``) are thus computed a few at a time, each once:
    the later pieces see the earlier ones in the cache. Raises `PartOutputError` when the engines are not of this form.
    """

    def __init__(self, device: Device, prefill: Step, decode: Step, kv: KVGeometry) -> None:
        self._device = device
        self._prefill, self._decode = prefill, decode
        pairs = [(f"past_key_values.{i}.{k}", f"present.{i}.{k}") for i in range(kv.layers) for k in ("key", "value")]
        self._present_of = dict(pairs)
        for step in (prefill, decode):
            self._check_contract(step.engine)
        shape = prefill.engine.shape_of(pairs[0][0])
        if shape[1:] != decode.engine.shape_of(pairs[0][0])[1:] or shape[1::2] != (kv.heads, kv.head_dim):
            raise PartOutputError(PART, f"the cache has shape {list(shape)}; the manifest has {kv}")
        self.capacity = shape[2]
        self.vocab_size = prefill.engine.shape_of("logits")[-1]

    def _check_contract(self, engine: Engine) -> None:
        needed = ["inputs_embeds", "write_indices", "logits_positions", *self._present_of]
        for have, names in ((engine.inputs, needed), (engine.outputs, ["logits", *self._present_of.values()])):
            if missing := [name for name in names if name not in have]:
                raise PartOutputError(PART, f"the engine has no {missing[0]!r}; it has {list(have)[:4]}")
        for past, present in self._present_of.items():
            if (other := engine.alias_of(present)) not in ("", past):
                raise PartOutputError(PART, f"the engine writes {present} into {other}, not into {past}")

    def prefill(self, sequence: Array, attention_mask: Ids, keep: int) -> tuple[Array, Cache]:
        """Start a batch; see `Runner.prefill`.

        Raises `BadInputError` when the prompt is longer than the cache or the batch larger than the engine takes.
        """
        require_right_padding(attention_mask)
        require_room(np.zeros(1, np.int64), sequence.shape[1], self.capacity)
        cache = self._new_cache(len(sequence))
        return self._advance(sequence, attention_mask.sum(axis=1), cache, keep), cache

    def decode(self, sequence: Array, cache: Cache, keep: int) -> Array:
        """Continue every row; see `Runner.decode`. Batches may take several tokens at once.

        Raises `BadInputError` when they do not fit behind what the cache holds.
        """
        if not isinstance(cache, DeviceCache):
            raise BadInputError(f"a {type(cache).__name__} is not a cache of this runner")
        require_room(cache.lengths, sequence.shape[1], self.capacity)
        return self._advance(sequence, np.full(len(sequence), sequence.shape[1], np.int64), cache, keep)

    def _advance(self, sequence: Array, valid: Ids, cache: DeviceCache, keep: int) -> Array:
        """Run `sequence`, of which each row's first `valid` tokens count, behind what the cache holds."""
        batch, tokens = sequence.shape[:2]
        step = self._decode if tokens == 1 else self._prefill
        most_rows, longest, most = step.largest
        if batch > most_rows:
            raise BadInputError(f"a batch of {batch} rows; the engine was built for {most_rows} (--max-batch)")
        wanted = positions_to_keep(valid, tokens, keep)
        logits = np.empty((*wanted.shape, self.vocab_size), np.float32)
        for piece in pieces(wanted, tokens, longest, most):
            piece.store(self._run(step, sequence, piece, cache), logits)
        cache.lengths = cache.lengths + valid
        return checked(PART, "logits", logits)

    def _run(self, step: Step, sequence: Array, piece: Piece, cache: DeviceCache) -> Array:
        inputs = {
            "inputs_embeds": sequence[:, piece.start : piece.stop],
            "write_indices": cache.lengths + piece.start,
            "logits_positions": piece.positions,
        }
        return step.engine.run(inputs, step.profile, cache.tensors)["logits"]

    def _new_cache(self, batch: int) -> DeviceCache:
        """Caches of zeros: what no token wrote yet is multiplied by attention weights of 0, and must be finite."""
        tensors = {}
        for past, present in self._present_of.items():
            engine = self._prefill.engine
            shape = (batch, *engine.shape_of(past)[1:])
            size = int(np.prod(shape)) * engine.dtype_of(past).itemsize
            try:
                buffer = DeviceBuffer(self._device, size)
                self._device.zero(buffer.address, size)
            except CudaError as error:
                raise PartOutputError(PART, f"no room for a cache of {list(shape)}: {error}") from error
            tensors[past] = tensors[present] = Resident(buffer, shape)
        return DeviceCache(np.zeros(batch, np.int64), tensors)
