"""The graph of ``--with-preprocessor``, judged by the Hugging Face processor on pictures of many sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlmexport.errors import UnsupportedModelError
from vlmexport.manifest import PREPROCESSOR_PART, Artifact, TensorSpec
from vlmexport.runtime.preprocessor import PixelDifference, Preprocessor, ProcessorTensors, feeds, pixel_difference
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.split.parts import Role
from vlmexport.split.preprocess import describe_processor
from vlmexport.verify.gates import Gate
from vlmexport.verify.inputs import draw_picture, standard_probes
from vlmexport.verify.metrics import Array
from vlmexport.verify.structure import graph_signature

SIGNATURE = f"{PREPROCESSOR_PART}/signature"
PIXELS = f"{PREPROCESSOR_PART}/pixels"
DIFFERING = f"{PREPROCESSOR_PART}/differing_pixels"
# docs/decisions/0061: one level of 255 (and the rounding of float32), on one value in a thousand. Measured: none.
LEVELS, SHARE = 1.01, 1e-3
# Width and height: a dot, one row, one column, tiny, wide, tall, and larger than most encoders take.
_SIZES = ((1, 1), (90, 1), (1, 61), (23, 17), (301, 120), (97, 410), (1100, 730), (520, 1000))


def check_preprocessor(gate: Gate, artifact: Artifact, builder: PromptBuilder, threads: int = 0) -> None:
    """``preprocessor/signature``, ``preprocessor/pixels[WxH]`` and, over all, ``preprocessor/differing_pixels``.

    The pixels are judged by their largest difference in levels of 255; tensors of whole numbers, names, shapes and
    dtypes must be the same. A picture that the processor refuses is not run. Exports without the graph have no check.
    """
    if PREPROCESSOR_PART not in artifact.manifest.parts:
        if artifact.manifest.plan.get("options", {}).get("preprocessor"):
            gate.fail(SIGNATURE, PREPROCESSOR_PART, "lowering", "the export has no such part")
        return
    with gate.guard(SIGNATURE, PREPROCESSOR_PART, "lowering"):
        gate.verdict(SIGNATURE, PREPROCESSOR_PART, "lowering", _signature_faults(artifact), "faults")
    _check_pixels(gate, artifact, builder, threads)


def _signature_faults(artifact: Artifact) -> list[str]:
    """What is not as the manifest says, or as the vision encoder needs it."""
    recorded, encoder = artifact.manifest.parts[PREPROCESSOR_PART], artifact.manifest.parts[Role.VISION_ENCODER]
    inputs, outputs = graph_signature(artifact.part_path(PREPROCESSOR_PART))
    faults = [f"inputs {list(inputs)} are not those of the manifest"] if _other(inputs, recorded.inputs) else []
    faults += [f"outputs {list(outputs)} are not those of the manifest"] if _other(outputs, recorded.outputs) else []
    try:
        feeds(tuple(outputs.values()), encoder.inputs)
    except UnsupportedModelError as error:
        faults.append(str(error))
    return faults


def _other(found: Mapping[str, TensorSpec], recorded: Sequence[TensorSpec]) -> bool:
    return found != {spec.name: spec for spec in recorded}


def _check_pixels(gate: Gate, artifact: Artifact, builder: PromptBuilder, threads: int) -> None:
    found: list[PixelDifference] = []
    with gate.guard(PIXELS, PREPROCESSOR_PART, "lowering"):
        reference = ProcessorTensors(builder.processor, builder)
        graph = Preprocessor(artifact.part_path(PREPROCESSOR_PART), threads)
        level = describe_processor(builder.processor).level
        for picture in _pictures():
            name = f"{PIXELS}[{picture.shape[1]}x{picture.shape[0]}]"
            apart = _apart(gate, name, (reference, graph), picture, level)
            if apart is not None:
                found.append(apart)
    values = sum(apart.values for apart in found)
    if values:
        share = sum(apart.differing for apart in found) / values
        gate.at_most(DIFFERING, PREPROCESSOR_PART, "lowering", share, SHARE, "share of values")
    else:
        reason = "no picture could be compared"
        gate.not_run(DIFFERING, PREPROCESSOR_PART, "lowering", reason, "share of values")


def _apart(
    gate: Gate,
    name: str,
    sides: tuple[ProcessorTensors, Preprocessor],
    picture: Array,
    level: tuple[float, float, float],
) -> PixelDifference | None:
    """Judge one picture; None where there is nothing to measure."""
    from PIL import Image

    reference, graph = sides
    try:
        wanted = reference(Image.fromarray(picture), graph.outputs)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        gate.not_run(name, PREPROCESSOR_PART, "lowering", f"the processor refuses this picture: {error}", "levels")
        return None
    with gate.guard(name, PREPROCESSOR_PART, "lowering"):
        apart = pixel_difference(wanted, graph(picture), level)
        if apart.fault:
            gate.fail(name, PREPROCESSOR_PART, "lowering", apart.fault, metric="levels <=", limit=LEVELS)
            return None
        gate.at_most(name, PREPROCESSOR_PART, "lowering", apart.levels, LEVELS, "levels")
        return apart
    return None


def _pictures() -> list[Array]:
    """The gate's own pictures, and half noise, half drawing in every further size."""
    drawn = [np.asarray(probe.images[0]) for probe in standard_probes() if len(probe.images) == 1]
    return [*drawn, *(_mixed(width, height) for width, height in _SIZES)]


def _mixed(width: int, height: int) -> Array:
    rng = np.random.default_rng(width * 10_000 + height)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture = np.array(draw_picture(width, height, width))
    half = max(height, width) // 2
    if width > height:
        picture[:, half:] = noise[:, half:]
    else:
        picture[half:] = noise[half:]
    return picture
