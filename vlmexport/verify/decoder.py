"""The lowering error of the decoder: the same embeddings into the graph and into PyTorch with the same codes.

Judged twice: *exactly* (quantized products without rounded activations), where only the order of floating-point sums
may differ, and *as shipped*, where the runtime's own rounding is part of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.runtime.decoder_inputs import DecoderInputs, stacked
from vlmexport.runtime.protocol import Array, Runner
from vlmexport.verify import metrics
from vlmexport.verify.gates import Gate, NotRunError

Ids: TypeAlias = NDArray[np.int64]
Embed: TypeAlias = Callable[[Ids], DecoderInputs]
Continue: TypeAlias = Callable[[Runner, DecoderInputs], Array]

PART = "decoder"
DECODE_STEPS = 16
_RAGGED_STEPS = 4


@dataclass(frozen=True)
class DecoderLimits:
    """What the decoder may differ by, and how long it is watched.

    `exact_rel`: relative error of logits in exact mode; `shipped_kl`: nats per token as shipped; `exact_kl`: nats per
    token in exact mode, judged where it is given. `steps`: decode steps that are compared; `capacity`: tokens that a
    sequence may have at all (None: any number).
    """

    exact_rel: float
    shipped_kl: float
    exact_kl: float | None = None
    steps: int = DECODE_STEPS
    capacity: int | None = None


@dataclass
class LoweringTotals:
    """What the comparisons of one run add up to: rows of ``[tokens, vocab]`` are reduced as they come.

    `with_exact_kl`: divergences are taken in exact mode, too.
    """

    max_abs_logit: float | None = None
    kl: list[float] = field(default_factory=list)
    agreed: list[float] = field(default_factory=list)
    exact_kl: list[float] = field(default_factory=list)
    shipped_rel: list[float] = field(default_factory=list)
    with_exact_kl: bool = False

    def see_exact(self, difference: float, reference: Array, exact: Array) -> None:
        """Take in the largest absolute difference of logits ``[..., vocab]`` in exact mode, and their divergence."""
        self.max_abs_logit = max(difference, self.max_abs_logit or 0.0)
        if not self.with_exact_kl:
            return
        if np.isfinite(difference):
            rows = (array.reshape(-1, array.shape[-1]) for array in (reference, exact))
            self.exact_kl += metrics.kl_per_token(*rows).tolist()
        else:
            self.exact_kl.append(float("inf"))

    def see_shipped(self, reference: Array, shipped: Array) -> list[float]:
        """Take in logits ``[tokens, vocab]`` of the shipped graph; returns each token's divergence in nats."""
        divergences: list[float] = metrics.kl_per_token(reference, shipped).tolist()
        self.kl += divergences
        self.shipped_rel.append(metrics.relative_error(reference, shipped))
        self.agreed.append(metrics.top1_agreement(reference, shipped) * len(reference))
        return divergences

    def mean_kl(self) -> float:
        """Nats per token over everything seen of the shipped graph; inf when nothing was."""
        return float(np.mean(self.kl)) if self.kl else float("inf")

    def mean_exact_kl(self) -> float:
        """Nats per token over everything seen in exact mode; inf when nothing was."""
        return float(np.mean(self.exact_kl)) if self.exact_kl else float("inf")

    def top1(self) -> float:
        """Share of tokens with the same most likely token; 0 when nothing was seen."""
        return sum(self.agreed) / len(self.kl) if self.kl else 0.0


@dataclass(frozen=True)
class DecoderSubjects:
    """Who is compared: the graph in exact mode, as shipped, and PyTorch with the graph's own weights.

    All of them are fed by the one `embed` (ids ``[batch, tokens]`` to what reaches the decoder), so that the
    error is the decoder's own and not the embedding table's.
    """

    exact: Runner
    shipped: Runner
    reference: Runner
    embed: Embed


