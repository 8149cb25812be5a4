"""The preprocessing graph of an export, the processor that it repeats, and how far apart the two are on one picture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.manifest import PREPROCESSOR_PART, TensorSpec
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import Array, PartOutputError
from vlmexport.runtime.sessions import SessionSettings, open_session, part_errors

if TYPE_CHECKING:
    from PIL.Image import Image

_GRID = {"rows", "cols"}  # what a processor of square tiles tells only when it is asked
_PIXELS = "pixel_values"


class Preprocessor:
    """The graph at `path`, run on the CPU by ONNX Runtime."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        self.session = open_session(path, PREPROCESSOR_PART, SessionSettings(threads))
        self.outputs = tuple(output.name for output in self.session.get_outputs())
        inputs = [(i.name, i.type) for i in self.session.get_inputs()]
        if [kind for _, kind in inputs] != ["tensor(uint8)"]:
            raise PartOutputError(PREPROCESSOR_PART, f"the graph takes {inputs}, not one picture of uint8")
        self._input = inputs[0][0]

    def __call__(self, picture: Array) -> dict[str, Array]:
        """The tensors of one RGB picture, uint8 ``[height, width, 3]``; raises `PartOutputError` if it does not run."""
        with part_errors(PREPROCESSOR_PART, "does not run"):
            arrays: Sequence[Array] = self.session.run(None, {self._input: np.ascontiguousarray(picture)})
        return dict(zip(self.outputs, arrays, strict=True))


class ProcessorTensors:
    """The Hugging Face processor of a folder: one picture in, its tensors out.

    Where the processor does not load (a package that its video half needs, say) it is the image processor alone.
    """

    def __init__(self, processor: Any, builder: PromptBuilder | None = None) -> None:
        self.processor = processor
        self._builder = builder

    @staticmethod
    def load(folder: Path, *, trust_remote_code: bool = False) -> ProcessorTensors:
        """Of `folder`; raises `BadInputError` when neither the processor nor the image processor loads."""
        try:
            builder = PromptBuilder(folder, trust_remote_code=trust_remote_code)
            return ProcessorTensors(builder.processor, builder)
        except BadInputError as error:
            try:
                return ProcessorTensors(_image_processor(folder, trust_remote_code=trust_remote_code))
            except (OSError, ValueError, KeyError, ImportError):
                raise error from None

    def __call__(self, picture: Image, names: Sequence[str]) -> dict[str, Array]:
        """All that the processor makes of `picture`, and of ``rows`` and ``cols`` those that are in `names`.

        Raises `ValueError` and the like as the processor does, for a picture that it refuses.
        """
        if self._builder is None:
            found = self._alone([picture])
        else:
            found = dict(self._builder.build([picture], "?").pixel_inputs)
        if grid := _GRID & set(names) - found.keys():
            told = self._alone([[picture]], return_row_col_info=True)
            found.update({name: told[name] for name in grid})
        return found

    def _alone(self, pictures: Any, **settings: Any) -> dict[str, Array]:
        image_processor = getattr(self.processor, "image_processor", self.processor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            made = image_processor(images=pictures, return_tensors="pt", **settings)
        return {name: np.asarray(value) for name, value in made.items()}


def _image_processor(folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoImageProcessor

    load: Any = AutoImageProcessor.from_pretrained
    return load(folder, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class PixelDifference:
    """How far the graph's tensors are from the processor's.

    `levels`: the largest difference of ``pixel_values`` in units of one of a pixel's 256 levels; `differing` of
    `values` are not the very same number. `fault` names tensors that are missing, of another shape or dtype, or whose
    whole numbers differ; nothing else is measured then.
    """

    levels: float = 0.0
    differing: int = 0
    values: int = 0
    fault: str = ""


def pixel_difference(
    wanted: Mapping[str, Array], found: Mapping[str, Array], level: tuple[float, float, float]
) -> PixelDifference:
    """Compare the processor's tensors with the graph's; `level` is `Preprocessing.level`."""
    if wanted.keys() != found.keys():
        return PixelDifference(fault=f"tensors {sorted(found)}, the processor makes {sorted(wanted)}")
    for name, array in wanted.items():
        other = found[name]
        if (array.shape, array.dtype) != (other.shape, other.dtype):
            return PixelDifference(
                fault=f"{name} is {other.dtype} {other.shape}, the processor makes {array.dtype} {array.shape}"
            )
        if array.dtype.kind != "f" and not np.array_equal(array, other):
            return PixelDifference(fault=f"{name} differs")
    pixels, other = wanted[_PIXELS], found[_PIXELS]
    if not np.isfinite(other).all():
        return PixelDifference(fault=f"{_PIXELS} has values that are NaN or infinite")
    apart = np.abs(pixels.astype(np.float64) - other)
    return PixelDifference(
        float((apart / _per_value(level, apart)).max()), int(np.count_nonzero(pixels != other)), int(pixels.size)
    )


def _per_value(level: tuple[float, float, float], pixels: Array) -> Array:
    """One level for each value: channels are the third last axis, or follow one another in flat patches."""
    steps = np.asarray(level)
    if pixels.ndim == 2:
        return np.repeat(steps, pixels.shape[1] // 3)
    return steps[:, None, None]


def feeds(outputs: Sequence[TensorSpec], encoder: Sequence[TensorSpec]) -> None:
    """Raise `UnsupportedModelError` when the graph's outputs are not what the vision encoder takes."""
    made = {spec.name: spec for spec in outputs}
    for wanted in encoder:
        spec = made.get(wanted.name)
        if spec is None:
            raise UnsupportedModelError(
                f"--with-preprocessor: the vision encoder takes {wanted.name}, which no preprocessing graph makes yet; "
                "export without it and run the processor itself"
            )
        if spec.dtype != wanted.dtype or not _fits(spec.dims, wanted.dims):
            raise UnsupportedModelError(
                f"--with-preprocessor: the image processor makes {spec.name} of dims {list(spec.dims)}, "
                f"the vision encoder takes {list(wanted.dims)}"
            )


def _fits(made: Sequence[int | str], wanted: Sequence[int | str]) -> bool:
    known = [isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(made, wanted, strict=False)]
    return len(made) == len(wanted) and not any(known)
