"""The engines of an export: are they what their sidecars say, and, where a GPU that fits is here, are they right?

They are judged against ONNX Runtime on the very graphs that they were built from, which the rest of the gate judges
against PyTorch. Without a GPU they are reported as not run, with what would run them. No engine was ever run by this
project, whose machines have no such GPU: the comparisons below are tested on a stand-in for NVIDIA's module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from vlmexport.engines import (
    ENGINE_SUFFIX,
    ENGINES_FOLDER,
    LIBRARIES,
    MAX_KEPT,
    EngineSpec,
    Sidecar,
    check_sidecar,
    engine_path,
    specs_of,
)
from vlmexport.errors import ArtifactError, BadInputError, NotPossibleHereError
from vlmexport.manifest import Artifact
from vlmexport.runtime.decoder_inputs import DecoderInputs, stacked
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import Array, ModelInputs, Runner, VisionFeatures
from vlmexport.runtime.sessions import CPU_PROVIDER
from vlmexport.runtime.tensorrt.bindings import Hardware, this_machine
from vlmexport.runtime.tensorrt.runner import TensorRtRunner, check_place, engine_places
from vlmexport.target import ParityLimits, load_target
from vlmexport.verify.decoder import token_by_token
from vlmexport.verify.gates import Gate, NotRunError
from vlmexport.verify.inputs import standard_probes
from vlmexport.verify.parts import close_features
from vlmexport.verify.prompts import build

_RAGGED_STEPS = 4
_BUILT_KEYS = {"flavour", "version", "places", "reason"}


def check_engines(
    gate: Gate, artifact: Artifact, embeds: Mapping[str, DecoderInputs], *, hardware: Hardware | None = None
) -> None:
    """Judge the engines of an export of the ``tensorrt`` layout; `hardware` None: this machine's.

    `embeds`: what reaches the decoder, by probe. Checks: ``engines/listed``, the
    engines that the manifest says were built are there; ``engines/sidecar[place/name]``, from the files alone; and for
    each place ``engines/run[place]``, which is not run where no GPU fits, and otherwise sums up
    ``engines/<part>[place]``, ``engines/prefill[place/probe]``, ``engines/decode[place]`` and
    ``engines/ragged_batch[place]``. Without any engine ``engines/run`` is not run.
    """
    places = engine_places(artifact)
    hardware = hardware or this_machine()
    with gate.guard("engines/listed", "decoder", "lowering"):
        built, specs = _built(artifact), specs_of(artifact.manifest.model)
        if built["places"]:
            gate.verdict("engines/listed", "decoder", "lowering", _missing(artifact, specs, built), "engines missing")
        if not places:
            gate.not_run("engines/run", "decoder", "lowering", _why_none(built))
        for place in places:
            damaged = _check_files(gate, artifact, specs, place)
            _check_runs(gate, artifact, embeds, place, damaged, hardware)


def _built(artifact: Artifact) -> dict[str, Any]:
    built: dict[str, Any] = artifact.manifest.model["tensorrt"]["built"]
    if missing := sorted(_BUILT_KEYS - built.keys()):
        raise ArtifactError(f"{artifact.path}: model.tensorrt.built lacks {missing[0]!r}")
    return built


def _why_none(built: Mapping[str, Any]) -> str:
    reason = f"no engine was built: {built['reason'] or 'the manifest gives no reason'}"
    if built["places"]:
        reason = "the engines that the manifest lists are gone"
    return f"{reason}; run build_engines.sh of the export on the machine with the GPU, then `vlmexport verify` there"


def _missing(artifact: Artifact, specs: tuple[EngineSpec, ...], built: Mapping[str, Any]) -> list[str]:
    """Engines of the places that the manifest lists which are not there."""
    paths = [engine_path(artifact.path, place, spec.name) for place in built["places"] for spec in specs]
    return [f"{path.relative_to(artifact.path).as_posix()} is missing" for path in paths if not path.is_file()]


def _check_files(gate: Gate, artifact: Artifact, specs: tuple[EngineSpec, ...], place: str) -> list[str]:
    """``engines/sidecar[place/name]`` for every engine of a place; the names of those that failed."""
    by_name = {spec.name: spec for spec in specs}
    there = (path.stem for path in (artifact.path / ENGINES_FOLDER / place).glob(f"*{ENGINE_SUFFIX}"))
    usual = _usual_library(artifact, specs, place)
    failed = []
    for name in sorted(by_name.keys() | set(there)):
        spec = by_name.get(name)
        faults = _file_faults(artifact, spec, place, name, usual)
        part = spec.part if spec else "decoder"
        gate.verdict(f"engines/sidecar[{place}/{name}]", part, "lowering", faults, "faults")
        failed += [name] if faults else []
    return failed


def _usual_library(artifact: Artifact, specs: tuple[EngineSpec, ...], place: str) -> tuple[str, str]:
    """The library and version that most engines of a place are of; a script may have built all of them anew."""
    found: Counter[tuple[str, str]] = Counter()
    for spec in specs:
        with suppress(ArtifactError):
            said = Sidecar.read(engine_path(artifact.path, place, spec.name))
            found[said.flavour, said.version] += 1
    return found.most_common(1)[0][0] if found else ("", "")


def _file_faults(
    artifact: Artifact, spec: EngineSpec | None, place: str, name: str, usual: tuple[str, str]
) -> list[str]:
    """What is wrong with one engine, its sidecar and its graph, as far as files tell."""
    if spec is None:
        return [f"{place}/{name} is none of the engines that the manifest lists"]
    path = engine_path(artifact.path, place, name)
    try:
        if not path.is_file():
            return [f"{place}/{name}{ENGINE_SUFFIX} is missing"]
        said = Sidecar.read(path)
        check_sidecar(
            path,
            flavour=said.flavour,
            version=said.version,
            compute_capability=said.compute_capabilities[0],
            graph=artifact.part_path(spec.part),
        )
    except ArtifactError as error:
        return [str(error)]
    faults = []
    if (said.spec.name, said.spec.part) != (spec.name, spec.part):
        faults.append(f"{path.name} is the engine {said.spec.name} of {said.spec.part}, as its sidecar says")
    if [p.name for p in said.spec.profiles] != [p.name for p in spec.profiles]:
        faults.append(f"{path.name} has the profiles {[p.name for p in said.spec.profiles]}")
    if (said.flavour, said.version) != usual:
        others = " ".join(usual)
        faults.append(f"{path.name} was built by {said.flavour} {said.version}, the others of {place} by {others}")
    return faults


@dataclass(frozen=True)
class _Sides:
    """The engines of `place`, and ONNX Runtime on their graphs."""

    place: str
    engines: Runner
    graphs: Runner
    limits: ParityLimits


def _check_runs(
    gate: Gate,
    artifact: Artifact,
    embeds: Mapping[str, DecoderInputs],
    place: str,
    damaged: list[str],
    hardware: Hardware,
) -> None:
    """``engines/run[place]``: the sum of the comparisons, or why they cannot be made."""
    name = f"engines/run[{place}]"
    with gate.guard(name, "decoder", "lowering"):
        if damaged:
            raise NotRunError(f"{', '.join(damaged)}: not what the sidecar says, or without one; nothing was loaded")
        _require_fit(artifact, place, hardware)
        sides = _Sides(
            place,
            TensorRtRunner(artifact, place, hardware=hardware),
            OnnxRunner(artifact, exact=True, provider=CPU_PROVIDER),
            load_target(artifact.manifest.target).parity,
        )
        before = len(gate.checks)
        _compare_parts(gate, artifact, sides)
        _compare_decoder(gate, artifact, embeds, sides)
        made = gate.checks[before:]
        failed = [f"{check.name} failed" for check in made if check.status == "failed"]
        idle = [f"{check.name} was not run: {check.reason}" for check in made if check.status == "not_run"]
        if idle and not failed:
            raise NotRunError(idle[0])
        gate.verdict(name, "decoder", "lowering", failed, "comparisons that failed")


def _require_fit(artifact: Artifact, place: str, hardware: Hardware) -> None:
    """Raise `NotRunError`, with what to do, unless this machine can run the engines of a place."""
    try:
        check_place(artifact, place, hardware)
    except (NotPossibleHereError, ArtifactError) as error:
        said = Sidecar.read(engine_path(artifact.path, place, specs_of(artifact.manifest.model)[0].name))
        named = f" ({said.gpu})" if said.gpu else ""
        gpu = f"a GPU of compute capability {' or '.join(said.compute_capabilities)}{named}"
        raise NotRunError(
            f"{error}; to run them, copy the folder to a machine with {gpu} and {LIBRARIES[said.flavour]} "
            f"{said.version}, and run `vlmexport verify DIR` there"
        ) from error


def _compare(
    gate: Gate, name: str, part: str, sides: _Sides, limit: float, call: Callable[[Runner], VisionFeatures]
) -> None:
    """One check: what `call` makes of the engines against what it makes of ONNX Runtime.

    What the engines were not built for, a longer prompt or more pictures, is not run.
    """
    with gate.guard(name, part, "lowering"):
        wanted = call(sides.graphs)
        try:
            found = call(sides.engines)
        except BadInputError as error:
            raise NotRunError(str(error)) from error
        close_features(gate, name, part, (wanted, found), limit)


def _compare_parts(gate: Gate, artifact: Artifact, sides: _Sides) -> None:
    """``engines/vision_encoder``, ``projector`` and ``embed_tokens``: each engine gets what its graph gets."""
    parts = ("vision_encoder", "projector", "embed_tokens")
    try:
        inputs = probe_inputs(artifact)
    except (BadInputError, ValueError, TypeError) as error:
        for part in parts:
            reason = f"the export's processor makes no inputs for it: {error}"
            gate.not_run(f"engines/{part}[{sides.place}]", part, "lowering", reason)
        return
    features = cache(lambda: sides.graphs.vision(inputs.pixel_inputs))
    calls: tuple[Callable[[Runner], VisionFeatures], ...] = (
        lambda runner: runner.vision(inputs.pixel_inputs),
        lambda runner: runner.project(features()),
        lambda runner: runner.embed(inputs.input_ids),
    )
    limits = (sides.limits.vision_rel, sides.limits.projector_rel, sides.limits.embedding_rel)
    for part, limit, call in zip(parts, limits, calls, strict=True):
        _compare(gate, f"engines/{part}[{sides.place}]", part, sides, limit, call)


def probe_inputs(artifact: Artifact) -> ModelInputs:
    """A prompt with one picture, by the export's own processor; `BadInputError` where that does not load."""
    probe = next(probe for probe in standard_probes() if probe.images)
    return build(PromptBuilder(artifact.path), probe)


