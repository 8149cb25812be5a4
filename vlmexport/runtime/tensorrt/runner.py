"""`TensorRtRunner`: an export of the ``tensorrt`` layout, run by its engines. Never run on a GPU: see the package."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vlmexport.engines import Sidecar, built_facts, engine_files, engine_path, sidecar_faults, specs_of
from vlmexport.errors import ArtifactError, NotPossibleHereError
from vlmexport.manifest import Artifact
from vlmexport.model.json_files import read_json_if_there
from vlmexport.model.kv import KVGeometry
from vlmexport.model.merge import MergeSpec
from vlmexport.runtime.pictures import without_padding_pictures
from vlmexport.runtime.protocol import (
    DEFAULT_RESERVE,
    Array,
    Cache,
    Extras,
    PartOutputError,
    VisionFeatures,
    feature_outputs,
    named_features,
    no_per_layer,
    require_no_extras,
)
from vlmexport.runtime.sessions import checked
from vlmexport.runtime.tensorrt.bindings import Hardware, Library, this_machine
from vlmexport.runtime.tensorrt.decoder import EngineDecoder, Step
from vlmexport.runtime.tensorrt.engine import Engine, checked_library

Checked: TypeAlias = dict[str, tuple[Library, Sidecar]]


def engine_places(artifact: Artifact) -> list[str]:
    """The folders below ``engines/`` with engines in them, whether the manifest lists them or they were built later."""
    return sorted({path.parent.name for path in engine_files(artifact.path)})


def check_place(artifact: Artifact, place: str, hardware: Hardware, only: Collection[str] | None = None) -> Checked:
    """Check the engines of `place` that the manifest lists (`only`: those of these names) against all that is said.

    That is the manifest, their sidecars, their graphs and this machine. The result has, by engine, the module that
    loads it and its sidecar. Raises what `checked_library` does for the first bad one, and `ArtifactError` where its
    sidecar is of another engine or place.
    """
    listed = place in built_facts(artifact.manifest.model)["places"]
    checked_ones: Checked = {}
    for spec in specs_of(artifact.manifest.model):
        if only is not None and spec.name not in only:
            continue
        path = engine_path(artifact.path, place, spec.name)
        library, sidecar = checked_library(path, artifact.part_path(spec.part), hardware)
        if faults := sidecar_faults(path, sidecar, spec, listed=listed):
            raise ArtifactError(f"{place}/{faults[0]}")
        checked_ones[spec.name] = library, sidecar
    return checked_ones


def fitting_place(artifact: Artifact, hardware: Hardware) -> tuple[str, Checked]:
    """The first folder of engines that this machine runs, checked.

    Raises `NotPossibleHereError` without a GPU, without engines, and where none of them fits, with each one's reason.
    """
    if not hardware.gpu.present:
        raise NotPossibleHereError(f"{artifact.path} cannot run its engines here: {hardware.gpu.reason}")
    reasons = []
    for place in engine_places(artifact):
        try:
            return place, check_place(artifact, place, hardware)
        except (ArtifactError, NotPossibleHereError) as error:
            reasons.append(f"{place}: {error}")
    raise NotPossibleHereError("; ".join(reasons) or f"{artifact.path} has no engines; run build_engines.sh in it")


class TensorRtRunner:
    """Runs an export by the engines in ``engines/<place>``; they load when first used. Satisfies `Runner`.

    `place` None: the first that fits this machine. `hardware`: what the machine has (default: what is found).
    `kernels`: a folder in which TensorRT for RTX keeps what it compiles at the first runs (`close` writes it); None: it
    compiles again in every process. The static cache does not grow: a prompt and its answer have room for
    ``limits.max_seq`` tokens, and ``reserve`` changes nothing. `only`: the engines that there are in a `place`
    where some are missing; what needs another raises `ArtifactError`.

    Raises `NotPossibleHereError` without a GPU, the library or engines that fit, `ArtifactError` when an engine of
    `place` is not what its sidecar says.
    """

    def __init__(
        self,
        artifact: Artifact,
        place: str | None = None,
        *,
        hardware: Hardware | None = None,
        kernels: Path | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        self.artifact = artifact
        self.model: dict[str, Any] = artifact.manifest.model
        self.hardware = hardware or this_machine()
        if place is None:
            self.place, self._checked = fitting_place(artifact, self.hardware)
        else:
            self.place, self._checked = place, check_place(artifact, place, self.hardware, only)
        self.kernels = kernels
        self._engines: dict[str, Engine] = {}

    @cached_property
    def merge_spec(self) -> MergeSpec:
        """How image features enter the decoder, from the manifest."""
        return MergeSpec.from_dict(self.model["merge"])

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-answer ids of the export's generation config, or else of its manifest."""
        eos = read_json_if_there(self.artifact.path / "generation_config.json").get("eos_token_id")
        if eos is None:
            eos = self.model["eos_token_ids"]
        return tuple(eos) if isinstance(eos, list) else (eos,)

    def load(self) -> float:
        """Load every engine now; seconds it took."""
        start = time.perf_counter()
        for name in self._checked:
            self._engine(name)
        return time.perf_counter() - start

    def vision(self, pixel_inputs: Mapping[str, Array]) -> VisionFeatures:
        """Vision features of all images of one prompt; names that the encoder does not know are left out.

        Raises `BadInputError` for more pictures, or tiles of them, than the engine was built for.
        """
        names = feature_outputs(spec.name for spec in self.artifact.manifest.parts["vision_encoder"].outputs)
        return self.merge_spec.encode(
            pixel_inputs, lambda inputs: self._outputs("vision_encoder", without_padding_pictures(inputs), *names)
        )

    def project(self, vision_features: VisionFeatures) -> Array:
        """Image features ``[image_tokens, hidden]``."""
        (features,) = self._outputs("projector", named_features(vision_features), "image_features")
        return checked("projector", "image_features", features, (None, self.model["hidden_size"]))

    def image_features(self, pixel_inputs: Mapping[str, Array]) -> Array:
        """``project(vision(pixel_inputs))``, packed where the family packs."""
        return self.merge_spec.packed(self.project(self.vision(pixel_inputs)), pixel_inputs)

    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        """Embeddings ``[batch, tokens, hidden]``, in as many calls as the engine's profile needs.

        Raises `BadInputError` for more rows than the engine was built for.
        """
        most = self._engine_of("embed_tokens").range_of("input_ids", 0)[1][1]
        pieces = [input_ids[:, start : start + most] for start in range(0, input_ids.shape[1], most)]
        parts = [self._outputs("embed_tokens", {"input_ids": piece}, "inputs_embeds")[0] for piece in pieces]
        embeds = np.concatenate(parts, axis=1)
        return checked("embed_tokens", "inputs_embeds", embeds, (*input_ids.shape, self.model["hidden_size"]))

    def per_layer(self, input_ids: NDArray[np.int64]) -> Array:
        """Raises `BadInputError`: no engines are made of such models yet."""
        raise no_per_layer("TensorRT")

    def prefill(
        self,
        inputs_embeds: Array,
        attention_mask: NDArray[np.int64],
        keep: int = 1,
        *,
        reserve: int = DEFAULT_RESERVE,
        extras: Extras | None = None,
    ) -> tuple[Array, Cache]:
        """Start a batch; see `Runner.prefill` and `EngineDecoder.prefill`."""
        require_no_extras(extras, "an engine")
        return self._decoder.prefill(inputs_embeds, attention_mask, keep)

    def decode(self, inputs_embeds: Array, cache: Cache, keep: int = 1, *, extras: Extras | None = None) -> Array:
        """Continue every row; see `Runner.decode` and `EngineDecoder.decode`."""
        require_no_extras(extras, "an engine")
        return self._decoder.decode(inputs_embeds, cache, keep)

    def close(self) -> None:
        """Keep the compiled kernels where a folder was given for them."""
        for engine in self._engines.values():
            engine.keep_kernels()

    @cached_property
    def _device(self) -> Any:
        return self.hardware.open_device()

    @cached_property
    def _decoder(self) -> EngineDecoder:
        steps = {
            profile.name: Step(self._engine(name), index)
            for name, (_, sidecar) in self._checked.items()
            if sidecar.spec.part == "decoder"
            for index, profile in enumerate(sidecar.spec.profiles)
        }
        if missing := sorted({"prefill", "decode"} - steps.keys()):
            raise ArtifactError(f"{self.artifact.path}: no engine of the decoder has the profile {missing[0]!r}")
        kv = self.model["kv"]
        geometry = KVGeometry.from_dict(kv)
        return EngineDecoder(self._device, steps["prefill"], steps["decode"], geometry)

    def _outputs(self, part: str, inputs: Mapping[str, Array], *outputs: str) -> tuple[Array, ...]:
        """The named outputs of the one engine of `part`."""
        engine = self._engine_of(part)
        if missing := [name for name in outputs if name not in engine.outputs]:
            raise PartOutputError(part, f"the engine has no output {missing[0]!r}; it has {list(engine.outputs)[:4]}")
        given = engine.run(inputs)
        return tuple(checked(part, name, given[name]) for name in outputs)

    def _engine_of(self, part: str) -> Engine:
        """The one engine of `part`."""
        name = next((name for name, (_, sidecar) in self._checked.items() if sidecar.spec.part == part), None)
        if name is None:
            raise ArtifactError(f"{self.artifact.path}: there is no engine of {part} in {self.place}")
        return self._engine(name)

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            library, sidecar = self._checked[name]
            path = engine_path(self.artifact.path, self.place, name)
            file = self.kernels and self.kernels / f"{self.place}-{name}.kernels"
            self._engines[name] = Engine(sidecar.spec.part, path, library, self._device, kernels_file=file)
        return self._engines[name]
