"""The gate of an export that gives embeddings: pages and queries one by one, in a batch, and how they rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.runtime.decoder_inputs import DecoderInputs, stacked
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.retrieval import RetrievalRunner
from vlmexport.runtime.retrieval_inputs import RetrievalInputs
from vlmexport.target import ParityLimits
from vlmexport.verify import parts
from vlmexport.verify.gates import Gate
from vlmexport.verify.inputs import Probe, standard_probes
from vlmexport.verify.parts import Prompt
from vlmexport.verify.reference import Reference

# The cosine between an embedding and the original's: on average, and of the worst one.
MEAN_COSINE, LEAST_COSINE = 0.97, 0.8
_NEEDS_REFERENCE = (
    ("decoder/accounted", "decoder"),
    ("vision_encoder/features", "vision_encoder"),
    ("projector/features", "projector"),
    ("embed_tokens/table", "embed_tokens"),
    ("model/merged_inputs", "model"),
    ("decoder/embeddings", "decoder"),
    ("decoder/ragged_batch", "decoder"),
    ("model/embeddings", "model"),
    ("model/ranking", "model"),
)
_LOSSES = ("quantization/mean_cosine", "quantization/least_cosine", "quantization/ranking")
Embeddings = NDArray[np.float32]


@dataclass(frozen=True)
class RetrievalRun:
    """What is judged and how: `exact_rel` limits the decoder alone, `limits` the rest; `why_not`: no reference."""

    gate: Gate
    artifact: Artifact
    exported: OnnxRunner
    limits: ParityLimits
    exact_rel: float
    why_not: str


def is_retrieval(artifact: Artifact) -> bool:
    """Does the export give embeddings instead of text?"""
    return artifact.manifest.model.get("output") == "embeddings"


def check_retrieval(run: RetrievalRun, reference: Reference | None, codes: Mapping[str, QuantizedTensor]) -> None:
    """Judge the parts and the embeddings of every probe's pages and query; `codes` are those that the graph holds.

    The original in PyTorch is asked as a whole: once with the weights that the export stores, which is the lowering,
    and once with its own, which is the quantization.
    """
    prompts, runner = _prompts(run, reference), RetrievalRunner(run.artifact, threads=run.exported.settings.threads)
    if reference is None:
        _without_reference(run, runner, prompts)
        return
    own = {p.name: _whole(reference, p.reference) for p in prompts if p.reference}
    merged = {p.name: parts.merged_input(reference.runner, p.reference) for p in prompts if p.reference}
    with reference.with_exported_weights(codes, run.artifact):
        parts.check_vision(run.gate, prompts, run.exported, reference.runner, run.limits)
        _check_table(run, reference, prompts)
        wanted = {p.name: _whole(reference, p.reference) for p in prompts if p.reference}
        inputs = {p.name: parts.merged_input(reference.runner, p.reference) for p in prompts if p.reference}
    parts.check_merged(run.gate, prompts, run.exported, merged, run.limits)
    _check_decoder(run, runner, inputs, wanted)
    limit = max(run.exact_rel, run.limits.merged_rel)
    found = _check_whole(run, runner, prompts, wanted, limit)
    if found.keys() == own.keys():
        check_losses(run.gate, found, wanted, own, (limit, run.limits.quantization_top1))
    else:
        _not_compared(run.gate, "an embedding of the export is missing")


def _check_table(run: RetrievalRun, reference: Reference, prompts: Sequence[Prompt]) -> None:
    vocab = reference.vlm.model.get_input_embeddings().weight.shape[0]
    parts.check_embedding(run.gate, run.exported, reference.runner, int(vocab), prompts, run.limits)


def _check_decoder(
    run: RetrievalRun, runner: RetrievalRunner, inputs: Mapping[str, DecoderInputs], wanted: Mapping[str, Embeddings]
) -> None:
    """``decoder/embeddings[probe]`` of the original's inputs, and ``decoder/ragged_batch`` of all, padded."""
    names = list(inputs)
    for name in names:
        with run.gate.guard(f"decoder/embeddings[{name}]", "decoder", "lowering"):
            found = runner.decoded(*stacked([inputs[name]]))
            run.gate.close(f"decoder/embeddings[{name}]", "decoder", "lowering", wanted[name], found, run.exact_rel)
    with run.gate.guard("decoder/ragged_batch", "decoder", "lowering"):
        rows, mask = stacked([inputs[name] for name in names])
        padded = np.zeros((*mask.shape, wanted[names[0]].shape[2]), np.float32)
        for row, name in zip(padded, names, strict=True):
            row[: wanted[name].shape[1]] = wanted[name][0]
        found = runner.decoded(rows, mask)
        run.gate.close("decoder/ragged_batch", "decoder", "lowering", padded, found, run.exact_rel)


def _check_whole(
    run: RetrievalRun,
    runner: RetrievalRunner,
    prompts: Sequence[Prompt],
    wanted: Mapping[str, Embeddings],
    limit: float,
) -> dict[str, Embeddings]:
    """``model/embeddings[probe]``: from pixels and words to embeddings by the export alone, which are returned."""
    made = {}
    for prompt in prompts:
        name = f"model/embeddings[{prompt.name}]"
        with run.gate.guard(name, "model", "lowering"):
            found, _ = runner.embeddings([prompt.exported])
            run.gate.close(name, "model", "lowering", wanted[prompt.name], found, limit)
            if found.shape == wanted[prompt.name].shape:
                made[prompt.name] = found
    return made