def check_lowering(
    gate: Gate, subjects: DecoderSubjects, embeds: Mapping[str, DecoderInputs], limits: DecoderLimits
) -> LoweringTotals:
    """All comparisons with the reference on prompts `embeds` (probe name to what reaches the decoder).

    Checks: ``decoder/prefill[probe]`` at every position, ``decoder/one_token``, ``decoder/decode`` and
    ``decoder/ragged_batch`` over the cache, ``decoder/greedy``, ``decoder/shipped_kl``; ``decoder/exact_kl`` where it
    has a limit. The series ``shipped_rel`` has the shipped graph's relative error on each prompt, then of all steps.
    """
    totals = LoweringTotals(with_exact_kl=limits.exact_kl is not None)
    first = next(iter(embeds.values()))
    for name, sequence in {**embeds, "one_token": first.tokens(0, 1)}.items():
        _prefill(gate, subjects, name, sequence, limits, totals)
    _teacher_forced(gate, subjects, list(embeds.values()), limits, totals)
    _ragged_batch(gate, subjects, list(embeds.values()), limits, totals)
    _greedy(gate, subjects, embeds, limits)
    with gate.guard("decoder/shipped_kl", PART, "lowering"):
        gate.at_most("decoder/shipped_kl", PART, "lowering", totals.mean_kl(), limits.shipped_kl, "nats per token")
    if limits.exact_kl is not None:
        exact_kl = totals.mean_exact_kl()
        gate.at_most("decoder/exact_kl", PART, "lowering", exact_kl, limits.exact_kl, "nats per token")
    gate.series["shipped_rel"] = tuple(totals.shipped_rel)
    return totals


