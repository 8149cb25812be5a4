"""Write both GGUF files: every tensor is read, transformed, quantized and written before the next one is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vlmexport import __version__
from vlmexport.errors import BadInputError
from vlmexport.gguf_options import File, GgufPlan, GgufTensor
from vlmexport.lower.gguf.codes import pack_codes
from vlmexport.lower.gguf.vocab import Vocabulary
from vlmexport.lower.gguf.writer import GgufFile
from vlmexport.manifest import QuantizedMember, QuantizedRecord
from vlmexport.model.family import MetaValue
from vlmexport.model.paging import drop_pages
from vlmexport.progress import Progress
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.blocks import quantize_rows
from vlmexport.quantize.ggml.mix import file_type
from vlmexport.quantize.ggml.types import ggml_type
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.quantize.weights import DecoderWeights

if TYPE_CHECKING:
    import torch

_CHUNK_VALUES = 1 << 20
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_UNWEIGHTED = ("F32", "F16", "BF16", "Q8_0")  # their bytes do not depend on the importance of columns


@dataclass(frozen=True)
class GgufInputs:
    """What is written: the model's weights by name, the decoder's as they are to be stored, and what goes with them.

    `importance` are the mean squares of the inputs of a tensor's columns, by GGUF name: float32 ``[columns]``, or
    ``[experts, columns]``. `imatrix_facts` are the ``quantize.imatrix.*`` keys that say where they are from.
    """

    weights: Mapping[str, torch.Tensor]
    decoder: DecoderWeights
    vocabulary: Vocabulary
    importance: Mapping[str, NDArray[np.float32]]
    imatrix_facts: Mapping[str, MetaValue]
    general: Mapping[str, MetaValue]


def emit_gguf(
    plan: GgufPlan, inputs: GgufInputs, files: Mapping[File, Path], progress: Progress, *, threads: int = 0
) -> tuple[QuantizedRecord, ...]:
    """Write the files of `plan`; the records of the codes that were handed over without loss.

    Raises `BadInputError` for NaN or infinite weights (naming the tensor) and for values that the type cannot hold.
    """
    records: list[QuantizedRecord] = []
    # PyTorch only converts dtypes here, and its waiting threads would spin against ggml's.
    with progress.stage("write GGUF", total=len(plan.tensors)) as stage, _one_torch_thread():
        for file in ("text", "mmproj"):
            tensors = plan.of(file)
            arch = plan.arch if file == "text" else "clip"
            with GgufFile(files[file], arch, _metadata(plan, inputs, file), tensors) as out:
                for tensor in tensors:
                    if tensor.scheme is None:
                        out.write(tensor.name, _rows(plan, tensor, inputs, threads))
                    else:
                        codes = _codes(tensor, inputs.decoder)
                        out.write(tensor.name, [pack_codes(_moved(codes, tensor), tensor.type, tensor.source)])
                        records.append(_record(tensor, codes))
                    stage.advance(1, tensor.name)
    return tuple(records)


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _metadata(plan: GgufPlan, inputs: GgufInputs, file: File) -> dict[str, MetaValue]:
    """All keys in writing order; ``general.architecture`` is the writer's."""
    quant = plan.options.quant if file == "text" else plan.options.mmproj_type
    general: dict[str, MetaValue] = {"general.type": "model" if file == "text" else "mmproj", **inputs.general}
    general["general.quantized_by"] = f"vlmexport {__version__}"
    keys = {**general, **plan.metadata[file]}
    keys["general.file_type"] = file_type(quant).id
    keys["general.quantization_version"] = _QUANTIZATION_VERSION
    return {**keys, **inputs.vocabulary.metadata, **inputs.imatrix_facts} if file == "text" else keys


def _rows(plan: GgufPlan, tensor: GgufTensor, inputs: GgufInputs, threads: int) -> Iterator[NDArray[Any]]:
    """The tensor's bytes, a few rows at a time where nothing but rounding is to be done."""
    if not tensor.source:
        computed = np.asarray(plan.computed[tensor.name], np.float32)
        yield _quantize(computed, tensor, None, threads)
        return
    importance = inputs.importance.get(tensor.name)
    folded = tensor.source in inputs.decoder.folds
    weight = inputs.decoder.tensor(tensor.source) if folded else inputs.weights[tensor.source]
    kind, arguments = (tensor.transform.kind, tensor.transform.arguments) if tensor.transform else (None, ())
    made = values.apply(weight, kind, arguments)[tensor.output]
    if made.ndim == 2:
        step = max(1, _CHUNK_VALUES // made.shape[1])
        for start in range(0, made.shape[0], step):
            part = made[start : start + step]
            yield _quantize(part.float().contiguous().numpy(), tensor, importance, threads)
            if kind is None:
                drop_pages(part)
    else:
        # A packed tensor [experts, rows, columns] has weights of its columns for every expert.
        for index, matrix in enumerate([made] if made.ndim < 3 or importance is None else made):
            own = importance if importance is None or importance.ndim == 1 else importance[index]
            yield _quantize(matrix.float().contiguous().numpy(), tensor, own, threads)
    drop_pages(weight)


def _quantize(
    array: NDArray[Any], tensor: GgufTensor, importance: NDArray[np.float32] | None, threads: int
) -> NDArray[Any]:
    rows = np.ascontiguousarray(array, np.float32).reshape(-1, array.shape[-1] if array.ndim else 1)
    weights = None if tensor.type in _UNWEIGHTED else importance
    return quantize_rows(rows, tensor.type, weights, threads=threads, name=tensor.source or tensor.name)


def _codes(tensor: GgufTensor, decoder: DecoderWeights) -> QuantizedTensor:
    codes = decoder.quantized(tensor.source)
    if codes.codebook is not None:
        raise BadInputError(f"{tensor.source}: GGUF holds integers, not the levels of a codebook such as NF4 or FP8")
    return codes.regrouped(ggml_type(tensor.type).block)


def _moved(codes: QuantizedTensor, tensor: GgufTensor) -> QuantizedTensor:
    """The codes with their rows in llama.cpp's order."""
    if tensor.transform is None:
        return codes
    kind, arguments = tensor.transform.kind, tensor.transform.arguments
    return codes.moved(lambda rows: values.apply(rows, kind, arguments)[0])


def _record(tensor: GgufTensor, codes: QuantizedTensor) -> QuantizedRecord:
    """The codes as the quantizer made them, in groups of a block; rows in the checkpoint's order."""
    rows, columns = codes.shape
    member = QuantizedMember(tensor.source, (0, rows), codes.digest())
    symmetric = codes.zero_point is None
    return QuantizedRecord("decoder", tensor.name, codes.bits, codes.group_size, symmetric, columns, (member,))
