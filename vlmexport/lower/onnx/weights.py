"""Weights of a graph, made one group at a time and streamed into its external data file.

A graph under construction holds initializers without data. Each belongs to a `WeightGroup`, which makes the arrays of
one matrix (codes, scale and zero point together) when its turn comes; they are written and forgotten, so peak memory is
one matrix and not the model. Offsets are 64-bit: files over 2 GB work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from vlmexport.lower.onnx.packing import pack_bits
from vlmexport.progress import Progress

# Below this size a tensor stays inside the graph file (ONNX tools read shapes and axes from there).
INLINE_BYTES = 1024
# Large tensors start on a page, so that a runtime can map them.
_PAGE = 4096
_ALIGN = 64


@dataclass(frozen=True)
class WeightGroup:
    """Initializers that are made together; `produce` returns one array for each, in their order."""

    values: tuple[ir.Value, ...]
    produce: Callable[[], tuple[np.ndarray, ...]]


def initializer(name: str, dtype: ir.DataType, shape: Iterable[int]) -> ir.Value:
    """An initializer without data yet."""
    return typed_value(name, dtype, list(shape))


def typed_value(name: str, dtype: ir.DataType, dims: Iterable[int | str]) -> ir.Value:
    """A value that no node makes: a graph input, say."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(list(dims)))


def stream_weights(
    model: ir.Model,
    groups: Iterable[WeightGroup],
    path: Path,
    progress: Progress,
    title: str,
    written: Mapping[str, ir.Value] | None = None,
) -> None:
    """Make every group that the graph still uses, write it beside the graph, and save the graph to `path`.

    A group whose initializers are all in `written` (those of a graph that was saved in the same folder, by name) is not
    made again: the graph refers to the other's data. Initializers that already have (lazy) data are written after the
    groups, one by one.

    External data goes to ``<path>_data``. Raises ValueError when an initializer ends without data, or when a group's
    array has another shape or dtype than its initializer.
    """
    graph = model.graph
    used = [g for g in groups if any(v.uses() for v in g.values)]
    data_path = path.with_name(path.name + "_data")
    with data_path.open("wb") as file, progress.stage(title, total=len(used)) as stage:
        for group in used:
            if not _take_written(group, written or {}):
                for value, array in zip(group.values, group.produce(), strict=True):
                    value.const_value = _store(value, array, file, data_path)
            for value in group.values:
                graph.register_initializer(value)
            stage.advance()
        for value in [v for v in graph.initializers.values() if _is_large(v)]:
            value.const_value = _store(value, _array(value), file, data_path)
    if data_path.stat().st_size == 0:
        data_path.unlink()
    empty = [name for name, value in graph.initializers.items() if value.const_value is None]
    if empty:
        raise ValueError(f"initializers without data: {', '.join(sorted(empty)[:4])}")
    ir.save(model, path)


def _take_written(group: WeightGroup, written: Mapping[str, ir.Value]) -> bool:
    """Give the group the data that another graph has written; False when one of its initializers is not there."""
    found = [written.get(str(value.name)) for value in group.values]
    pairs = [(value, other) for value, other in zip(group.values, found, strict=True) if other is not None]
    if len(pairs) < len(group.values):
        return False
    for value, other in pairs:
        if (value.dtype, value.shape) != (other.dtype, other.shape):
            raise ValueError(f"{value.name}: {value.dtype}{value.shape} here, {other.dtype}{other.shape} as written")
        value.const_value = other.const_value
    return True


def _is_large(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and not isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= INLINE_BYTES


def _array(value: ir.Value) -> np.ndarray:
    if value.const_value is None:
        raise ValueError(f"{value.name}: no data")
    return value.const_value.numpy()


def _store(value: ir.Value, array: np.ndarray, file: BinaryIO, data_path: Path) -> ir.TensorProtocol:
    name, shape, dtype = str(value.name), list(value.shape or []), value.dtype
    if dtype is None or list(array.shape) != shape or ir.DataType.from_numpy(array.dtype) != dtype:
        raise ValueError(f"{name}: made {array.dtype}{list(array.shape)}, planned {dtype}{shape}")
    stored = _pack_pairs(array) if dtype == ir.DataType.INT4 else array
    if stored.nbytes < INLINE_BYTES:
        return ir.Tensor(array, name=name)
    offset = _write_aligned(file, stored)
    return ir.ExternalTensor(
        data_path.name, offset, stored.nbytes, dtype, shape=ir.Shape(shape), name=name, base_dir=data_path.parent
    )


def _pack_pairs(array: np.ndarray) -> np.ndarray:
    """INT4 values, one per byte, as ONNX stores them: row-major, two per byte, the first in the low four bits."""
    return pack_bits(torch.from_numpy(array.reshape(-1).view(np.uint8)) & 0xF, 4).numpy()


def _write_aligned(file: BinaryIO, array: np.ndarray) -> int:
    step = _PAGE if array.nbytes >= _PAGE else _ALIGN
    offset = -(-file.tell() // step) * step
    file.write(b"\0" * (offset - file.tell()))
    np.ascontiguousarray(array).tofile(file)
    return offset
