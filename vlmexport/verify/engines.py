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
from pathlib import Path
from typing import Any

import numpy as np

from vlmexport.engines import (
    ENGINE_SUFFIX,
    LIBRARIES,
    MAX_KEPT,
    EngineSpec,
    Sidecar,
    built_facts,
    check_sidecar,
    engine_files,
    engine_path,
    sidecar_faults,
    specs_of,
    tensorrt_facts,
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
from vlmexport.verify.decoder import short_and_long, token_by_token
from vlmexport.verify.gates import Gate, NotRunError
from vlmexport.verify.inputs import standard_probes
from vlmexport.verify.parts import close_features
from vlmexport.verify.prompts import build

_RAGGED_STEPS = 4
_PARTS = ("vision_encoder", "projector", "embed_tokens")


def check_engines(
    gate: Gate, artifact: Artifact, embeds: Mapping[str, DecoderInputs], *, hardware: Hardware | None = None
) -> None:
    """Judge the engines of an export of the ``tensorrt`` layout; `hardware` None: this machine's.

    `embeds`: what reaches the decoder, by probe. Checks: ``engines/listed``, the
    engines that the manifest says were built are there; ``engines/sidecar[place/name]``, from the files alone; and for
    each place ``engines/run[place]``, which is not run where no GPU fits, and otherwise sums up
    ``engines/<part>[place]``, ``engines/prefill[place/probe]``, ``engines/decode[place]`` and
    ``engines/ragged_batch[place]``. Without any engine ``engines/run`` is not run. In a place that the manifest does
    not list some engines may be missing, as ``build_engines.py --only`` leaves it: what needs them is not run.
    """
    places = engine_places(artifact)
    hardware = hardware or this_machine()
    with gate.guard("engines/listed", "decoder", "lowering"):
        built, specs = built_facts(artifact.manifest.model), specs_of(artifact.manifest.model)
        if built["places"]:
            gate.verdict("engines/listed", "decoder", "lowering", _missing(artifact, specs, built), "engines missing")
        if not places:
            gate.not_run("engines/run", "decoder", "lowering", _why_none(built))
        for place in places:
            subject = _Place(artifact, specs, place, place in built["places"])
            damaged = _check_files(gate, subject)
            _check_runs(gate, subject, embeds, damaged, hardware)


@dataclass(frozen=True)
class _Place:
    """A folder of engines of `artifact`, whose manifest has `specs`; `listed`: it was built with the export."""

    artifact: Artifact
    specs: tuple[EngineSpec, ...]
    name: str
    listed: bool

    def path(self, engine: str) -> Path:
        return engine_path(self.artifact.path, self.name, engine)

    @property
    def there(self) -> set[str]:
        """The names of the engines that are in it, whoever built them."""
        return {path.stem for path in engine_files(self.artifact.path, self.name)}

    @property
    def allowed_to_miss(self) -> set[str]:
        """Engines that were not built: a script may build some of a place, the export builds all of it."""
        return set() if self.listed else {spec.name for spec in self.specs} - self.there


def _why_none(built: Mapping[str, Any]) -> str:
    reason = f"no engine was built: {built['reason'] or 'the manifest gives no reason'}"
    if built["places"]:
        reason = "the engines that the manifest lists are gone"
    return f"{reason}; run build_engines.sh of the export on the machine with the GPU, then `vlmexport verify` there"


def _missing(artifact: Artifact, specs: tuple[EngineSpec, ...], built: Mapping[str, Any]) -> list[str]:
    """Engines of the places that the manifest lists which are not there."""
    paths = [engine_path(artifact.path, place, spec.name) for place in built["places"] for spec in specs]
    return [f"{path.relative_to(artifact.path).as_posix()} is missing" for path in paths if not path.is_file()]


def _check_files(gate: Gate, place: _Place) -> list[str]:
    """``engines/sidecar[place/name]`` for every engine of a place; the names of those that failed."""
    by_name = {spec.name: spec for spec in place.specs}
    usual = _usual_library(place)
    failed = []
    for name in sorted(by_name.keys() | place.there):
        spec = by_name.get(name)
        check, part = f"engines/sidecar[{place.name}/{name}]", spec.part if spec else "decoder"
        if name in place.allowed_to_miss:
            gate.not_run(check, part, "lowering", f"{place.name}/{name}{ENGINE_SUFFIX} {_UNBUILT}")
            continue
        faults = _file_faults(place, spec, name, usual)
        gate.verdict(check, part, "lowering", faults, "faults")
        failed += [name] if faults else []
    return failed


_UNBUILT = "was not built; run build_engines.sh of the export without --only"


def _usual_library(place: _Place) -> tuple[str, str]:
    """The library and version that most engines of a place are of; a script may have built all of them anew."""
    found: Counter[tuple[str, str]] = Counter()
    for spec in place.specs:
        with suppress(ArtifactError):
            said = Sidecar.read(place.path(spec.name))
            found[said.flavour, said.version] += 1
    return found.most_common(1)[0][0] if found else ("", "")


def _file_faults(place: _Place, spec: EngineSpec | None, name: str, usual: tuple[str, str]) -> list[str]:
    """What is wrong with one engine, its sidecar and its graph, as far as files tell."""
    if spec is None:
        return [f"{place.name}/{name} is none of the engines that the manifest lists"]
    path = place.path(name)
    try:
        if not path.is_file():
            return [f"{place.name}/{name}{ENGINE_SUFFIX} is missing"]
        said = Sidecar.read(path)
        check_sidecar(
            path,
            flavour=said.flavour,
            version=said.version,
            compute_capability=said.compute_capabilities[0],
            graph=place.artifact.part_path(spec.part),
        )
    except ArtifactError as error:
        return [str(error)]
    faults = sidecar_faults(path, said, spec, listed=place.listed)
    if (said.flavour, said.version) != usual:
        others = " ".join(usual)
        faults.append(f"{path.name} was built by {said.flavour} {said.version}, the others of {place.name} by {others}")
    return faults


@dataclass(frozen=True)
class _Sides:
    """The engines of `place`, and ONNX Runtime on their graphs. `missing`: parts without an engine, or without all."""

    place: str
    engines: Runner
    graphs: Runner
    limits: ParityLimits
    missing: set[str]


def _check_runs(
    gate: Gate, place: _Place, embeds: Mapping[str, DecoderInputs], damaged: list[str], hardware: Hardware
) -> None:
    """``engines/run[place]``: the sum of the comparisons, or why they cannot be made."""
    name, artifact = f"engines/run[{place.name}]", place.artifact
    with gate.guard(name, "decoder", "lowering"):
        if damaged:
            raise NotRunError(f"{', '.join(damaged)}: not what the sidecar says, or without one; nothing was loaded")
        _require_fit(place, hardware)
        sides = _Sides(
            place.name,
            TensorRtRunner(artifact, place.name, hardware=hardware, only=place.there),
            OnnxRunner(artifact, exact=True, provider=CPU_PROVIDER),
            load_target(artifact.manifest.target).parity,
            {spec.part for spec in place.specs if spec.name in place.allowed_to_miss},
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


def _require_fit(place: _Place, hardware: Hardware) -> None:
    """Raise `NotRunError`, with what to do, unless this machine can run the engines of a place."""
    try:
        check_place(place.artifact, place.name, hardware, place.there)
    except (NotPossibleHereError, ArtifactError) as error:
        said = Sidecar.read(place.path(min(place.there)))
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

    What the engines were not built for, a longer prompt or more pictures, is not run, nor is a part without engine.
    """
    with gate.guard(name, part, "lowering"):
        if part in sides.missing:
            raise NotRunError(f"an engine of {part} {_UNBUILT}")
        wanted = call(sides.graphs)
        try:
            found = call(sides.engines)
        except BadInputError as error:
            raise NotRunError(str(error)) from error
        close_features(gate, name, part, (wanted, found), limit)


def _compare_parts(gate: Gate, artifact: Artifact, sides: _Sides) -> None:
    """``engines/vision_encoder``, ``projector`` and ``embed_tokens``: each engine gets what its graph gets."""
    try:
        inputs = probe_inputs(artifact)
    except (BadInputError, ValueError, TypeError) as error:
        for part in _PARTS:
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
    for part, limit, call in zip(_PARTS, limits, calls, strict=True):
        _compare(gate, f"engines/{part}[{sides.place}]", part, sides, limit, call)


def probe_inputs(artifact: Artifact) -> ModelInputs:
    """A prompt with one picture, by the export's own processor; `BadInputError` where that does not load."""
    probe = next(probe for probe in standard_probes() if probe.images)
    return build(PromptBuilder(artifact.path), probe)


def _compare_decoder(gate: Gate, artifact: Artifact, embeds: Mapping[str, DecoderInputs], sides: _Sides) -> None:
    """``engines/prefill[place/probe]``, ``engines/decode[place]`` and ``engines/ragged_batch[place]``."""
    place, limit = sides.place, sides.limits.lowering_exact_rel_fp16
    limits = tensorrt_facts(artifact.manifest.model, "limits")["limits"]
    fitting = {probe: rows for probe, rows in embeds.items() if rows.length <= limits["max_seq"]}
    for probe in (probe for probe in embeds if probe not in fitting):
        reason = f"{embeds[probe].length} tokens do not fit the static cache of {limits['max_seq']}"
        gate.not_run(f"engines/prefill[{place}/{probe}]", "decoder", "lowering", reason)
    if not fitting:
        gate.not_run(f"engines/decode[{place}]", "decoder", "lowering", "there is no prompt that fits the cache")
        return
    for probe, rows in fitting.items():
        _compare(gate, f"engines/prefill[{place}/{probe}]", "decoder", sides, limit, partial(_last_logits, rows=rows))
    longest = max(fitting.values(), key=lambda rows: rows.length)
    steps = partial(token_by_token, sequence=longest)
    _compare(gate, f"engines/decode[{place}]", "decoder", sides, limit, steps)
    if limits["max_batch"] > 1:
        room = limits["max_seq"] - _RAGGED_STEPS
        ragged = partial(_ragged, prompts=[rows.tokens(0, room) for rows in fitting.values()])
        _compare(gate, f"engines/ragged_batch[{place}]", "decoder", sides, limit, ragged)


def _last_logits(runner: Runner, rows: DecoderInputs) -> Array:
    """Logits ``[1, kept, vocab]`` of the last positions of a prompt, as many as one call of an engine gives."""
    return rows.prefill(runner, keep=MAX_KEPT)[0]


def _ragged(runner: Runner, prompts: list[DecoderInputs]) -> Array:
    """Logits ``[steps + 1, 2, vocab]`` of a right-padded batch (`short_and_long`) and of steps behind each row's own.

    The padding and the steps repeat the rows' own values.
    """
    batch, mask = stacked(short_and_long(prompts))
    logits, kept = batch.prefill(runner, mask)
    steps = [batch.embeds[:, i % batch.length][:, None] for i in range(_RAGGED_STEPS)]
    later = [runner.decode(step, kept)[:, -1] for step in steps]
    return np.stack([logits[:, -1], *later])
