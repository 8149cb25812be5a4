"""An independent reader of the integers in an exported graph.

Written from the operator's documentation and docs/manifest.md, sharing no code with the emitter: if both were wrong in
the same way the digests could not agree, because the digests were taken from the logical codes before packing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.errors import ArtifactError
from vlmexport.manifest import Artifact, QuantizedRecord
from vlmexport.quantize.tensor import QuantizedTensor


@dataclass(frozen=True)
class CodeFault:
    """A quantized weight of the graph that is not what the manifest says, with the reason."""

    weight: str
    part: str
    reason: str


def unpack_low_first(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Integers of `bits` (2, 4 or 8) from bytes ``[..., n]`` as ``[..., n * 8 / bits]``, low bits first.

    Raises `ArtifactError` for other widths.
    """
    if bits not in (2, 4, 8):
        raise ArtifactError(f"codes of {bits} bits cannot be unpacked; MatMulNBits holds 2, 4 or 8")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    spread = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return spread.reshape(*packed.shape[:-1], packed.shape[-1] * shifts.size)


def unpack_matmul_nbits(
    codes: NDArray[np.uint8],
    scale: NDArray[Any],
    zero_point: NDArray[np.uint8] | None,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> QuantizedTensor:
    """The logical tensor behind the initializers of one MatMulNBits node.

    ``codes``: uint8 ``[N, groups, group_size * bits / 8]``, ``scale``: float16 or float32 ``[N, groups]`` (any shape of
    that size), ``zero_point``: uint8, each row's groups packed and padded to whole bytes. The last group may be longer
    than what is left of ``in_features``; its padding is dropped. Raises `ArtifactError` when the sizes disagree.
    """
    groups = -(-in_features // group_size)
    rows = codes.shape[0]
    if codes.shape != (rows, groups, group_size * bits // 8) or scale.size != rows * groups:
        raise ArtifactError(
            f"codes {list(codes.shape)} and scales {list(scale.shape)} do not fit {in_features} inputs in groups of "
            f"{group_size} at {bits} bits"
        )
    logical = unpack_low_first(codes, bits).reshape(rows, groups * group_size)[:, :in_features]
    zero = None
    if zero_point is not None:
        row_bytes = -(-groups * bits // 8)
        if zero_point.size != rows * row_bytes:
            raise ArtifactError(f"{zero_point.size} bytes of zero points, expected {rows} rows of {row_bytes}")
        zero = torch.from_numpy(unpack_low_first(zero_point.reshape(rows, row_bytes), bits)[:, :groups].copy())
    return QuantizedTensor(
        codes=torch.from_numpy(np.ascontiguousarray(logical)),
        scale=torch.from_numpy(np.array(scale).reshape(rows, groups)),
        zero_point=zero,
        bits=bits,
        group_size=group_size,
    )


class GraphWeights:
    """The MatMulNBits nodes of one graph file; initializers stay in the file until they are read."""

    def __init__(self, path: Path) -> None:
        import onnx_ir as ir

        self._model = ir.load(path)
        graph = self._model.graph
        self._nodes = {
            node.inputs[1].name: node
            for node in graph
            if node.op_type == "MatMulNBits" and len(node.inputs) > 2 and node.inputs[1] is not None
        }

    def initializers(self) -> list[str]:
        """Names of the quantized matrices in the graph, without the ``.codes`` ending, sorted."""
        return sorted(str(name).removesuffix(".codes") for name in self._nodes)

    def read(self, record: QuantizedRecord) -> QuantizedTensor:
        """The logical tensor of one manifest record.

        Raises `ArtifactError` when the graph has no such node, or its attributes or operands disagree with the record.
        """
        node = self._nodes.get(f"{record.initializer}.codes")
        if node is None:
            raise ArtifactError(f"no MatMulNBits node reads {record.initializer}.codes")
        rows = max(member.rows[1] for member in record.members)
        wanted = {"K": record.in_features, "N": rows, "bits": record.bits, "block_size": record.group_size}
        found = {key: node.attributes[key].as_int() if key in node.attributes else None for key in wanted}
        if found["bits"] is None:
            found["bits"] = 4  # the operator's default
        if found != wanted:
            raise ArtifactError(f"the node says {found}, the manifest {wanted}")
        operands = [value.name if value is not None and value.name else None for value in node.inputs[1:4]]
        expected = [f"{record.initializer}.codes", f"{record.initializer}.scale"]
        if not record.symmetric:
            expected.append(f"{record.initializer}.zero_point")
        if [name for name in operands if name] != expected:
            raise ArtifactError(f"the node reads {operands}, expected {expected}")
        zero_point = None if record.symmetric else self._array(expected[2])
        return unpack_matmul_nbits(
            self._array(expected[0]),
            self._array(expected[1]),
            zero_point,
            bits=record.bits,
            group_size=record.group_size,
            in_features=record.in_features,
        )

    def _array(self, name: str) -> NDArray[Any]:
        value = self._model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise ArtifactError(f"the graph has no initializer {name}")
        array: NDArray[Any] = value.const_value.numpy()
        return array


def read_members(artifact: Artifact) -> Iterator[tuple[str, str, str, QuantizedTensor | str]]:
    """Every quantized checkpoint weight of the export, one at a time.

    Yields ``(weight name, part, recorded digest, tensor)``; the tensor is the reason (a str) when it cannot be read.
    """
    by_part: dict[str, list[QuantizedRecord]] = {}
    for record in artifact.manifest.quantized:
        by_part.setdefault(record.part, []).append(record)
    for part, records in by_part.items():
        weights = GraphWeights(artifact.part_path(part))
        for record in records:
            try:
                packed = weights.read(record)
            except ArtifactError as error:
                yield from ((member.name, part, member.digest, str(error)) for member in record.members)
                continue
            for member in record.members:
                yield member.name, part, member.digest, _rows(packed, *member.rows)


def read_codes(artifact: Artifact) -> tuple[dict[str, QuantizedTensor], list[CodeFault]]:
    """All quantized weights by checkpoint name, and those whose integers are not the ones the quantizer chose.

    A weight whose digest differs is in both: the reference must run what the graph holds.
    """
    tensors: dict[str, QuantizedTensor] = {}
    faults: list[CodeFault] = []
    for name, part, digest, tensor in read_members(artifact):
        if isinstance(tensor, str):
            faults.append(CodeFault(name, part, tensor))
            continue
        tensors[name] = tensor
        if tensor.digest() != digest:
            faults.append(CodeFault(name, part, "codes, scales or zero points differ from what the quantizer chose"))
    return tensors, faults


def unrecorded_matrices(artifact: Artifact) -> list[CodeFault]:
    """MatMulNBits nodes of the quantized graphs that the manifest does not list."""
    faults = []
    for part in sorted({record.part for record in artifact.manifest.quantized}):
        listed = {r.initializer for r in artifact.manifest.quantized if r.part == part}
        present = GraphWeights(artifact.part_path(part)).initializers()
        faults += [
            CodeFault(name, part, "is in the graph but not in the manifest") for name in present if name not in listed
        ]
    return faults


def account(artifact: Artifact, parameters: Iterable[frozenset[str]]) -> list[str]:
    """Faults in the accounting of the decoder's parameters: each exactly once in ``quantized`` or ``unquantized``.

    `parameters` holds one set of names per parameter (several when it is tied: one entry under each name is allowed).
    """
    manifest = artifact.manifest
    counts = Counter(member.name for record in manifest.quantized for member in record.members)
    counts.update(kept.name for kept in manifest.unquantized)
    faults = [f"{name} is listed {count} times" for name, count in sorted(counts.items()) if count > 1]
    for names in parameters:
        if not any(counts[name] for name in names):
            faults.append(f"{min(names)} is in neither quantized nor unquantized")
    return faults


def _rows(packed: QuantizedTensor, start: int, stop: int) -> QuantizedTensor:
    zero = None if packed.zero_point is None else packed.zero_point[start:stop]
    return QuantizedTensor(packed.codes[start:stop], packed.scale[start:stop], zero, packed.bits, packed.group_size)