def _compare_decoder(gate: Gate, artifact: Artifact, embeds: Mapping[str, DecoderInputs], sides: _Sides) -> None:
    """``engines/prefill[place/probe]``, ``engines/decode[place]`` and ``engines/ragged_batch[place]``."""
    place, limit = sides.place, sides.limits.lowering_exact_rel_fp16
    limits = artifact.manifest.model["tensorrt"]["limits"]
    fitting = {probe: rows for probe, rows in embeds.items() if rows.length <= limits["max_seq"]}
    for probe in embeds.keys() - fitting.keys():
        reason = f"{embeds[probe].length} tokens do not fit the static cache of {limits['max_seq']}"
        gate.not_run(f"engines/prefill[{place}/{probe}]", "decoder", "lowering", reason)
    if not fitting:
        gate.not_run(f"engines/decode[{place}]", "decoder", "lowering", "there is no prompt that fits the cache")
        return
    for probe, rows in fitting.items():
        _compare(gate, f"engines/prefill[{place}/{probe}]", "decoder", sides, limit, partial(_last_logits, rows=rows))
    by_length = sorted(fitting.values(), key=lambda rows: rows.length)
    shortest, longest = by_length[0], by_length[-1]
    steps = partial(token_by_token, sequence=longest)
    _compare(gate, f"engines/decode[{place}]", "decoder", sides, limit, steps)
    if limits["max_batch"] > 1:
        ragged = partial(_ragged, rows=(shortest, longest.tokens(0, limits["max_seq"] - _RAGGED_STEPS)))
        _compare(gate, f"engines/ragged_batch[{place}]", "decoder", sides, limit, ragged)


def _last_logits(runner: Runner, rows: DecoderInputs) -> Array:
    """Logits ``[1, kept, vocab]`` of the last positions of a prompt, as many as one call of an engine gives."""
    return rows.prefill(runner, keep=MAX_KEPT)[0]


def _ragged(runner: Runner, rows: tuple[DecoderInputs, DecoderInputs]) -> Array:
    """Logits ``[steps + 1, 2, vocab]`` of a right-padded batch and of steps behind each row's own tokens.

    The padding and the steps repeat the rows' own values.
    """
    batch, mask = stacked(rows)
    logits, kept = batch.prefill(runner, mask)
    steps = [batch.embeds[:, i % batch.length][:, None] for i in range(_RAGGED_STEPS)]
    later = [runner.decode(step, kept)[:, -1] for step in steps]
    return np.stack([logits[:, -1], *later])