def check_losses(
    gate: Gate,
    found: Mapping[str, Embeddings],
    wanted: Mapping[str, Embeddings],
    own: Mapping[str, Embeddings],
    limits: tuple[float, float],
) -> None:
    """Judge by prompt what became of the embeddings: `found` the export's, `own` the original's.

    `wanted` are the original's with the weights that the export stores, by which the queries must order the pages but
    for the first of `limits`: the lowering. Cosines of `found` with `own`, and the share of pairs of pages ordered as
    by `own` (the second of `limits`), are the quantization.
    """
    cosines = np.concatenate([_cosines(own[name][0], found[name][0]) for name in own])
    scores = {name: _scores(one) for name, one in (("own", own), ("wanted", wanted), ("found", found))}
    lowered, kept = (order_agreement(scores[name], scores["found"]) for name in ("wanted", "own"))
    gate.at_least("model/ranking", "model", "lowering", lowered, 1 - limits[0], "pairs in order")
    gate.at_least(_LOSSES[0], "model", "quantization", float(cosines.mean()), MEAN_COSINE, "cosine")
    gate.at_least(_LOSSES[1], "model", "quantization", float(cosines.min()), LEAST_COSINE, "cosine")
    gate.at_least(_LOSSES[2], "model", "quantization", kept, limits[1], "pairs in order")
    gate.series["retrieval/scores_original"] = tuple(float(value) for value in scores["own"].ravel())
    gate.series["retrieval/scores"] = tuple(float(value) for value in scores["found"].ravel())


def _scores(made: Mapping[str, Embeddings]) -> NDArray[np.float64]:
    """The score of every page for every query ``[queries, pages]``."""
    pages = [rows[0] for name, rows in made.items() if name.startswith("page")]
    queries = [rows[0] for name, rows in made.items() if name.startswith("query")]
    return np.array([[max_sim(query, page) for page in pages] for query in queries])


def _not_compared(gate: Gate, reason: str) -> None:
    """Name the checks of `check_losses` as not run."""
    for name in _LOSSES:
        gate.not_run(name, "model", "quantization", reason)
    gate.not_run("model/ranking", "model", "lowering", reason)


def max_sim(query: Embeddings, page: Embeddings) -> float:
    """The late-interaction score: for each embedding of the query ``[S, W]`` its best one of the page, summed."""
    return float((query.astype(np.float64) @ page.astype(np.float64).T).max(axis=1).sum())


def order_agreement(wanted: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    """Share of pairs of pages that each query orders alike; scores ``[queries, pages]``.

    A pair whose scores the reference tells apart by more counts more, so that ties count nothing; 0 for scores that
    are not finite.
    """
    first, second = np.triu_indices(wanted.shape[1], 1)
    gaps, others = wanted[:, first] - wanted[:, second], found[:, first] - found[:, second]
    if not np.isfinite(others).all() or not np.abs(gaps).sum():
        return 0.0
    return float((np.abs(gaps) * (np.sign(gaps) == np.sign(others))).sum() / np.abs(gaps).sum())


def _cosines(one: Embeddings, other: Embeddings) -> NDArray[np.float64]:
    a, b = one.astype(np.float64), other.astype(np.float64)
    made: NDArray[np.float64] = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return made


def _whole(reference: Reference, inputs: ModelInputs | None) -> Embeddings:
    """Embeddings ``[1, tokens, width]`` of the original as a whole, on a page's or query's inputs."""
    assert inputs is not None
    model: Any = reference.vlm.model
    ids = torch.from_numpy(inputs.input_ids)
    pixels = {name: torch.from_numpy(np.require(a, requirements=["C", "W"])) for name, a in inputs.pixel_inputs.items()}
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), **_token_types(model, ids), **pixels)
    return np.asarray(out.embeddings.float().numpy(), np.float32)


def _token_types(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Token types where the model inside tells prompts by them: all of a page or a query is prompt."""
    import inspect

    takes = "token_type_ids" in inspect.signature(model.base_model.forward).parameters
    return {"token_type_ids": torch.zeros_like(ids)} if takes else {}


def _prompts(run: RetrievalRun, reference: Reference | None) -> list[Prompt]:
    """A page of each picture of the probes and a query of each text, by both processors; then their comparison."""
    trust = reference.vlm.trust_remote_code if reference else False
    own = RetrievalInputs(reference.vlm.path, trust_remote_code=trust) if reference else None
    try:
        exported = RetrievalInputs(run.artifact.path, trust_remote_code=trust)
    except BadInputError as error:
        if own is None:
            raise
        run.gate.fail("processor/load", "processor", "lowering", str(error))
        exported = own
    made = []
    for probe in standard_probes():
        for name, item in _items(probe):
            with run.gate.guard(f"processor/probe[{name}]", "processor", "lowering"):
                wanted = None if own is None else own(item)
                made.append(Prompt(name, exported(item), wanted))
    parts.check_processor(run.gate, made)
    return made


def _items(probe: Probe) -> list[tuple[str, Any]]:
    pages = [(f"page.{probe.name}{index or ''}", image) for index, image in enumerate(probe.images)]
    return [*pages, (f"query.{probe.name}", probe.text)]


def _without_reference(run: RetrievalRun, runner: RetrievalRunner, prompts: Sequence[Prompt]) -> None:
    """That the export runs and gives embeddings of length 1; everything else is named as not run."""
    for name, part in _NEEDS_REFERENCE:
        run.gate.not_run(name, part, "lowering", run.why_not)
    for name in _LOSSES:
        run.gate.not_run(name, "model", "quantization", run.why_not)
    for prompt in prompts:
        name = f"model/length[{prompt.name}]"
        with run.gate.guard(name, "model", "lowering"):
            found, _ = runner.embeddings([prompt.exported])
            error = float(np.abs(np.linalg.norm(found, axis=-1) - 1).max())
            run.gate.at_most(name, "model", "lowering", error, run.exact_rel, "abs")
