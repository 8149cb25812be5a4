"""`verify_artifact`: the whole gate, from the files to the answers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmexport.engines import TENSORRT_LAYOUT
from vlmexport.errors import BadInputError
from vlmexport.genai_options import JOINED_LAYOUTS
from vlmexport.manifest import Artifact, open_artifact
from vlmexport.model.kv import KVGeometry
from vlmexport.progress import Progress, SilentProgress
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.runtime.decoder_inputs import DecoderInputs, token_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import Array, Runner
from vlmexport.runtime.sessions import SessionSettings
from vlmexport.runtime.text_only import require_text
from vlmexport.runtime.torch import TorchRunner
from vlmexport.target import Target, load_target
from vlmexport.variants import as_variant, variant_names
from vlmexport.verify import kv_cache, parts, prefill, static_cache
from vlmexport.verify.codes import account, read_codes, unrecorded_matrices
from vlmexport.verify.decoder import (
    DECODE_STEPS,
    DecoderLimits,
    DecoderSubjects,
    LoweringTotals,
    check_consistency,
    check_lowering,
    in_two_prompts,
    token_by_token,
)
from vlmexport.verify.dialect import check_dialect
from vlmexport.verify.encoder_decoder import check_answers
from vlmexport.verify.engines import check_engines
from vlmexport.verify.gates import Gate
from vlmexport.verify.genai import check_genai
from vlmexport.verify.preprocessor import check_preprocessor
from vlmexport.verify.prompts import Prompts, answer_items, build_prompts
from vlmexport.verify.quantization import (
    Answers,
    answers_by_step,
    answers_in_one_prompt,
    collect_answers,
    judge_quantization,
)
from vlmexport.verify.questions import (
    SCORED_TOKENS,
    UNSCORED_TOKENS,
    Amount,
    Question,
    bundled_questions,
    drawn_amount,
    load_questions,
)
from vlmexport.verify.reference import Reference, changed_source_files, load_reference, original_source
from vlmexport.verify.result import LoweringSummary, ParityReport, QuantizationSummary
from vlmexport.verify.result import Question as Side
from vlmexport.verify.retrieval import RetrievalRun, check_retrieval, is_retrieval
from vlmexport.verify.structure import check_structure
from vlmexport.verify.threads import good_threads, torch_threads
from vlmexport.verify.variants import of_variants
from vlmexport.verify.videos import check_video

_CPU = "CPUExecutionProvider"
_NEEDS_REFERENCE: tuple[tuple[str, str, Side], ...] = (
    ("decoder/accounted", "decoder", "lowering"),
    ("vision_encoder/features", "vision_encoder", "lowering"),
    ("projector/features", "projector", "lowering"),
    ("embed_tokens/table", "embed_tokens", "lowering"),
    ("model/merged_inputs", "model", "lowering"),
    ("decoder/prefill", "decoder", "lowering"),
    ("decoder/decode", "decoder", "lowering"),
    ("decoder/ragged_batch", "decoder", "lowering"),
    ("decoder/greedy", "decoder", "lowering"),
    ("decoder/shipped_kl", "decoder", "lowering"),
    ("quantization/kl", "model", "quantization"),
    ("quantization/top1", "model", "quantization"),
    ("quantization/perplexity_ratio", "model", "quantization"),
)


@dataclass(frozen=True)
class _Run:
    """One run of the gate: what is judged, by which limits, and where the checks go.

    `exact` runs without the runtime's roundings, `rounded` only with that of an INT8 cache, `shipped` with all.
    """

    gate: Gate
    artifact: Artifact
    target: Target
    exact: Runner
    rounded: OnnxRunner
    shipped: Runner
    decoder_is_half: bool

    @property
    def exact_rel(self) -> float:
        limits = self.target.parity
        return limits.lowering_exact_rel_fp16 if self.decoder_is_half else limits.lowering_exact_rel

    @property
    def capacity(self) -> int | None:
        return static_cache.capacity_of(self.artifact)

    @property
    def decoder_limits(self) -> DecoderLimits:
        limits, capacity = self.target.parity, self.capacity
        return DecoderLimits(
            self.exact_rel,
            limits.lowering_shipped_kl,
            limits.lowering_exact_kl,
            DECODE_STEPS if capacity is None else static_cache.STEPS,
            capacity,
        )


def verify_artifact(
    path: Path,
    *,
    model: str | None = None,
    lora: str | None = None,
    samples: Path | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    questions: Amount = "sample",
    threads: int | None = None,
) -> ParityReport:
    """Judge the export in `path` part by part and as a whole.

    `model` is the original (default: where the export came from), `lora` the adapter that is merged into it (default:
    the export's, if it has one); where the defaults cannot be loaded, the checks that need them are reported as not
    run. `samples` is a JSON Lines file of a user's own questions (see `load_questions`); the bundled model has its own,
    of which `questions` takes a sample or all. `threads` are PyTorch's and onnxruntime's (None: one for a small model,
    otherwise their own choice).

    Raises `ArtifactError` when `path` is not an export or was changed, `BadInputError` when a `model` or `samples` that
    was asked for cannot be read.
    """
    started = time.perf_counter()
    artifact = open_artifact(path)
    if artifact.manifest.layout == "gguf":
        from vlmexport.verify.gguf.run import verify_gguf

        return verify_gguf(
            artifact.part_path("decoder"),
            artifact.part_path("vision_encoder"),
            model=model,
            lora=lora,
            artifact=artifact,
            samples=samples,
            questions=questions,
            progress=progress,
            trust_remote_code=trust_remote_code,
            threads=threads,
        )
    target = load_target(artifact.manifest.target)
    if samples is not None:
        require_text(artifact)
    asked = load_questions(samples) if samples else _own_questions(artifact, questions)
    used = good_threads(_size(artifact)) if threads is None else threads
    reports = {}
    with (progress or SilentProgress()).stage("verify") as stage, torch_threads(used):
        reference, why_not = _reference(artifact, model, lora, trust_remote_code=trust_remote_code)
        for name in variant_names(artifact.manifest) or (None,):
            gate = Gate(lambda check: stage.advance(1, check))
            run = _prepare(gate, artifact if name is None else as_variant(artifact, name), target, used)
            lowering, answers, quantization = _judge(run, reference, why_not, asked)
            reports[name or ""] = ParityReport(
                checks=tuple(gate.checks),
                lowering=lowering,
                quantization=quantization,
                series=gate.series,
                runtime=_runtime_facts(run, reference, used, len(asked), time.perf_counter() - started),
                tasks=answers.tasks(),
                answers=tuple(answers.given),
            )
    return of_variants(reports)


def verify_files(
    text: Path,
    mmproj: Path | None,
    *,
    model: str | None,
    lora: str | None = None,
    samples: Path | None = None,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Judge a pair of GGUF files of any tool against `model`.

    Raises `BadInputError` when they are not files, or when the vision half or the model is not given.
    """
    from vlmexport.verify.gguf.run import verify_gguf

    if text.is_dir():
        raise BadInputError(f"{text} is a folder, whose export names its own files; --mmproj goes with a GGUF file")
    if mmproj is None or model is None:
        missing = "--mmproj (its vision half)" if mmproj is None else "--model (what it was made from)"
        raise BadInputError(f"{text} is a file; GGUF files are judged as a pair against a model: give {missing}")
    return verify_gguf(
        text,
        mmproj,
        model=model,
        lora=lora,
        samples=samples,
        progress=progress,
        trust_remote_code=trust_remote_code,
    )


def _prepare(gate: Gate, artifact: Artifact, target: Target, threads: int) -> _Run:
    """Runners on the target's provider, or on the CPU with a check that says the provider was not there."""
    import onnxruntime

    provider = target.provider
    if provider not in onnxruntime.get_available_providers():
        reason = f"onnxruntime has no {provider} here; the graphs were judged on the CPU"
        gate.not_run("runtime/provider", "runtime", "lowering", reason)
        provider = _CPU
    exact = OnnxRunner(artifact, threads=threads, exact=True, float_cache=True, provider=provider)
    rounded = OnnxRunner(artifact, threads=threads, exact=True, provider=provider)
    shipped = OnnxRunner(artifact, threads=threads, provider=provider)
    half = str(artifact.manifest.model.get("decoder_dtype")) in ("fp16", "float16")
    return _Run(gate, artifact, target, exact, rounded, shipped, half)


def _reference(
    artifact: Artifact, model: str | None, lora: str | None, *, trust_remote_code: bool
) -> tuple[Reference | None, str]:
    """The original model, or None with the reason; a model or adapter that was asked for must load."""
    source, adapter = original_source(artifact.manifest, model, lora)
    load = partial(load_reference, lora=adapter, trust_remote_code=trust_remote_code, embeddings=is_retrieval(artifact))
    if model is not None or lora is not None:
        return load(source), ""
    try:
        return load(source), ""
    except BadInputError as error:
        return None, f"the original model could not be loaded: {error}"


def _judge(
    run: _Run, reference: Reference | None, why_not: str, asked: list[Question]
) -> tuple[LoweringSummary, Answers, QuantizationSummary]:
    codes = _check_files(run, reference)
    if is_retrieval(run.artifact):
        limits, shipped = run.target.parity, run.rounded
        judged = RetrievalRun(run.gate, run.artifact, shipped, limits, run.exact_rel, why_not)
        check_retrieval(judged, reference, codes)
        return LoweringSummary(), Answers(), QuantizationSummary()
    prompts = build_prompts(run.gate, run.artifact, reference)
    parts.check_processor(run.gate, prompts.probes)
    check_preprocessor(run.gate, run.artifact, prompts.reference or prompts.exported)
    check_genai(run.gate, run.artifact, prompts.probes, run.shipped, run.target.parity.lowering_shipped_kl)
    if reference is None:
        _without_reference(run, prompts, why_not, scored=bool(asked))
        return LoweringSummary(), Answers(), QuantizationSummary()
    wanted = {p.name: parts.merged_input(reference.runner, p.reference) for p in prompts.probes if p.reference}
    check_video(run.gate, prompts.probes, reference, wanted)
    with reference.with_exported_weights(codes, run.artifact):
        _check_parts(run, reference, prompts)
        totals = _check_decoder(run, reference, wanted)
    parts.check_merged(run.gate, prompts.probes, run.shipped, wanted, run.target.parity)
    answers, quantization = _check_quantization(run, reference, prompts, asked)
    _check_engines(run, wanted)
    measured = bool(totals.kl)
    lowering = LoweringSummary(
        totals.max_abs_logit, totals.mean_kl() if measured else None, totals.top1() if measured else None
    )
    return lowering, answers, quantization


def _check_files(run: _Run, reference: Reference | None) -> dict[str, QuantizedTensor]:
    """Signatures, codes and accounting: what the files say before anything runs."""
    gate, artifact = run.gate, run.artifact
    geometry = reference.kv if reference else _manifest_geometry(artifact)
    check_structure(gate, artifact, geometry)
    if artifact.manifest.layout == TENSORRT_LAYOUT:
        check_dialect(gate, artifact)
    codes: dict[str, QuantizedTensor] = {}
    with gate.guard("decoder/codes", "decoder", "lowering"):
        codes, faults = read_codes(artifact)
        faults += prefill.prompt_codes(artifact)[1]
        faults += unrecorded_matrices(artifact)
        name = f"codes/{faults[0].weight}" if faults else "codes/all"
        part = faults[0].part if faults else "decoder"
        gate.verdict(name, part, "lowering", [f"{f.weight}: {f.reason}" for f in faults], "weights that differ")
    if reference is not None:
        missing = account(artifact, reference.decoder_parameters())
        gate.verdict("decoder/accounted", "decoder", "lowering", missing, "weights not listed once")
        changed = changed_source_files(artifact.manifest, reference.vlm)
        gate.verdict("model/source", "model", "lowering", changed, "files that differ")
    return codes


def _manifest_geometry(artifact: Artifact) -> KVGeometry:
    return KVGeometry.from_dict(artifact.manifest.model["kv"])


def _check_parts(run: _Run, reference: Reference, prompts: Prompts) -> None:
    limits, runner = run.target.parity, reference.runner
    joined = run.artifact.manifest.layout in JOINED_LAYOUTS
    check = parts.check_image_features if joined else parts.check_vision
    check(run.gate, prompts.probes, run.shipped, runner, limits)
    vocab = reference.vlm.facts.vocab_size
    parts.check_embedding(run.gate, run.shipped, runner, vocab, prompts.probes, limits)


def _check_decoder(run: _Run, reference: Reference, wanted: Mapping[str, DecoderInputs]) -> LoweringTotals:
    """The lowering of the decoder, both sides fed the original's embeddings in the graph's own precision."""
    rounded = _round_half if run.decoder_is_half else _unchanged
    given = {name: inputs.mapped(rounded) for name, inputs in wanted.items()}
    embeds = static_cache.with_room(run.gate, given, run.capacity)
    if not embeds:
        return LoweringTotals()
    runner = _branches(run, reference)
    subjects = DecoderSubjects(
        run.exact, run.shipped, runner, lambda ids: token_inputs(reference.runner, ids).mapped(rounded)
    )
    totals = check_lowering(run.gate, subjects, embeds, run.decoder_limits)
    if kv_cache.is_quantized(run.artifact):
        geometry = reference.kv
        if scales := kv_cache.check_scales(run.gate, run.artifact, geometry):
            kv_cache.check_kv_cache(run.gate, run.rounded, runner, scales, embeds, subjects.embed, run.exact_rel)
    _check_consistency(run, embeds)
    return totals


def _branches(run: _Run, reference: Reference) -> TorchRunner:
    """The reference's runner, with the prompt graph's own weights for prompts where there is one."""
    if not prefill.has_prompt_graph(run.artifact):
        return reference.runner
    return prefill.PromptReference(reference, prefill.prompt_codes(run.artifact)[0])


def _check_consistency(run: _Run, embeds: Mapping[str, DecoderInputs]) -> None:
    if run.exact.merge_spec.decoder_start_token_id is not None:
        vocabulary = int(run.artifact.manifest.model["vocab_size"])
        check_answers(run.gate, run.exact, embeds, run.exact_rel, vocabulary)
        return
    split = prefill.has_prompt_graph(run.artifact)
    left, continued = _takes_left_padding(run.artifact), in_two_prompts if split else token_by_token
    check_consistency(run.gate, run.exact, embeds, run.exact_rel, left_pad=left, continued=continued)
    if run.capacity is not None:
        static_cache.check_overfull(run.gate, run.exact, next(iter(embeds.values())), run.capacity)
    if split:
        first, geometry = next(iter(embeds.values())), _manifest_geometry(run.artifact)
        settings = SessionSettings(run.rounded.settings.threads)
        prefill.check_products(run.gate, run.artifact, settings, geometry, first, run.exact_rel)


def _check_quantization(
    run: _Run, reference: Reference, prompts: Prompts, asked: list[Question]
) -> tuple[Answers, QuantizationSummary]:
    tokens = SCORED_TOKENS if asked else UNSCORED_TOKENS
    made = answer_items(prompts, asked, drawn_amount(_size(run.artifact)))
    items = static_cache.answerable(run.gate, made, tokens, run.capacity)
    answers, summary = Answers(), QuantizationSummary()
    if not items:
        return answers, summary
    with run.gate.guard("quantization/answers", "model", "quantization"):
        answers = collect_answers(
            reference.runner,
            run.shipped,
            items,
            prompts.decode_text,
            tokens,
            reference.vlm.facts.vocab_size,
            answers_by_step if prefill.has_prompt_graph(run.artifact) else answers_in_one_prompt,
        )
        summary = judge_quantization(run.gate, answers, run.target.parity)
    return answers, summary


def _without_reference(run: _Run, prompts: Prompts, reason: str, *, scored: bool) -> None:
    """What can be judged without the original model; everything else is named as not run."""
    for name, part, side in _NEEDS_REFERENCE:
        if part in run.artifact.manifest.parts or part == "model":
            run.gate.not_run(name, part, side, reason)
    if run.target.parity.lowering_exact_kl is not None:
        run.gate.not_run("decoder/exact_kl", "decoder", "lowering", reason)
    if kv_cache.is_quantized(run.artifact):
        kv_cache.check_scales(run.gate, run.artifact, _manifest_geometry(run.artifact))
        for name in kv_cache.CHECKS:
            run.gate.not_run(name, "decoder", "lowering", reason)
    if scored:
        run.gate.not_run("quantization/accuracy", "model", "quantization", reason)
    embeds = {}
    with run.gate.guard("model/merged_inputs_run", "model", "lowering"):
        embeds = {p.name: parts.merged_input(run.shipped, p.exported) for p in prompts.probes}
    if fitting := static_cache.with_room(run.gate, embeds, run.capacity):
        _check_consistency(run, fitting)
    _check_engines(run, embeds)


def _check_engines(run: _Run, embeds: Mapping[str, DecoderInputs]) -> None:
    """What there is of engines in an export of the layout that has them, on the decoder's inputs `embeds`."""
    if run.artifact.manifest.layout == TENSORRT_LAYOUT:
        check_engines(run.gate, run.artifact, embeds)


def _takes_left_padding(artifact: Artifact) -> bool:
    return bool(artifact.manifest.model.get("attention") == "standard")


def _round_half(array: Array) -> Array:
    return array.astype(np.float16).astype(np.float32)


def _unchanged(array: Array) -> Array:
    return array


def _own_questions(artifact: Artifact, amount: Amount) -> list[Question]:
    return bundled_questions(artifact.manifest.source.get("files", {}).values(), amount)


def _size(artifact: Artifact) -> int:
    return sum(record.bytes for record in artifact.manifest.files.values())


def _runtime_facts(
    run: _Run, reference: Reference | None, threads: int, questions: int, seconds: float
) -> dict[str, Any]:
    import onnxruntime
    import torch

    return {
        "target": run.target.name,
        "provider": run.shipped.settings.provider if hasattr(run.shipped, "settings") else run.target.provider,
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "threads": threads or torch.get_num_threads(),
        "reference": reference.vlm.source if reference else None,
        "reference_codes": reference.vlm.quantized.summary if reference and reference.vlm.quantized else None,
        "questions": questions,
        "seconds": round(seconds, 2),
    }
