"""`verify_gguf`: the gate of a GGUF pair, from its bytes to llama.cpp's answers."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.errors import ArtifactError, BadInputError, NotPossibleHereError
from vlmexport.gguf_options import GgufOptions, GgufTensor, tensors_from_dict
from vlmexport.gguf_plan import plan_gguf
from vlmexport.manifest import FOLDS_NAME, Artifact, file_sha256
from vlmexport.progress import Progress, SilentProgress
from vlmexport.quantize.fold import Fold, folds_from_tensors
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.target import GgufLimits, load_target
from vlmexport.verify.gates import Gate, runtime_errors
from vlmexport.verify.gguf import structure
from vlmexport.verify.gguf.chat import check_chat_template, check_prompts
from vlmexport.verify.gguf.codes import check_codes
from vlmexport.verify.gguf.files import GgufFile, GgufPair
from vlmexport.verify.gguf.loss import check_loss
from vlmexport.verify.gguf.lowering import Expected, LoweringLimits, check_lowering, check_shipped, expected
from vlmexport.verify.gguf.reference import FullReference, load_full
from vlmexport.verify.gguf.tokens import check_tokenizer, check_written_tokens
from vlmexport.verify.gguf.values import check_pairing, check_values, rebuilt_weights
from vlmexport.verify.quantization import Answers
from vlmexport.verify.questions import Amount, Question, bundled_questions, drawn_amount, load_questions
from vlmexport.verify.reference import changed_source_files, original_source
from vlmexport.verify.result import LoweringSummary, ParityReport, QuantizationSummary
from vlmexport.verify.result import Question as Side
from vlmexport.verify.threads import SMALL_EXPORT_BYTES, good_threads, torch_threads

if TYPE_CHECKING:
    import torch

TARGET = "llamacpp"
_CONTEXT = 4096
_Named = tuple[tuple[str, str, Side], ...]
_SHIPPED: tuple[str, str, Side] = ("decoder/shipped_kl", "decoder", "lowering")
_LOWERING: _Named = (
    ("vision_encoder/image_embeddings", "vision_encoder", "lowering"),
    ("vision_encoder/encoder", "vision_encoder", "lowering"),
    ("processor/pictures", "processor", "lowering"),
    ("decoder/logits", "decoder", "lowering"),
    ("decoder/greedy", "decoder", "lowering"),
    _SHIPPED,
)
_PROMPTS: _Named = (
    ("gguf/chat_template", "processor", "lowering"),
    ("processor/prompt_ids", "processor", "lowering"),
    ("gguf/image_splitting", "processor", "lowering"),
)
_LOSS: _Named = (
    ("quantization/kl", "model", "quantization"),
    ("quantization/top1", "model", "quantization"),
    ("quantization/perplexity_ratio", "model", "quantization"),
)
_WEIGHTS: _Named = (
    ("gguf/accounted", "model", "lowering"),
    ("gguf/values", "model", "lowering"),
    ("gguf/pairing", "model", "lowering"),
)


@dataclass(frozen=True)
class _Subject:
    """What is judged: the files, the export that they belong to (None: loose files), and the tensors they should hold.

    `tensors` are empty, with the reason in `why_no_plan`, where nobody says what the files should hold.
    """

    gate: Gate
    pair: GgufPair
    artifact: Artifact | None
    limits: GgufLimits
    threads: int
    tensors: tuple[GgufTensor, ...] = ()
    unused: Mapping[str, str] = field(default_factory=dict)
    computed: Mapping[str, Any] = field(default_factory=dict)
    arch: str | None = None
    projector: str | None = None
    why_no_plan: str = ""


def verify_gguf(
    text: Path,
    mmproj: Path,
    *,
    model: str | None,
    lora: str | None = None,
    artifact: Artifact | None = None,
    samples: Path | None = None,
    questions: Amount = "sample",
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    threads: int | None = None,
) -> ParityReport:
    """Judge the GGUF pair `text` and `mmproj` against `model` with the adapter `lora` merged, by llama.cpp itself.

    `artifact` is the export that the files belong to; without it they may be of any tool, and `model` must be given.
    With it, `model` and `lora` default to where the export came from; where those cannot be loaded, the checks that
    need them are reported as not run. `samples`, `questions` as in `vlmexport.verify.run.verify_artifact`. `threads`
    are PyTorch's and llama.cpp's (None: one for a small model, 0: all).

    Raises `BadInputError` when a `model`, `samples` or file that was asked for cannot be read.
    """
    started = time.perf_counter()
    for file in (text, mmproj):
        if not file.is_file():
            raise BadInputError(f"no such file: {file}")
    given = load_questions(samples) if samples else None
    used = good_threads(text.stat().st_size + mmproj.stat().st_size) if threads is None else threads
    with (progress or SilentProgress()).stage("verify") as stage, torch_threads(used):
        gate = Gate(lambda name: stage.advance(1, name))
        reference, why_not = _reference(artifact, model, lora, trust_remote_code=trust_remote_code)
        asked = given if given is not None else _own_questions(reference, questions)
        judged = _Judged()
        try:
            pair = GgufPair(GgufFile(text), GgufFile(mmproj))
        except ArtifactError as error:
            gate.fail("gguf/readable", "model", "lowering", str(error))
        else:
            limits = load_target(TARGET).gguf_parity
            judged = _judge(_Subject(gate, pair, artifact, limits, used), reference, why_not, asked)
    return ParityReport(
        checks=tuple(gate.checks),
        lowering=judged.lowering,
        quantization=judged.quantization,
        series=gate.series,
        runtime=_runtime_facts(text, mmproj, reference, used, len(asked), time.perf_counter() - started),
        tasks=judged.answers.tasks(),
    )


@dataclass(frozen=True)
class _Judged:
    lowering: LoweringSummary = field(default_factory=LoweringSummary)
    answers: Answers = field(default_factory=Answers)
    quantization: QuantizationSummary = field(default_factory=QuantizationSummary)


def _reference(
    artifact: Artifact | None, model: str | None, lora: str | None, *, trust_remote_code: bool
) -> tuple[FullReference | None, str]:
    """The original model, or None with the reason; a model or adapter that was asked for must load."""
    if artifact is None:
        if model is None:
            raise BadInputError("GGUF files do not say which model they are of; give it with --model")
        return load_full(model, lora=lora, trust_remote_code=trust_remote_code), ""
    source, adapter = original_source(artifact.manifest, model, lora)
    try:
        return load_full(source, lora=adapter, trust_remote_code=trust_remote_code), ""
    except BadInputError as error:
        if model is not None or lora is not None:
            raise
        return None, f"the original model could not be loaded: {error}"


def _own_questions(reference: FullReference | None, amount: Amount) -> list[Question]:
    if reference is None:
        return []
    files = [f for f in reference.vlm.path.glob("*.safetensors") if f.stat().st_size < SMALL_EXPORT_BYTES]
    return bundled_questions({file_sha256(file) for file in files}, amount)


def _judge(subject: _Subject, reference: FullReference | None, why_not: str, asked: list[Question]) -> _Judged:
    gate = subject.gate
    subject = _planned(subject, reference)
    if not structure.check_architecture(gate, subject.pair, subject.arch, subject.projector):
        return _Judged()
    _check_weights(subject, reference, why_not)
    check_written_tokens(gate, subject.pair)
    exact = _loaded(subject, (("tokenizer/ids", "processor", "lowering"), *_PROMPTS, *_LOWERING, *_LOSS), exact=True)
    if exact is None:
        return _Judged()
    with exact:
        tokenizer = None if reference is None else reference.builder.tokenizer
        with gate.guard("tokenizer/ids", "processor", "lowering"):
            check_tokenizer(gate, exact, tokenizer, _recorded_probe(subject.artifact))
        if reference is None:
            _not_run(gate, (*_PROMPTS, *_LOWERING, *_LOSS), why_not)
            return _Judged()
        return _run_prompts(subject, reference, exact, asked)


def _loaded(subject: _Subject, checks: _Named, *, exact: bool) -> LlamaCppRunner | None:
    """llama.cpp with both files. None with a failed ``runtime/load``; where it is not here, with `checks` not run."""
    text, mmproj = subject.pair.text.path, subject.pair.mmproj.path
    try:
        return LlamaCppRunner(text, mmproj, threads=subject.threads, context=_CONTEXT, exact=exact)
    except NotPossibleHereError as error:
        _not_run(subject.gate, checks, str(error))
    except runtime_errors() as error:
        subject.gate.fail("runtime/load", "runtime", "lowering", " ".join(str(error).split()))
    return None


def _planned(subject: _Subject, reference: FullReference | None) -> _Subject:
    """`subject` with what the files should hold: what the export's manifest says, or else the model's family."""
    import dataclasses

    plan, why_not = None, "there is neither an export nor a model to say what the files should hold"
    if reference is not None:
        try:
            # `named`: the codes of a quantized reference are judged by what they mean, whatever the file made of them.
            plan = plan_gguf(reference.vlm, GgufOptions(quant="F16", mmproj_type="F16", imatrix="none", named=True))
        except BadInputError as error:
            why_not = str(error)
    computed = {} if plan is None else plan.computed
    if subject.artifact is not None:
        if reference is not None and plan is None:
            subject.gate.fail("gguf/plan", "model", "lowering", why_not)
        recorded, facts = subject.artifact.manifest.plan, subject.artifact.manifest.model["gguf"]
        return dataclasses.replace(
            subject,
            tensors=tensors_from_dict(recorded["tensors"]),
            unused=recorded["unused"],
            computed=computed,
            arch=facts["arch"],
            projector=facts["projector"],
        )
    if plan is None:
        return dataclasses.replace(subject, why_no_plan=why_not)
    return dataclasses.replace(
        subject, tensors=plan.tensors, unused=plan.unused, computed=computed, arch=plan.arch, projector=plan.projector
    )


def _check_weights(subject: _Subject, reference: FullReference | None, why_not: str) -> None:
    """What the bytes say, without running anything."""
    gate, artifact = subject.gate, subject.artifact
    if subject.why_no_plan:
        tensors = tuple((f"gguf/tensors[{file}]", part, "lowering") for file, part in structure.PARTS.items())
        _not_run(gate, (*tensors, *_WEIGHTS), subject.why_no_plan)  # type: ignore[arg-type]
        return
    structure.check_tensors(gate, subject.pair, subject.tensors, types=artifact is not None)
    if artifact is not None:
        with gate.guard("codes/all", "decoder", "lowering"):
            check_codes(gate, subject.pair, subject.tensors, artifact.manifest.quantized)
    if reference is None:
        _not_run(gate, (*_WEIGHTS, ("model/source", "model", "lowering")), why_not)
        return
    with gate.guard("gguf/values", "model", "lowering"):
        weights = _stored_weights(subject, reference)
        structure.check_accounted(gate, weights, subject.tensors, subject.unused)
        wrong = check_values(gate, subject.pair, subject.tensors, weights, subject.limits, subject.computed)
        check_pairing(gate, subject.pair, subject.tensors, wrong)
    if artifact is not None:
        changed = changed_source_files(artifact.manifest, reference.vlm)
        gate.verdict("model/source", "model", "lowering", changed, "files that differ")


def _stored_weights(subject: _Subject, reference: FullReference) -> dict[str, torch.Tensor]:
    """The model's weights as they were written: with the scales that the export says calibration moved."""
    weights = reference.weights()
    return {**weights, **{name: fold.apply(weights[name]) for name, fold in _folds(subject.artifact).items()}}


