"""An independent reader of the integers in an exported graph.

Written from the operator's documentation and docs/manifest.md, sharing no code with the emitter: if both were wrong in
the same way the digests could not agree, because the digests were taken from the logical codes before packing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.errors import ArtifactError
from vlmexport.manifest import PREFILL_PART, Artifact, QuantizedRecord
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.verify.dequantize import require_matrix_products, unpack_dequantized

if TYPE_CHECKING:
    import onnx_ir as ir


# The operators that hold codes of each codebook of the manifest ("": integers), and which operand the codes are.
_OPERATORS = {"": ("MatMulNBits", "MatMulIntegerToFloat", "DequantizeLinear"), "nf4": ("MatMulBnb4",)}
_CODES_OPERAND = {"MatMulNBits": 1, "MatMulIntegerToFloat": 1, "MatMulBnb4": 1, "DequantizeLinear": 0}
# arXiv 2305.14314, appendix E, to the digits that tell float32 numbers of this size apart.
_NF4 = (
    -1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
)  # fmt: skip
_NF4_TYPE = 1  # MatMulBnb4's quant_type


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


def unpack_matmul_bnb4(
    codes: NDArray[np.uint8], absmax: NDArray[Any], *, rows: int, in_features: int, group_size: int
) -> QuantizedTensor:
    """The logical NF4 tensor behind the initializers of one MatMulBnb4 node.

    ``codes``: uint8, two per byte along the row-major matrix ``[rows, in_features]``, the first in the high bits;
    ``absmax``: float32, one per ``group_size`` codes, in the same order. Raises `ArtifactError` when sizes disagree.
    """
    count = rows * in_features
    if in_features % group_size or (codes.size * 2, absmax.size * group_size) != (count, count):
        raise ArtifactError(
            f"{codes.size} bytes of codes and {absmax.size} scales do not fit {rows} x {in_features} weights in groups "
            f"of {group_size} at 4 bits"
        )
    flat = codes.reshape(-1)
    spread = np.stack([flat >> np.uint8(4), flat & np.uint8(15)], axis=-1)
    return QuantizedTensor(
        codes=torch.from_numpy(spread.reshape(rows, in_features)),
        scale=torch.from_numpy(np.array(absmax).reshape(rows, in_features // group_size)),
        zero_point=None,
        bits=4,
        group_size=group_size,
        codebook=torch.tensor(_NF4),
    )


def unpack_int8(codes: NDArray[np.int8], scale: NDArray[Any]) -> QuantizedTensor:
    """The logical tensor behind the weight of one MatMulIntegerToFloat node.

    ``codes``: int8 ``[in_features, rows]``, ``scale``: float32 ``[rows]``. Raises `ArtifactError` for other types and
    sizes.
    """
    if codes.dtype != np.int8 or codes.ndim != 2 or scale.shape != codes.shape[1:]:
        raise ArtifactError(
            f"{codes.dtype} codes {list(codes.shape)} and scales {list(scale.shape)} are no INT8 weight"
        )
    logical = np.ascontiguousarray(codes.T.astype(np.int16) + 128).astype(np.uint8)
    return QuantizedTensor(
        codes=torch.from_numpy(logical),
        scale=torch.from_numpy(np.array(scale)).reshape(-1, 1),
        zero_point=None,
        bits=8,
        group_size=codes.shape[0],
    )


class GraphWeights:
    """The quantized matrix products of one graph file; initializers stay in the file until they are read."""

    def __init__(self, path: Path) -> None:
        import onnx_ir as ir

        self._model = ir.load(path)
        self._nodes: dict[str, list[ir.Node]] = {}
        for node in ir.traversal.RecursiveGraphIterator(self._model.graph):
            codes = _codes_of(node)
            if codes is not None:
                self._nodes.setdefault(codes, []).append(node)

    def initializers(self) -> list[str]:
        """Names of the quantized matrices in the graph, without the ``.codes`` ending, sorted."""
        return sorted(str(name).removesuffix(".codes") for name in self._nodes)

    def read(self, record: QuantizedRecord) -> QuantizedTensor:
        """The logical tensor of one manifest record.

        Raises `ArtifactError` when the graph has no such node, or its attributes or operands disagree with the record.
        """
        operators = _OPERATORS.get(record.codebook, (record.codebook,))
        nodes = self._nodes.get(f"{record.initializer}.codes", [])
        if not nodes or any(node.op_type not in operators for node in nodes):
            raise ArtifactError(f"no {' or '.join(operators)} node reads {record.initializer}.codes")
        return [self._read_node(node, record) for node in nodes][-1]  # all read the same operands

    def _read_node(self, node: ir.Node, record: QuantizedRecord) -> QuantizedTensor:
        if node.op_type == "DequantizeLinear":
            return self._read_dequantized(node, record)
        if node.op_type == "MatMulIntegerToFloat":
            return self._read_int8(node, record)
        return self._read_nf4(node, record) if record.codebook == "nf4" else self._read_integers(node, record)

    def _read_integers(self, node: ir.Node, record: QuantizedRecord) -> QuantizedTensor:
        rows = max(member.rows[1] for member in record.members)
        wanted = {"K": record.in_features, "N": rows, "bits": record.bits, "block_size": record.group_size}
        _check_attributes(node, wanted, {"bits": 4})
        expected = [f"{record.initializer}.codes", f"{record.initializer}.scale"]
        if not record.symmetric:
            expected.append(f"{record.initializer}.zero_point")
        _check_operands(node, expected)
        zero_point = None if record.symmetric else self._array(expected[2])
        return unpack_matmul_nbits(
            self._array(expected[0]),
            self._array(expected[1]),
            zero_point,
            bits=record.bits,
            group_size=record.group_size,
            in_features=record.in_features,
        )

    def _read_nf4(self, node: ir.Node, record: QuantizedRecord) -> QuantizedTensor:
        rows = max(member.rows[1] for member in record.members)
        wanted = {"K": record.in_features, "N": rows, "block_size": record.group_size, "quant_type": _NF4_TYPE}
        _check_attributes(node, wanted, {})
        expected = [f"{record.initializer}.codes", f"{record.initializer}.scale"]
        _check_operands(node, expected)
        codes, absmax = map(self._array, expected)
        return unpack_matmul_bnb4(
            codes, absmax, rows=rows, in_features=record.in_features, group_size=record.group_size
        )

    def _read_int8(self, node: ir.Node, record: QuantizedRecord) -> QuantizedTensor:
        expected = [f"{record.initializer}.codes", f"{record.initializer}.scale"]
        operands = [_stored_name(node.inputs[1]), _stored_name(node.inputs[3])]
        if operands != expected or len(node.inputs) > 5:
            raise ArtifactError(f"the node reads {operands}, expected {expected} and no zero points of the weight")
        return _as_recorded(unpack_int8(*map(self._array, expected)), record)

    def _read_dequantized(self, node: ir.Node, record: QuantizedRecord) -> QuantizedTensor:
        require_matrix_products(node)
        expected = [f"{record.initializer}.codes", f"{record.initializer}.scale"]
        operands = [_stored_name(value) for value in node.inputs if value is not None]
        if operands != expected:
            raise ArtifactError(f"the node reads {operands}, expected {expected} and no zero points")
        attributes = node.attributes
        axis = attributes["axis"].as_int() if "axis" in attributes else 1
        block_size = attributes["block_size"].as_int() if "block_size" in attributes else 0
        codes, scale = map(self._array, expected)
        return _as_recorded(unpack_dequantized(codes, scale, axis=axis, block_size=block_size), record)

    def _array(self, name: str) -> NDArray[Any]:
        value = self._model.graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise ArtifactError(f"the graph has no initializer {name}")
        array: NDArray[Any] = value.const_value.numpy()
        return array


def _codes_of(node: ir.Node) -> str | None:
    """The name of the codes that `node` multiplies with or dequantizes; None for every other node."""
    operand = _CODES_OPERAND.get(node.op_type)
    if operand is None or len(node.inputs) < operand + 2:
        return None
    codes = node.inputs[operand]
    return None if codes is None else str(codes.name)


def _as_recorded(tensor: QuantizedTensor, record: QuantizedRecord) -> QuantizedTensor:
    """`tensor`, which must be of the record's form and have its rows; else `ArtifactError`."""
    found = (tensor.bits, tensor.group_size, tensor.shape[::-1], True)
    rows = max(member.rows[1] for member in record.members)
    wanted = (record.bits, record.group_size, (record.in_features, rows), record.symmetric)
    if found != wanted:
        raise ArtifactError(
            f"the graph holds (bits, group, [inputs, rows], symmetric) {found}, the manifest says {wanted}"
        )
    return tensor


