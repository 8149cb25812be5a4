"""What a static KV cache adds to the gate: prompts that do not fit it, and that nothing is written behind its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlmexport.engines import static_capacity
from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact
from vlmexport.runtime.decoder import SharedCache
from vlmexport.runtime.decoder_inputs import DecoderInputs
from vlmexport.runtime.protocol import Cache, Runner
from vlmexport.verify.decoder import DECODE_STEPS, PART
from vlmexport.verify.gates import Gate
from vlmexport.verify.quantization import Item

STEPS = 64
OVERFULL = "decoder/overfull"


def capacity_of(artifact: Artifact) -> int | None:
    """Tokens that the manifest says a sequence may have; None for a cache that grows. Raises as `static_capacity`."""
    return static_capacity(artifact.manifest.model)


def with_room(gate: Gate, embeds: Mapping[str, DecoderInputs], capacity: int | None) -> dict[str, DecoderInputs]:
    """The prompts that fit the cache with a short answer; the others are reported as not run.

    Reported are ``decoder/prefill[probe]``.
    """
    if capacity is None:
        return dict(embeds)
    fitting = {name: rows for name, rows in embeds.items() if rows.length + DECODE_STEPS <= capacity}
    for name in (name for name in embeds if name not in fitting):
        tokens = embeds[name].length
        reason = f"{tokens} tokens and {DECODE_STEPS} of an answer do not fit the static cache of {capacity}"
        gate.not_run(f"decoder/prefill[{name}]", PART, "lowering", reason)
    return fitting


def answerable(gate: Gate, items: Sequence[Item], tokens: int, capacity: int | None) -> list[Item]:
    """The questions that fit the cache with an answer of `tokens`; ``quantization/room`` says that others do not."""
    if capacity is None:
        return list(items)
    fitting = [item for item in items if item.exported.input_ids.shape[1] + tokens <= capacity]
    if lost := len(items) - len(fitting):
        reason = f"{lost} of {len(items)} questions and {tokens} tokens do not fit the static cache of {capacity}"
        gate.not_run("quantization/room", "model", "quantization", reason)
    return fitting


def check_overfull(gate: Gate, runner: Runner, sequence: DecoderInputs, capacity: int) -> None:
    """``decoder/overfull``: the last slot takes a token, and what would lie behind it is refused.

    `sequence`, one prompt, gives the token. What is between is never computed: the cache is told a length.
    """
    with gate.guard(OVERFULL, PART, "lowering"):
        token = sequence.embeds[:, :1]
        _, cache = runner.prefill(token, np.ones((1, 1), np.int64), 1)
        cache.lengths = np.array([capacity - 1], np.int64)
        runner.decode(token, cache)
        faults = _misplaced(cache, capacity)
        faults += _accepted(lambda: runner.decode(token, cache), f"a token behind the {capacity} of a full cache")
        long = np.repeat(token, capacity + 1, axis=1)
        mask = np.ones(long.shape[:2], np.int64)
        faults += _accepted(lambda: runner.prefill(long, mask, 1), f"a prompt of {capacity + 1} tokens")
        gate.verdict(OVERFULL, PART, "lowering", faults, "faults")


def _misplaced(cache: Cache, capacity: int) -> list[str]:
    """Faults of a cache whose slots 0 and ``capacity - 1`` were written, and no other."""
    if not isinstance(cache, SharedCache):
        return [f"the cache is a {type(cache).__name__}, whose slots cannot be read"]
    faults = []
    for kind in ("key", "value"):
        held = cache.stored(0, kind, 0, cache.capacity)
        written = np.flatnonzero(held.any(axis=(0, 1, 3)))
        if written.tolist() != [0, capacity - 1]:
            faults.append(f"slots {written[:4].tolist()} of layer 0's {kind}s are written, not 0 and {capacity - 1}")
    return faults


def _accepted(call: Callable[[], object], what: str) -> list[str]:
    try:
        call()
    except BadInputError:
        return []
    return [f"{what} was accepted"]
