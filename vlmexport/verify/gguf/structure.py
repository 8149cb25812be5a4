"""What the two files must hold, judged without running them: architecture, tensors, and every weight of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from vlmexport.gguf_options import GgufTensor
from vlmexport.quantize.ggml.types import GGML_TYPES
from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.files import GgufFile, GgufPair

_CLIP = "clip"
PARTS = {"text": "decoder", "mmproj": "vision_encoder"}


def check_architecture(gate: Gate, pair: GgufPair, arch: str | None, projector: str | None) -> bool:
    """``gguf/architecture``: a text model, and the vision half that goes with it; False when they are not even that.

    `arch` and `projector` are what the export or the model's family says; None where nobody says it.
    """
    text, mmproj = pair.text, pair.mmproj
    faults = []
    if text.arch == _CLIP:
        faults.append(f"{text.path.name} is a vision half (general.architecture clip), not a text model")
    elif arch is not None and text.arch != arch:
        faults.append(f"{text.path.name} is a model of {text.arch!r}, expected {arch!r}")
    if mmproj.arch != _CLIP:
        faults.append(f"{mmproj.path.name} is a model of {mmproj.arch!r}, not a vision half (clip)")
    elif not mmproj.value("clip.has_vision_encoder"):
        faults.append(f"{mmproj.path.name} says that it has no vision encoder")
    readable = not faults or (text.arch != _CLIP and mmproj.arch == _CLIP)
    kind = projector_type(mmproj)
    if readable and projector is not None and kind != projector:
        faults.append(f"{mmproj.path.name} has a projector of {kind!r}, expected {projector!r}")
    faults += _width_faults(pair) if readable else []
    gate.verdict("gguf/architecture", "model", "lowering", faults, "faults")
    return readable


def projector_type(mmproj: GgufFile) -> str:
    """The projector of a vision half, empty when it does not say."""
    return str(mmproj.value("clip.vision.projector_type") or mmproj.value("clip.projector_type") or "")


def _width_faults(pair: GgufPair) -> list[str]:
    """The projector must give what the text model takes."""
    width = pair.text.value(f"{pair.text.arch}.embedding_length")
    given = pair.mmproj.value("clip.vision.projection_dim")
    if width == given:
        return []
    return [
        f"{pair.mmproj.path.name} gives image embeddings of {given} values, {pair.text.path.name} takes {width}: they "
        "are halves of different models"
    ]


def check_tensors(gate: Gate, pair: GgufPair, tensors: Sequence[GgufTensor], *, types: bool) -> None:
    """``gguf/tensors[text]`` and ``[mmproj]``: the planned tensors and no others, with their shapes.

    `types`: the planned type must be the stored one as well (files of other tools choose their own).
    """
    for file, part in PARTS.items():
        planned = [t for t in tensors if t.file == file]
        name = f"gguf/tensors[{file}]"
        gate.verdict(name, part, "lowering", _tensor_faults(pair.of(file), planned, types=types), "tensors")


def _tensor_faults(file: GgufFile, planned: Sequence[GgufTensor], *, types: bool) -> list[str]:
    stored = file.tensors
    faults = []
    for tensor in planned:
        found = stored.get(tensor.name)
        if found is None:
            faults.append(f"{tensor.name} is missing ({tensor.source or 'computed'})")
        elif _squeezed(found.shape) != _squeezed(tensor.shape):
            faults.append(f"{tensor.name} has shape {list(found.shape)}, expected {list(tensor.shape)}")
        elif found.type not in GGML_TYPES:
            faults.append(f"{tensor.name} has ggml {found.type}, which is not known here")
        elif types and found.type != tensor.type:
            faults.append(f"{tensor.name} is {found.type}, the plan says {tensor.type}")
    names = {t.name for t in planned}
    return faults + [f"{name} has no place in the model" for name in stored if name not in names]


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape as ggml stores it, without leading dims of size 1."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def check_accounted(
    gate: Gate, weights: Iterable[str], tensors: Sequence[GgufTensor], unused: Mapping[str, str]
) -> None:
    """``gguf/accounted``: every weight of the model is in the files, or listed as unused with a reason, and once."""
    used: Counter[str] = Counter({source: 1 for source in {t.source for t in tensors if t.source}})
    outputs = Counter((t.source, t.output, t.file) for t in tensors if t.source)
    used.update(list(unused))
    known = set(weights)
    faults = [f"{name} is in no file and not listed as unused" for name in sorted(known - used.keys())]
    faults += [f"{name} is no weight of the model" for name in sorted(used.keys() - known)]
    faults += [f"{name} is used and listed as unused" for name, count in used.items() if count > 1]
    faults += [f"{name} is written twice" for (name, _, _), count in outputs.items() if count > 1]
    faults += [f"{name} is unused without a reason" for name, reason in unused.items() if not reason]
    gate.verdict("gguf/accounted", "model", "lowering", faults, "weights")


def complete(pair: GgufPair, tensors: Collection[GgufTensor]) -> bool:
    """True when every planned tensor can be read back, so that the model can be rebuilt from the files."""
    for tensor in tensors:
        found = pair.of(tensor.file).tensors.get(tensor.name)
        if found is None or found.type not in GGML_TYPES or _squeezed(found.shape) != _squeezed(tensor.shape):
            return False
    return True
