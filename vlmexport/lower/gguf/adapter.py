"""A LoRA adapter as a GGUF file that llama.cpp applies over the base's text model (``--lora FILE.gguf``).

llama.cpp adds ``alpha / rank * B (A x)`` to a product, with one alpha for the whole file and the rank of each pair
(``src/llama-adapter.cpp`` of b11549). Where PEFT's factor is another one (rsLoRA, alpha patterns), the difference is
multiplied into ``B``. Weights whose rows llama.cpp stores in another order have the rows of their ``B`` moved likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.gguf_options import GgufOptions, GgufPlan, GgufTensor
from vlmexport.lower.gguf.writer import GgufFile
from vlmexport.model.family import MetaValue
from vlmexport.model.lora import MERGE_INSTEAD, LowRank
from vlmexport.progress import Progress
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.types import ggml_type

if TYPE_CHECKING:
    import torch

AdapterType = Literal["F32", "F16"]
EMBEDDING = "token_embd.weight"
_FILE_TYPES = {"F32": 0, "F16": 1}  # LLAMA_FTYPE_ALL_F32, LLAMA_FTYPE_MOSTLY_F16
_F16_OVERFLOW = 65520  # rounds to infinity


@dataclass(frozen=True)
class AdapterGguf:
    """A written adapter: its file, what it changes (GGUF names) and its alpha."""

    path: Path
    arch: str
    alpha: float
    changed: tuple[str, ...]
    bytes: int


def export_adapter(
    source: str, out: Path, base: str, outtype: str, force: bool, progress: Progress, trust_remote_code: bool = False
) -> AdapterGguf:
    """Write the PEFT adapter `source` of the model `base` to `out`; see `vlmexport.api.export_lora`."""
    from vlmexport.gguf_plan import plan_gguf
    from vlmexport.model.load import load_vlm
    from vlmexport.model.lora import low_rank_updates
    from vlmexport.model.lora_files import read_adapter

    _check_file(out, force)
    adapter = read_adapter(source)
    with progress.stage("load base"):
        vlm = load_vlm(base, trust_remote_code=trust_remote_code)
    with progress.stage("write adapter"):
        updates = low_rank_updates(vlm.model, adapter)
        plan = plan_gguf(vlm, GgufOptions(quant="F16", imatrix="none"))
        general: dict[str, MetaValue] = {"general.name": adapter.path.resolve().name, "general.base_model.count": 1}
        general["general.base_model.0.name"] = adapter.config.base_model or base
        kind: AdapterType = "F16" if outtype == "f16" else "F32"
        return write_adapter(out, plan, updates, adapter.config.alpha, kind, general)


def _check_file(out: Path, force: bool) -> None:
    if out.is_dir():
        raise BadInputError(f"--out {out} is a folder; give the file to write")
    if not out.parent.is_dir():
        raise BadInputError(f"--out {out}: the folder {out.parent} does not exist")
    if out.exists() and not force:
        raise BadInputError(f"--out {out} exists; use --force to replace it, or choose another file")


def write_adapter(
    path: Path,
    plan: GgufPlan,
    updates: Mapping[str, LowRank],
    alpha: float,
    kind: AdapterType = "F32",
    general: Mapping[str, MetaValue] | None = None,
) -> AdapterGguf:
    """Write `updates` (by parameter name) to `path`; `plan` is the base's, `alpha` the adapter's own.

    The file is built beside `path` and renamed. Raises `UnsupportedModelError` for an update of a weight that
    llama.cpp's adapters do not reach, `BadInputError` for values that F16 does not hold.
    """
    pairs = [pair for update in updates.values() for pair in _pairs(plan, update, alpha)]
    arrays = {name: _stored(name, array, kind) for name, array in _halves(pairs)}
    tensors = [
        GgufTensor(name, "text", array.shape, kind, "adapter", bytes=ggml_type(kind).size(array.shape))
        for name, array in arrays.items()
    ]
    metadata: dict[str, MetaValue] = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
        **(general or {}),
        "general.file_type": _FILE_TYPES[kind],
        "general.quantization_version": 2,
    }
    partial = path.with_name(f".{path.name}.partial")
    try:
        with GgufFile(partial, plan.arch, metadata, tensors) as out:
            for name, array in arrays.items():
                out.write(name, [array])
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return AdapterGguf(path, plan.arch, float(alpha), tuple(name for name, _, _ in pairs), path.stat().st_size)


_Pair = tuple[str, "torch.Tensor", "torch.Tensor"]


def _pairs(plan: GgufPlan, update: LowRank, alpha: float) -> Iterator[_Pair]:
    """GGUF name, ``lora_a`` and ``lora_b`` of every tensor that the updated weight becomes."""
    _check_reachable(plan, update)
    rank = update.a.shape[0]
    b = update.b * (update.scaling / (alpha / rank if alpha else 1.0))  # alpha 0: llama.cpp multiplies by 1
    for tensor in (t for t in plan.tensors if t.source == update.parameter):
        if update.embedding:
            yield tensor.name, update.a.T, b
            continue
        kind, arguments = (tensor.transform.kind, tensor.transform.arguments) if tensor.transform else (None, ())
        moved = values.apply(b, kind, arguments)[tensor.output] if values.moves_rows_only(kind) else b
        if not values.moves_rows_only(kind) or (moved.shape[0], update.a.shape[1]) != tensor.shape:
            raise UnsupportedModelError(
                f"{update.parameter} becomes {tensor.name} in another form ({kind or 'reshaped'}), so its low-rank "
                f"update has none there; {MERGE_INSTEAD}"
            )
        yield tensor.name, update.a, moved


def _check_reachable(plan: GgufPlan, update: LowRank) -> None:
    name = update.parameter
    found = [t for t in plan.tensors if t.source == name]
    if any(t.file == "mmproj" for t in found):
        raise UnsupportedModelError(
            f"{name} is on the vision side: llama.cpp's adapters reach the text model only; {MERGE_INSTEAD}"
        )
    if not found:
        reason = plan.unused.get(name, "it is nowhere in the file")
        raise UnsupportedModelError(f"{name} cannot be adapted in llama.cpp: {reason}; {MERGE_INSTEAD}")
    if _shared(plan, found[0]):
        raise UnsupportedModelError(
            f"{name} cannot be adapted alone in llama.cpp: it reads {found[0].name} for the LM head too; "
            f"{MERGE_INSTEAD}"
        )


def _shared(plan: GgufPlan, tensor: GgufTensor) -> bool:
    """Whether llama.cpp also reads the embedding as the LM head: it does where there is no ``output.weight``."""
    return tensor.name == EMBEDDING and not any(t.name == "output.weight" for t in plan.of("text"))


def _halves(pairs: list[_Pair]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, a, b in pairs:
        yield f"{name}.lora_a", a
        yield f"{name}.lora_b", b


def _stored(name: str, tensor: torch.Tensor, kind: AdapterType) -> NDArray[Any]:
    array: NDArray[Any] = np.ascontiguousarray(tensor.numpy(), np.float32)
    if kind == "F32":
        return array
    largest = float(np.abs(array).max(initial=0))
    if largest >= _F16_OVERFLOW:
        raise BadInputError(f"{name} has values up to {largest:.3g}, F16 holds 65504; choose --outtype f32")
    return array.astype(np.float16)