def _check_attributes(node: ir.Node, wanted: dict[str, int], defaults: dict[str, int]) -> None:
    """Raise `ArtifactError` when `node` says other than `wanted`; `defaults` are the operator's."""
    attributes = node.attributes
    found = {key: attributes[key].as_int() if key in attributes else defaults.get(key) for key in wanted}
    if found != wanted:
        raise ArtifactError(f"the node says {found}, the manifest {wanted}")


def _check_operands(node: ir.Node, expected: list[str]) -> None:
    """Raise `ArtifactError` when `node` reads other initializers; scales may be cast to what it computes in."""
    operands = [_stored_name(value) for value in node.inputs[1:4]]
    if [name for name in operands if name] != expected:
        raise ArtifactError(f"the node reads {operands}, expected {expected}")


def _stored_name(value: ir.Value | None) -> str | None:
    producer = value.producer() if value is not None else None
    source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else value
    return source.name if source is not None and source.name else None


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
                yield member.name, part, member.digest, packed.rows(*member.rows)


def read_codes(artifact: Artifact, part: str = "decoder") -> tuple[dict[str, QuantizedTensor], list[CodeFault]]:
    """The quantized weights of a part by checkpoint name, and those whose integers are not the quantizer's choice.

    A weight whose digest differs is in both: the reference must run what the graph holds.
    """
    tensors: dict[str, QuantizedTensor] = {}
    faults: list[CodeFault] = []
    for name, owner, digest, tensor in read_members(artifact):
        if owner != part:
            continue
        if isinstance(tensor, str):
            faults.append(CodeFault(name, part, tensor))
            continue
        tensors[name] = tensor
        if tensor.digest() != digest:
            faults.append(CodeFault(name, part, "codes, scales or zero points differ from what the quantizer chose"))
    return tensors, faults


