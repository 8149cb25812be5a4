"""``--with-preprocessor``: refuse a processor without a graph before any work, and write the graph of one with it."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.lower.onnx.layouts.split import part_file
from vlmexport.lower.onnx.preprocess import lower_preprocessor
from vlmexport.lower.result import Emitted
from vlmexport.manifest import PREPROCESSOR_PART
from vlmexport.model.source import resolve_source
from vlmexport.runtime.preprocessor import Preprocessor, ProcessorTensors, feeds, pixel_difference
from vlmexport.split.parts import Role, Split
from vlmexport.split.preprocess import Preprocessing, describe_processor

FILE = f"{PREPROCESSOR_PART}.onnx"
_LAYOUT = "split"
# Width and height of the pictures that are compared before any work; `vlmexport.verify.preprocessor` has more.
_SIZES = ((41, 23), (19, 67), (120, 120))
_LEVEL = 1.01  # one level, and the rounding of float32


def proven_preprocessor(model: str, layout: str, opset: int, *, trust_remote_code: bool) -> ir.Model:
    """The graph of the image processor of `model` (a folder, hub id or ``demo``), compared with it; loads no model.

    Raises `BadInputError` when the processor does not load, and `UnsupportedModelError` naming a setting without a
    graph form, or the picture on which graph and processor differ.
    """
    if layout != _LAYOUT:
        raise BadInputError(f"--with-preprocessor goes with --layout {_LAYOUT}, not with {layout}")
    folder = resolve_source(model, trust_remote_code=trust_remote_code)
    reference = ProcessorTensors.load(folder, trust_remote_code=trust_remote_code)
    steps = describe_processor(reference.processor)
    graph = lower_preprocessor(steps, opset)
    prove(graph, steps, reference)
    return graph


def check_outputs(graph: ir.Model, split: Split) -> None:
    """Raise `UnsupportedModelError` when the graph's outputs are not what the vision encoder takes."""
    feeds(part_file(graph, FILE).outputs, split.parts[Role.VISION_ENCODER].signature.inputs)


def with_preprocessor(emitted: Emitted, graph: ir.Model, folder: Path) -> Emitted:
    """Write `graph` into `folder` as a further part of `emitted`."""
    ir.save(graph, folder / FILE)
    return dataclasses.replace(emitted, parts={**emitted.parts, PREPROCESSOR_PART: part_file(graph, FILE)})


def prove(graph: ir.Model, steps: Preprocessing, reference: ProcessorTensors) -> None:
    """Compare `graph`, which was made from `steps`, with the processor: a class may do more than its settings say.

    Raises `UnsupportedModelError` naming the picture on which they differ.
    """
    from PIL import Image

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="vlmexport-") as folder:
        path = Path(folder) / FILE
        ir.save(graph, path)
        session = Preprocessor(path, threads=1)
        for width, height in _SIZES:
            picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            wanted = reference(Image.fromarray(picture), session.outputs)
            apart = pixel_difference(wanted, session(picture), steps.level)
            if apart.fault or not apart.levels <= _LEVEL:
                reason = apart.fault or f"pixels by up to {apart.levels:.0f} of 255 levels"
                raise UnsupportedModelError(
                    f"--with-preprocessor: a graph by the settings of the image processor differs from it on a "
                    f"{width}x{height} picture: {reason}; export without it and run the processor itself"
                )
