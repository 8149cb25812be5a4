"""`OnnxRunner`: an export of any ONNX layout, run by ONNX Runtime alone."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession

from vlmexport.cpu import cpu_flags, int8_gain
from vlmexport.engines import TENSORRT_LAYOUT
from vlmexport.errors import ArtifactError, BadInputError, NotPossibleHereError
from vlmexport.manifest import PREFILL_PART, Artifact
from vlmexport.model.json_files import read_json_if_there
from vlmexport.model.kv import KVGeometry
from vlmexport.model.merge import MergeSpec
from vlmexport.model.per_token import PER_LAYER
from vlmexport.runtime.cross import CrossDecoder
from vlmexport.runtime.decoder import DecoderSession
from vlmexport.runtime.pictures import without_padding_pictures
from vlmexport.runtime.protocol import (
    DEFAULT_RESERVE,
    Array,
    Cache,
    Extras,
    VisionFeatures,
    feature_outputs,
    named_features,
    no_per_layer,
)
from vlmexport.runtime.sessions import CPU_PROVIDER, PartSession, SessionSettings, checked, open_session
from vlmexport.runtime.static_decoder import StaticDecoder
from vlmexport.target import load_target
from vlmexport.variants import as_variant

PROJECTOR = "projector"
_DEVICES = {CPU_PROVIDER: "cpu", "CUDAExecutionProvider": "cuda"}


class OnnxRunner:
    """Runs an export; sessions open when first used, or all at once with `load`.

    `threads`: intra-op threads, 0 = onnxruntime's choice. `exact`, `float_cache`: see `SessionSettings`. `provider`
    overrides the target's own (a CUDA graph can be checked on the CPU). `variant` is the one to run of an export of
    several (None: its primary one). Satisfies `Runner`; exports without a projector of their own have no vision
    features.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int = 0,
        exact: bool = False,
        provider: str | None = None,
        float_cache: bool = False,
        variant: str | None = None,
    ) -> None:
        artifact = artifact if variant is None else as_variant(artifact, variant)
        self.artifact = artifact
        self.model: dict[str, Any] = artifact.manifest.model
        provider = provider or load_target(artifact.manifest.target).provider
        self.settings = SessionSettings(threads, exact, provider, float_cache)

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
        """Open every session now; seconds it took."""
        start = time.perf_counter()
        for part in (self._vision, self._projector if self._projects else None, self._embedding, self._decoder):
            del part
        return time.perf_counter() - start

    @property
    def _projects(self) -> bool:
        """Is the projector a part of its own?"""
        return PROJECTOR in self.artifact.manifest.parts

    def vision(self, pixel_inputs: Mapping[str, Array]) -> VisionFeatures:
        """Vision features of all images of one prompt; names that the encoder does not know are left out.

        Those that a projector inside the vision encoder made are image features already.
        """
        static = self.artifact.manifest.layout == TENSORRT_LAYOUT
        names: Mapping[str, str] = self.model.get("vision_names", {})

        def encode(inputs: Mapping[str, Array]) -> tuple[Array, ...]:
            given = without_padding_pictures(inputs) if static else inputs
            return self._vision.run({names.get(name, name): array for name, array in given.items()})

        return self.merge_spec.encode(pixel_inputs, encode)

    def project(self, vision_features: VisionFeatures) -> Array:
        """Image features; see `Runner.project`."""
        named = named_features(vision_features)
        features = self._projector(named) if self._projects else next(iter(named.values()))
        width = self.model["hidden_size"] * (1 + self.merge_spec.deepstack_layers)
        return checked("projector", "image_features", features, (None, width))

    def image_features(self, pixel_inputs: Mapping[str, Array]) -> Array:
        """``project(vision(pixel_inputs))``, packed where the family packs."""
        return self.merge_spec.packed(self.project(self.vision(pixel_inputs)), pixel_inputs)

    def embed(self, input_ids: NDArray[np.int64], image_features: Array | None = None) -> Array:
        """Embeddings ``[batch, tokens, hidden]``; a graph that merges puts `image_features` at the image tokens."""
        rows = self._no_features if image_features is None else image_features
        embeds = self._embedding({"input_ids": input_ids, "image_features": rows})
        return checked("embed_tokens", "inputs_embeds", embeds, (*input_ids.shape, self.model["hidden_size"]))

    def per_layer(self, input_ids: NDArray[np.int64]) -> Array:
        """What the layers get of each token; see `Runner.per_layer`."""
        if PER_LAYER not in self.merge_spec.extras:
            raise no_per_layer(str(self.artifact.path))
        rows = self._embedding.run({"input_ids": input_ids, "image_features": self._no_features})[1]
        return checked("embed_tokens", PER_LAYER, rows, (*input_ids.shape, None, None))

    def prefill(
        self,
        inputs_embeds: Array,
        attention_mask: NDArray[np.int64],
        keep: int = 1,
        *,
        reserve: int = DEFAULT_RESERVE,
        extras: Extras | None = None,
    ) -> tuple[Array, Cache]:
        """Start a batch; see `Runner.prefill`."""
        return self._decoder.prefill(inputs_embeds, attention_mask, keep, reserve, self._fed(extras))

    def decode(self, inputs_embeds: Array, cache: Cache, keep: int = 1, *, extras: Extras | None = None) -> Array:
        """Continue every row; see `Runner.decode`."""
        return self._decoder.decode(inputs_embeds, cache, keep, self._fed(extras))

    def _fed(self, extras: Extras | None) -> Extras:
        """`extras` without what the decoder's graph makes by itself."""
        made = self.model.get("made_inputs", ())
        return {name: array for name, array in (extras or {}).items() if name not in made}

    @cached_property
    def _vision(self) -> PartSession:
        names = [spec.name for spec in self.artifact.manifest.parts["vision_encoder"].outputs]
        return self._part("vision_encoder", *(feature_outputs(names) if self._projects else ("image_features",)))

    @cached_property
    def _projector(self) -> PartSession:
        return self._part("projector", "image_features")

    @property
    def _no_features(self) -> Array:
        """What an embedding graph that merges gets of a text: no rows."""
        return np.zeros((0, self.model["hidden_size"]), np.float32)

    @cached_property
    def _embedding(self) -> PartSession:
        # It runs before every decode step, and idle threads of its own would spin against the decoder's.
        settings = dataclasses.replace(self.settings, threads=1)
        names = (PER_LAYER,) if PER_LAYER in self.merge_spec.extras else ()
        return PartSession(self.artifact.part_path("embed_tokens"), "embed_tokens", settings, "inputs_embeds", *names)

    @cached_property
    def _decoder(self) -> DecoderSession | StaticDecoder | CrossDecoder:
        if self.model.get("output") == "embeddings":
            raise BadInputError(f"{self.artifact.path} gives embeddings of pages and queries; it writes no text")
        session = open_session(self.artifact.part_path("decoder"), "decoder", self.settings)
        kv, attention = self.model["kv"], self.model["attention"]
        if attention not in ("gqa", "standard", "static"):
            raise ArtifactError(f"{self.artifact.path}: attention {attention!r} is unknown; gqa, standard or static")
        geometry = KVGeometry.from_dict(kv)
        device = _DEVICES.get(self.settings.provider, "cpu")
        if attention == "static":
            return StaticDecoder(session, geometry, device)
        decoder = DecoderSession(session, geometry, attention, device, self._prompt_session())
        if not self.merge_spec.crosses:
            return decoder
        encoder = self._part("encoder", *(spec.name for spec in self.artifact.manifest.parts["encoder"].outputs))
        return CrossDecoder(decoder, encoder, self.merge_spec, self.embed)

    def _prompt_session(self) -> InferenceSession | None:
        if PREFILL_PART not in self.artifact.manifest.parts:
            return None
        gains, reason = int8_gain(cpu_flags())
        if gains is False:
            raise NotPossibleHereError(f"{self.artifact.path} was exported with --prefill int8; this CPU has {reason}")
        settings = dataclasses.replace(self.settings, rests=True)
        return open_session(self.artifact.part_path(PREFILL_PART), PREFILL_PART, settings)

    def _part(self, role: str, *outputs: str) -> PartSession:
        return PartSession(self.artifact.part_path(role), role, self.settings, *outputs)
