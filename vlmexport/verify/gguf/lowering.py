"""llama.cpp against PyTorch with the weights that the files hold: image embeddings, logits, greedy answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vlmexport.runtime.llamacpp.chunks import IMAGE_ID
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.runtime.protocol import Array, PartOutputError
from vlmexport.verify import metrics
from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.chat import Pair
from vlmexport.verify.gguf.reference import FullReference
from vlmexport.verify.result import LoweringSummary

_ANSWER_TOKENS = 12


@dataclass(frozen=True)
class LoweringLimits:
    """`encoder_rel`, `prepared_rel`: largest difference over largest value; `kl`, `shipped_kl`: mean nats per token.

    `encoder_rel` is for the encoder alone, `prepared_rel` for pictures that llama.cpp may resize to slightly other
    pixels.
    """

    encoder_rel: float
    prepared_rel: float
    kl: float
    shipped_kl: float


@dataclass(frozen=True)
class Expected:
    """What PyTorch says to one prompt, with the weights of the files.

    `features`: float32 ``[image tokens, hidden]`` or None without pictures. `answer`: its greedy tokens. `logits`:
    float32 ``[tail + answer - 1, vocab]`` behind the prompt's text after the last picture, and behind the answer.
    """

    pair: Pair
    features: Array | None
    answer: list[int]
    logits: Array


@dataclass
class LoweringTotals:
    """What all prompts together showed."""

    max_abs_logit: float = 0.0
    kl: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)

    def summary(self) -> LoweringSummary:
        """The three numbers of the report; None where nothing was measured."""
        if not self.kl:
            return LoweringSummary()
        return LoweringSummary(self.max_abs_logit, float(np.mean(self.kl)), float(np.mean(self.agreed)))


def expected(gate: Gate, reference: FullReference, pairs: Sequence[Pair]) -> list[Expected]:
    """Run PyTorch on every prompt; call it while the weights of the files are in the model.

    A prompt that the model itself cannot answer fails its ``decoder/logits`` and is left out.
    """
    found = []
    for pair in pairs:
        with gate.guard(f"decoder/logits[{pair.name}]", "decoder", "lowering"):
            found.append(_expected(reference, pair))
    return found


def _expected(reference: FullReference, pair: Pair) -> Expected:
    prompt = pair.reference
    try:
        features = reference.features(prompt) if pair.llama.image_tokens else None
        answer = reference.answer(prompt, _ANSWER_TOKENS)
        keep = len(pair.llama.tail) + len(answer) - 1
        return Expected(pair, features, answer, reference.logits(prompt, answer[:-1], keep))
    except (TypeError, AttributeError, NotImplementedError) as error:  # the model's own code in another transformers
        raise PartOutputError("model", f"PyTorch does not run this prompt: {type(error).__name__}: {error}") from error


def check_lowering(
    gate: Gate, runner: LlamaCppRunner, subjects: Sequence[Expected], limits: LoweringLimits, image_token_id: int
) -> LoweringTotals:
    """The ``vision_encoder/``, ``decoder/`` and ``processor/pictures`` checks of every prompt.

    Where both sides resize a picture to the very same pixels, what is left is the encoder's own error: the smallest of
    the probes' is judged by the stricter limit. Where that is small, pictures with a large error were prepared in
    another way.
    `runner` is exact: an F32 cache and no flash attention.
    """
    totals = LoweringTotals()
    parted: list[str] = []
    errors: dict[str, float] = {}
    for subject in subjects:
        pair = subject.pair
        if subject.features is not None:
            name = f"vision_encoder/image_embeddings[{pair.name}]"
            with gate.guard(name, "vision_encoder", "lowering"):
                rows = _image_rows(runner.image_embeddings(pair.llama), pair, image_token_id, subject.features)
                gate.close(name, "vision_encoder", "lowering", subject.features, rows, limits.prepared_rel)
                if not metrics.output_fault(subject.features, rows):
                    errors[pair.name] = metrics.relative_error(subject.features, rows)
        name = f"decoder/logits[{pair.name}]"
        with gate.guard(name, "decoder", "lowering"):
            runner.reserve(len(pair.llama.ids) + len(subject.answer))
            found = _logits(runner, subject)
            if fault := metrics.output_fault(subject.logits, found):
                gate.fail(name, "decoder", "lowering", fault)
                continue
            divergence = metrics.mean_kl(subject.logits, found)
            gate.at_most(name, "decoder", "lowering", divergence, limits.kl, "nats per token")
            largest = metrics.max_abs_difference(subject.logits, found)
            totals.max_abs_logit = max(totals.max_abs_logit, largest)
            if fault := _greedy_fault(runner, subject, largest):
                parted.append(f"{pair.name}: {fault}")
    if errors:
        _check_pictures(gate, errors, limits)
    if subjects:
        gate.verdict("decoder/greedy", "decoder", "lowering", parted, "answers that differ")
    return totals


def _check_pictures(gate: Gate, errors: Mapping[str, float], limits: LoweringLimits) -> None:
    best = min(errors.values())
    gate.at_most("vision_encoder/encoder", "vision_encoder", "lowering", best, limits.encoder_rel)
    if best > limits.encoder_rel:
        gate.not_run("processor/pictures", "processor", "lowering", "the encoder itself differs on every picture")
        return
    faults = [
        f"{name}: llama.cpp prepares this picture in another way than the model's processor (its padding, size or "
        f"filter): relative error {error:.2g}, where the encoder's own is {best:.2g}"
        for name, error in errors.items()
        if not error <= limits.prepared_rel
    ]
    gate.verdict("processor/pictures", "processor", "lowering", faults, "pictures that differ")


def check_shipped(
    gate: Gate, runner: LlamaCppRunner, subjects: Sequence[Expected], limits: LoweringLimits, totals: LoweringTotals
) -> None:
    """``decoder/shipped_kl``: the same logits with the cache and the attention that llama.cpp's own tools use.

    Adds to `totals`.
    """
    with gate.guard("decoder/shipped_kl", "decoder", "lowering"):
        for subject in subjects:
            runner.reserve(len(subject.pair.llama.ids) + len(subject.answer))
            found = _logits(runner, subject)
            totals.kl += metrics.kl_per_token(subject.logits, found).tolist()
            totals.agreed += (subject.logits.argmax(-1) == found.argmax(-1)).tolist()
        if totals.kl:
            mean = float(np.mean(totals.kl))
            gate.at_most("decoder/shipped_kl", "decoder", "lowering", mean, limits.shipped_kl, "nats per token")


def _logits(runner: LlamaCppRunner, subject: Expected) -> Array:
    prompt = subject.pair.llama
    first = runner.prompt_logits(prompt)
    more = runner.forced(prompt, subject.answer)[1:]
    return np.concatenate([first, more])


def _image_rows(found: NDArray[np.float32], pair: Pair, image_token_id: int, wanted: Array) -> NDArray[np.float32]:
    """The rows that stand for image tokens, and of those what enters the decoder below (deepstack follows it)."""
    ids = pair.llama.ids
    own = pair.reference.ids[ids == IMAGE_ID] == image_token_id
    rows: NDArray[np.float32] = found[own] if len(own) == len(found) else found
    return rows[:, : wanted.shape[1]]


def _greedy_fault(runner: LlamaCppRunner, subject: Expected, largest: float) -> str:
    """How the greedy answer, made token by token, parts from PyTorch's; a tie within the measured error is none."""
    found = runner.greedy(subject.pair.llama, len(subject.answer))
    wanted = subject.answer
    same = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), None)
    if same is None:
        return (
            "" if len(found) == len(wanted) else f"it ends after {len(found)} tokens, the model's after {len(wanted)}"
        )
    row = subject.logits[len(subject.logits) - len(wanted) + same]
    gap = float(row[wanted[same]] - row[found[same]])
    if gap <= 2 * largest:
        return ""
    return f"token {same} is {found[same]}, the model's {wanted[same]} by a margin of {gap:.3g} logits"