def unrecorded_matrices(artifact: Artifact) -> list[CodeFault]:
    """Quantized matrices of the decoder and of other quantized graphs that the manifest does not list."""
    faults = []
    for part in sorted({record.part for record in artifact.manifest.quantized} | {"decoder"}):
        listed = {r.initializer for r in artifact.manifest.quantized if r.part == part}
        graph = GraphWeights(artifact.part_path(part))
        shared = {r.initializer: r for r in artifact.manifest.quantized if part == PREFILL_PART and r.part != part}
        for name in graph.initializers():
            if name in shared:
                faults += _shared_faults(graph, shared[name], part)
            elif name not in listed:
                faults.append(CodeFault(name, part, "is in the graph but not in the manifest"))
    return faults


def _shared_faults(graph: GraphWeights, record: QuantizedRecord, part: str) -> list[CodeFault]:
    """Faults of a matrix that the prompt graph takes from the decode graph: it must be the same one."""
    try:
        tensor = graph.read(record)
    except ArtifactError as error:
        return [CodeFault(record.initializer, part, str(error))]
    return [
        CodeFault(member.name, part, "is not the matrix that the decode graph has under this name")
        for member in record.members
        if tensor.rows(*member.rows).digest() != member.digest
    ]


def account(artifact: Artifact, parameters: Iterable[frozenset[str]]) -> list[str]:
    """Faults in the accounting of the decoder's parameters: each exactly once in ``quantized`` or ``unquantized``.

    The prompt graph's matrices are second copies: each of their weights is among the decoder's own, once.

    `parameters` holds one set of names per parameter (several when it is tied: one entry under each name is allowed).
    """
    manifest = artifact.manifest
    decoding = [record for record in manifest.quantized if record.part != PREFILL_PART]
    counts = Counter(member.name for record in decoding for member in record.members)
    counts.update(kept.name for kept in manifest.unquantized)
    faults = [f"{name} is listed {count} times" for name, count in sorted(counts.items()) if count > 1]
    for names in parameters:
        if not any(counts[name] for name in names):
            faults.append(f"{min(names)} is in neither quantized nor unquantized")
    prompt = Counter(m.name for r in manifest.quantized if r.part == PREFILL_PART for m in r.members)
    faults += [f"{name} is {n} times in the prompt graph" for name, n in sorted(prompt.items()) if n > 1]
    return faults + [f"{name} is in the prompt graph only" for name in sorted(prompt) if not counts[name]]