def _folds(artifact: Artifact | None) -> dict[str, Fold]:
    from safetensors.torch import load_file

    if artifact is None or FOLDS_NAME not in artifact.manifest.files:
        return {}
    return folds_from_tensors(load_file(artifact.path / FOLDS_NAME))


def _recorded_probe(artifact: Artifact | None) -> tuple[str, list[int]] | None:
    if artifact is None:
        return None
    facts = artifact.manifest.model["gguf"]
    return str(facts["probe_text"]), [int(i) for i in facts["probe_ids"]]


def _run_prompts(subject: _Subject, reference: FullReference, exact: LlamaCppRunner, asked: list[Question]) -> _Judged:
    """Everything that needs both llama.cpp and the model."""
    gate = subject.gate
    check_chat_template(gate, subject.pair.text, reference, exact)
    pairs = check_prompts(gate, reference, exact)
    subjects: list[Expected] = []
    if subject.tensors and structure.complete(subject.pair, subject.tensors) and pairs:
        rebuilt = rebuilt_weights(subject.pair, subject.tensors)
        with gate.guard("decoder/logits", "decoder", "lowering"), reference.substituted(rebuilt):
            subjects = expected(gate, reference, pairs)
        if not subjects:
            rest = tuple(check for check in _LOWERING if check[0] != "decoder/logits")
            _not_run(gate, rest, "PyTorch ran no prompt with the weights that the files hold")
    else:
        _not_run(gate, _LOWERING, subject.why_no_plan or "the files do not hold the whole model, or no prompt agrees")
    limits = _lowering_limits(subject)
    totals = check_lowering(gate, exact, subjects, limits, reference.image_token_id)
    text, mmproj = subject.pair.text.path, subject.pair.mmproj.path
    shipped = _loaded(subject, (_SHIPPED, *_LOSS), exact=False)
    if shipped is None:
        return _Judged(totals.summary())
    with shipped:
        check_shipped(gate, shipped, subjects, limits, totals)
        if reference.why_no_images:
            _not_run(gate, _LOSS, reference.why_no_images)
            return _Judged(totals.summary())
        drawn = drawn_amount(text.stat().st_size + mmproj.stat().st_size)
        answers, quantization = check_loss(gate, reference, shipped, asked, drawn, subject.limits)
    return _Judged(totals.summary(), answers, quantization)