def token_by_token(runner: Runner, sequence: DecoderInputs) -> Array:
    """Logits ``[1, tokens, vocab]`` with the first half in one prefill and the rest one token at a time.

    Raises `NotRunError` for a prompt that is one block, as `_start_of_rest`.
    """
    half = _start_of_rest(sequence, max(sequence.length // 2, sequence.length - DECODE_STEPS))
    logits, cache = sequence.tokens(0, half).prefill(runner, keep=0)
    rows = [logits]
    rows += [sequence.tokens(i, i + 1).decode(runner, cache) for i in range(half, sequence.length)]
    return np.concatenate(rows, axis=1)


def in_two_prompts(runner: Runner, sequence: DecoderInputs) -> Array:
    """Logits ``[1, tokens, vocab]`` of two calls of several tokens: the first half, and the rest over its cache."""
    half = _start_of_rest(sequence, sequence.length // 2)
    logits, cache = sequence.tokens(0, half).prefill(runner, keep=0)
    return np.concatenate([logits, sequence.tokens(half).decode(runner, cache, 0)], axis=1)


def _start_of_rest(sequence: DecoderInputs, start: int) -> int:
    """`start`, or the next token behind it that is in no block: a block's tokens come in one call.

    Raises `NotRunError` when there is none.
    """
    blocks = sequence.extras.get("block_ids")
    if blocks is not None:
        inside = np.flatnonzero(blocks[0] > 0)
        start = max(start, int(inside[-1]) + 1 if inside.size else 0)
    if start >= sequence.length:
        raise NotRunError("all of the prompt sees each other; it cannot be computed in two calls")
    return start


def check_consistency(
    gate: Gate,
    exact: Runner,
    embeds: Mapping[str, DecoderInputs],
    limit: float,
    *,
    left_pad: bool,
    continued: Continue = token_by_token,
) -> None:
    """What must hold within the graph itself, whether a reference is at hand or not.

    ``decoder/keep_last``: logits of the last position alone equal the last of all; ``decoder/cache``: going on over
    the cache (`continued`: token by token, or by a second prompt where single tokens have other weights) equals one
    prefill; ``decoder/right_padding`` (and ``decoder/left_padding`` where the graph allows it): rows of a padded batch
    equal the same prompts alone. Where it does not, ``decoder/padding_guard``: left padding, which such a graph answers
    with wrong numbers, is refused.
    """
    longest = max(embeds.values(), key=lambda s: s.length)
    with gate.guard("decoder/keep_last", PART, "lowering"):
        whole, last = (_logits(exact, longest, keep) for keep in (0, 1))
        gate.close("decoder/keep_last", PART, "lowering", whole[:, -1:], last, limit)
    with gate.guard("decoder/cache", PART, "lowering"):
        gate.close("decoder/cache", PART, "lowering", _logits(exact, longest, 0), continued(exact, longest), limit)
    if not left_pad:
        _padding_guard(gate, exact, embeds)
    sides: tuple[Literal["right", "left"], ...] = ("right", "left") if left_pad else ("right",)
    for side in sides:
        name = f"decoder/{side}_padding"
        with gate.guard(name, PART, "lowering"):
            rows = short_and_long(embeds.values())
            alone = [_logits(exact, row, 0)[0] for row in rows]
            together = _padded_logits(exact, rows, side)
            gate.close(name, PART, "lowering", np.concatenate(alone), np.concatenate(together), limit)


def short_and_long(prompts: Iterable[DecoderInputs]) -> list[DecoderInputs]:
    """The shortest and the longest of single prompts: two rows that a batch pads.

    Where all are equally long, the short row is the first half of the other. Raises `NotRunError` when that is nothing.
    """
    by_length = sorted(prompts, key=lambda prompt: prompt.length)
    short, long = by_length[0], by_length[-1]
    if short.length == long.length:
        short = long.tokens(0, long.length // 2)
    if not short.length:
        raise NotRunError("all prompts are one token long: a batch of them has no padding")
    return [short, long]


def _padding_guard(gate: Gate, exact: Runner, embeds: Mapping[str, DecoderInputs]) -> None:
    with gate.guard("decoder/padding_guard", PART, "lowering"):
        inputs, mask = stacked(short_and_long(embeds.values()), "left")
        faults = []
        try:
            inputs.prefill(exact, mask, 1)
        except BadInputError:
            pass
        else:
            faults.append("a left-padded batch was accepted, although the graph takes right padding only")
        gate.verdict("decoder/padding_guard", PART, "lowering", faults, "faults")


def _prefill(
    gate: Gate,
    subjects: DecoderSubjects,
    name: str,
    sequence: DecoderInputs,
    limits: DecoderLimits,
    totals: LoweringTotals,
) -> None:
    name = "decoder/one_token" if name == "one_token" else f"decoder/prefill[{name}]"
    with gate.guard(name, PART, "lowering"):
        wanted, found = (_logits(runner, sequence, 0) for runner in (subjects.reference, subjects.exact))
        totals.see_exact(gate.close(name, PART, "lowering", wanted, found, limits.exact_rel), wanted, found)
        totals.see_shipped(wanted[0], _logits(subjects.shipped, sequence, 0)[0])


def _teacher_forced(
    gate: Gate, subjects: DecoderSubjects, prompts: list[DecoderInputs], limits: DecoderLimits, totals: LoweringTotals
) -> None:
    """The limits' steps over the cache behind the first prompt that has room, all fed the reference's greedy tokens."""
    with gate.guard("decoder/decode", PART, "lowering"):
        prompt = _with_room(prompts, limits)
        wanted, tokens = _greedy_steps(subjects.reference, subjects.embed, prompt, limits.steps)
        exact = _forced_steps(subjects.exact, subjects.embed, prompt, tokens)
        shipped = _forced_steps(subjects.shipped, subjects.embed, prompt, tokens)
        difference = gate.close("decoder/decode", PART, "lowering", wanted, exact, limits.exact_rel)
        totals.see_exact(difference, wanted, exact)
        steps = range(len(wanted))
        gate.series["decode_exact_rel"] = tuple(metrics.relative_error(wanted[i], exact[i]) for i in steps)
        gate.series["decode_shipped_kl"] = tuple(totals.see_shipped(wanted, shipped))


def _with_room(prompts: list[DecoderInputs], limits: DecoderLimits) -> DecoderInputs:
    """The first prompt behind which the cache has room for all steps; raises `NotRunError` where there is none."""
    for prompt in prompts:
        if limits.capacity is None or prompt.length + limits.steps <= limits.capacity:
            return prompt
    shortest = min(prompt.length for prompt in prompts)
    raise NotRunError(
        f"the cache holds {limits.capacity} tokens: no room for {limits.steps} steps behind a prompt of {shortest}"
    )


def _ragged_batch(
    gate: Gate, subjects: DecoderSubjects, sequences: list[DecoderInputs], limits: DecoderLimits, totals: LoweringTotals
) -> None:
    """Two prompts of different length in one right-padded batch, then a few steps, against each prompt alone."""
    with gate.guard("decoder/ragged_batch", PART, "lowering"):
        rows = short_and_long(sequences)
        alone = [_greedy_steps(subjects.reference, subjects.embed, row, _RAGGED_STEPS) for row in rows]
        wanted = np.stack([logits for logits, _ in alone], axis=1)
        inputs, mask = stacked(rows)
        logits, cache = inputs.prefill(subjects.exact, mask, 1)
        found = [logits[:, -1]]
        for step in range(_RAGGED_STEPS):
            ids = np.array([[tokens[step]] for _, tokens in alone], dtype=np.int64)
            found.append(subjects.embed(ids).decode(subjects.exact, cache)[:, -1])
        together = np.stack(found)
        difference = gate.close("decoder/ragged_batch", PART, "lowering", wanted, together, limits.exact_rel)
        totals.see_exact(difference, wanted, together)


def _greedy(gate: Gate, subjects: DecoderSubjects, embeds: Mapping[str, DecoderInputs], limits: DecoderLimits) -> None:
    """Greedy answers are equal, unless two tokens are as likely as each other within the error that is allowed."""
    with gate.guard("decoder/greedy", PART, "lowering"):
        rows = list(embeds.values())
        wanted, tokens = _greedy_batch(subjects.reference, subjects.embed, rows, DECODE_STEPS)
        _, found = _greedy_batch(subjects.exact, subjects.embed, rows, DECODE_STEPS)
        faults = []
        for row, name in enumerate(embeds):
            differ = np.nonzero(tokens[:, row] != found[:, row])[0]
            if differ.size and not _tie(wanted[differ[0], row], int(found[differ[0], row]), limits.exact_rel):
                faults.append(f"{name}: token {differ[0]} is {found[differ[0], row]}, not {tokens[differ[0], row]}")
        gate.verdict("decoder/greedy", PART, "lowering", faults, "prompts that differ")


def _tie(logits: Array, token: int, rel: float) -> bool:
    allowed = 2 * rel * float(np.abs(logits).max())
    return float(logits.max() - logits[token]) <= allowed


def _logits(runner: Runner, sequence: DecoderInputs, keep: int) -> Array:
    """Logits ``[1, kept, vocab]`` of one prompt without padding."""
    return sequence.prefill(runner, keep=keep)[0]


def _greedy_steps(runner: Runner, embed: Embed, prompt: DecoderInputs, steps: int) -> tuple[Array, Ids]:
    """Logits ``[steps + 1, vocab]`` of the prompt's last position and of every greedy step, and the tokens fed."""
    rows: list[Array] = []
    tokens: list[int] = []
    for logits in _steps(runner, embed, prompt, tokens, steps):
        rows.append(logits)
        tokens.append(int(logits.argmax()))
    return np.stack(rows), np.array(tokens[:steps], dtype=np.int64)


def _greedy_batch(runner: Runner, embed: Embed, rows: list[DecoderInputs], steps: int) -> tuple[Array, Ids]:
    """Logits ``[steps, batch, vocab]`` and greedy tokens ``[steps, batch]`` of prompts in one right-padded batch."""
    inputs, mask = stacked(rows)
    logits, cache = inputs.prefill(runner, mask, 1)
    kept = [logits[:, -1]]
    for _ in range(steps - 1):
        tokens = kept[-1].argmax(axis=-1).astype(np.int64)
        kept.append(embed(tokens[:, None]).decode(runner, cache)[:, -1])
    found = np.stack(kept)
    return found, found.argmax(axis=-1).astype(np.int64)


def _forced_steps(runner: Runner, embed: Embed, prompt: DecoderInputs, tokens: Ids) -> Array:
    """Logits ``[steps + 1, vocab]`` when the given tokens are fed one at a time."""
    return np.stack(list(_steps(runner, embed, prompt, tokens.tolist(), len(tokens))))


def _steps(runner: Runner, embed: Embed, prompt: DecoderInputs, tokens: list[int], steps: int) -> Iterator[Array]:
    """Logits ``[vocab]`` of the prompt, then of each of `steps` tokens; `tokens` may grow while this runs."""
    logits, cache = prompt.prefill(runner)
    yield logits[0, -1]
    for step in range(steps):
        ids = np.array([[tokens[step]]], dtype=np.int64)
        yield embed(ids).decode(runner, cache)[0, -1]


def _padded_logits(runner: Runner, rows: list[DecoderInputs], side: Literal["right", "left"]) -> list[Array]:
    """Logits ``[tokens, vocab]`` of the valid positions of each row of one padded batch."""
    inputs, mask = stacked(rows, side)
    logits, _ = inputs.prefill(runner, mask, 0)
    return [logits[index][mask[index] == 1] for index in range(len(rows))]
