"""TensorRT engines of an export: which there are, for which shapes, and the sidecar by which a loader knows one.

Engines lie in ``engines/<gpu or sm>/NAME.engine`` with ``NAME.engine.json`` beside them. An engine runs only on the
compute capability, with the library and version, and stands only for the graph that its sidecar names; NVIDIA's own
loaders find out late or not at all (TensorRT issues 2176, 574, 2072, 1318).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from vlmexport.manifest import PartFile

ENGINES_FOLDER = "engines"
SIDECAR_FORMAT = "vlmexport-engine"
SIDECAR_VERSION = 1
Flavour: TypeAlias = Literal["rtx", "trt"]
# Smallest, usual and largest size of a dynamic axis.
AxisRange: TypeAlias = tuple[int, int, int]
Dims: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class TrtLimits:
    """The sizes that engines are built for.

    `max_batch`: sequences at once; `max_seq`: tokens of one sequence, prompt and answer, which is the static cache's
    length; `max_images`: images, or tiles of images, that the vision encoder takes at once.
    """

    max_batch: int
    max_seq: int
    max_images: int


@dataclass(frozen=True)
class ShapeProfile:
    """One optimization profile: for every input of a graph its smallest, usual and largest shape."""

    name: str
    shapes: dict[str, tuple[Dims, Dims, Dims]]

    @staticmethod
    def of(name: str, part: PartFile, axes: Mapping[str, AxisRange]) -> ShapeProfile:
        """The profile in which every symbolic axis has the range of `axes`; ValueError for one that is not there."""
        missing = sorted({d for t in part.inputs for d in t.dims if isinstance(d, str)} - axes.keys())
        if missing:
            raise ValueError(f"{part.file}: no range for the axes {missing}")
        shapes = {}
        for tensor in part.inputs:
            sizes = [tuple(d if isinstance(d, int) else axes[d][i] for d in tensor.dims) for i in range(3)]
            shapes[tensor.name] = (sizes[0], sizes[1], sizes[2])
        return ShapeProfile(name, shapes)

    def to_dict(self) -> dict[str, Any]:
        """The profile as JSON data."""
        return {"name": self.name, "shapes": {n: [list(s) for s in shapes] for n, shapes in self.shapes.items()}}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> ShapeProfile:
        """Read `to_dict`'s data back."""
        shapes = {n: (tuple(s[0]), tuple(s[1]), tuple(s[2])) for n, s in data["shapes"].items()}
        return ShapeProfile(data["name"], shapes)


@dataclass(frozen=True)
class EngineSpec:
    """One engine to be built: `name` is the file's (``decoder``), `part` the manifest's part that it is made of."""

    name: str
    part: str
    profiles: tuple[ShapeProfile, ...]

    def to_dict(self) -> dict[str, Any]:
        """The specification as JSON data."""
        return {"name": self.name, "part": self.part, "profiles": [p.to_dict() for p in self.profiles]}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> EngineSpec:
        """Read `to_dict`'s data back."""
        return EngineSpec(data["name"], data["part"], tuple(ShapeProfile.from_dict(p) for p in data["profiles"]))


# Logits that one call of an engine may ask for in each row; more would need room for [batch, tokens, vocabulary].
MAX_KEPT = 8
_USUAL_PROMPT = 512


def decoder_profiles(part: PartFile, limits: TrtLimits) -> tuple[ShapeProfile, ShapeProfile]:
    """``prefill`` (prompts up to the cache's length) and ``decode`` (one token of every row)."""
    batch = (1, 1, limits.max_batch)
    prompt = (1, min(_USUAL_PROMPT, limits.max_seq), limits.max_seq)
    kept = (1, 1, min(MAX_KEPT, limits.max_seq))
    one = (1, 1, 1)
    return (
        ShapeProfile.of("prefill", part, {"batch_size": batch, "sequence_length": prompt, "kept_length": kept}),
        ShapeProfile.of("decode", part, {"batch_size": batch, "sequence_length": one, "kept_length": one}),
    )


def engine_specs(
    parts: Mapping[str, PartFile], limits: TrtLimits, vision_axes: Mapping[str, AxisRange], *, split_decoder: bool
) -> tuple[EngineSpec, ...]:
    """The engines of an export: one for each part, or two of the decoder (`split_decoder`), one for each profile.

    `vision_axes` are the ranges of the symbolic axes of the vision encoder and the projector.
    """
    text = (1, min(_USUAL_PROMPT, limits.max_seq), limits.max_seq)
    ranges: dict[str, Mapping[str, AxisRange]] = {
        "vision_encoder": vision_axes,
        "projector": vision_axes,
        "embed_tokens": {"batch_size": (1, 1, limits.max_batch), "sequence_length": text},
    }
    specs = [
        EngineSpec(role, role, (ShapeProfile.of(role, parts[role], axes),))
        for role, axes in ranges.items()
        if role in parts
    ]
    profiles = decoder_profiles(parts["decoder"], limits)
    if split_decoder:
        return (*specs, *(EngineSpec(f"decoder_{p.name}", "decoder", (p,)) for p in profiles))
    return (*specs, EngineSpec("decoder", "decoder", profiles))


def specs_of(model: Mapping[str, Any]) -> tuple[EngineSpec, ...]:
    """The engines that a manifest's ``model.tensorrt`` lists."""
    listed: Iterable[dict[str, Any]] = model["tensorrt"]["engines"]
    return tuple(EngineSpec.from_dict(entry) for entry in listed)


@dataclass(frozen=True)
class Sidecar:
    """What ``NAME.engine.json`` says of an engine.

    `flavour` and `version` are the library that built it and loads it (``rtx`` 1.7.1.116, ``trt`` 11.4.0.106);
    `compute_capabilities` what it runs on (``("8.0",)``; several for a portable one); `gpu` the profile it was asked
    for, or empty for a portable one; `graph` the SHA-256 of the ONNX file and of its external data, by file name;
    `engine` the SHA-256 of the engine itself.
    """

    flavour: Flavour
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str
    spec: EngineSpec
    graph: dict[str, str]
    engine: str
    bytes: int