def _lowering_limits(subject: _Subject) -> LoweringLimits:
    limits, pair = subject.limits, subject.pair
    images, text = pair.is_rounded("mmproj"), pair.is_rounded("text")
    return LoweringLimits(
        limits.image_embedding_rel_rounded if images else limits.image_embedding_rel,
        limits.image_prepared_rel_rounded if images else limits.image_prepared_rel,
        limits.lowering_kl_rounded if images or text else limits.lowering_kl,
        limits.lowering_shipped_kl_rounded if images or text else limits.lowering_shipped_kl,
    )


def _not_run(gate: Gate, checks: _Named, reason: str) -> None:
    for name, part, side in checks:
        gate.not_run(name, part, side, reason)


def _runtime_facts(
    text: Path, mmproj: Path, reference: FullReference | None, threads: int, questions: int, seconds: float
) -> dict[str, Any]:
    import torch
    import transformers

    facts: dict[str, Any] = {"target": TARGET, "text": text.name, "mmproj": mmproj.name}
    try:
        facts["xllamacpp"] = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        facts["xllamacpp"] = None
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    if reference is not None:
        facts["reference"] = reference.vlm.source
        if reference.vlm.quantized is not None:
            facts["reference_codes"] = reference.vlm.quantized.summary
    return {**facts, "threads": threads, "questions": questions, "seconds": round(seconds, 1)}
