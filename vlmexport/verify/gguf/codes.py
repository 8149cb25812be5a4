"""An independent reader of codes in ggml's plain blocks, from the layout in ggml's documentation.

Q4_0: float16 scale, 16 bytes of which the low halves are values 0 to 15 and the high halves 16 to 31, each minus 8.
Q4_1: float16 scale and minimum, then the same. Q8_0: float16 scale, 32 signed bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.errors import ArtifactError
from vlmexport.gguf_options import GgufTensor
from vlmexport.manifest import QuantizedRecord
from vlmexport.quantize.ggml import values
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.files import GgufPair, StoredTensor

_BLOCK = 32
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}
_MIDDLE_OF_BYTES, _MIDDLE_OF_NIBBLES = 128, 8


def check_codes(gate: Gate, pair: GgufPair, tensors: Sequence[GgufTensor], records: Sequence[QuantizedRecord]) -> None:
    """``codes/all``: the codes that were handed over have the digests of what the quantizer chose.

    Nothing is judged where the export hands no codes over.
    """
    coded = [t for t in tensors if t.scheme is not None]
    if not coded and not records:
        return
    digests = {record.initializer: record for record in records}
    faults = [f"{name} is recorded and not planned" for name in digests.keys() - {t.name for t in coded}]
    for tensor in coded:
        record, stored = digests.get(tensor.name), pair.of(tensor.file).tensors.get(tensor.name)
        if record is None:
            faults.append(f"{tensor.name}: the manifest has no digest of its codes")
        elif stored is None:
            faults.append(f"{tensor.name} is missing")
        elif fault := _code_fault(stored, tensor, record):
            faults.append(f"{tensor.source}: {fault}")
    gate.verdict("codes/all", "decoder", "lowering", faults, "weights that differ")


def _code_fault(stored: StoredTensor, tensor: GgufTensor, record: QuantizedRecord) -> str:
    try:
        codes = unpack_blocks(stored.data, stored.type, symmetric=record.symmetric, bits=record.bits)
    except ArtifactError as error:
        return str(error)
    digest = _unmoved(codes, tensor).digest()
    if [m.digest for m in record.members] != [digest]:
        return "codes, scales or zero points differ from what the quantizer chose"
    return ""


def unpack_blocks(data: NDArray[np.uint8], type_name: str, *, symmetric: bool, bits: int) -> QuantizedTensor:
    """The logical tensor behind rows of blocks, uint8 ``[rows, row bytes]``; groups of 32.

    Raises `ArtifactError` for another type, or a minimum of Q4_1 that is no whole number of its scale.
    """
    if type_name not in _BYTES or _BITS[type_name] != bits:
        raise ArtifactError(f"codes of {bits} bits are stored as {type_name}")
    blocks = np.ascontiguousarray(data).reshape(len(data), -1, _BYTES[type_name])
    scale = blocks[..., :2].copy().view(np.float16)[..., 0]
    if type_name == "Q8_0":
        signed = blocks[..., 2:].view(np.int8).astype(np.int16)
        codes = (signed + _MIDDLE_OF_BYTES).astype(np.uint8)
    else:
        packed = blocks[..., 2:] if type_name == "Q4_0" else blocks[..., 4:]
        codes = np.concatenate([packed & 15, packed >> 4], axis=-1)
    zero = None
    if type_name == "Q4_1":
        zero = _zero_points(scale, blocks[..., 2:4].copy().view(np.float16)[..., 0])
        if symmetric and bool((zero != _MIDDLE_OF_NIBBLES)[torch.from_numpy(scale) != 0].any()):
            raise ArtifactError("the manifest says that codes are symmetric, but their zero points are not the middle")
    elif not symmetric:
        raise ArtifactError(f"zero points are stored as {type_name}, which has none")
    return QuantizedTensor(
        codes=torch.from_numpy(np.ascontiguousarray(codes.reshape(len(data), -1))),
        scale=torch.from_numpy(scale),
        zero_point=None if symmetric else zero,
        bits=bits,
        group_size=_BLOCK,
    )


def _zero_points(scale: NDArray[np.float16], minimum: NDArray[np.float16]) -> torch.Tensor:
    """Zero points of blocks that mean ``code * scale + minimum``: the minimum must be -zero * scale, exactly."""
    wide, low = scale.astype(np.float32), minimum.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(wide == 0, 0, np.rint(-low / wide))
    exact = (zero >= 0) & (zero < 16) & (-zero * wide == low)
    if not exact.all():
        raise ArtifactError(f"{int((~exact).sum())} blocks have a minimum that is no whole number of their scale")
    return torch.from_numpy(zero.astype(np.uint8))


def _unmoved(codes: QuantizedTensor, tensor: GgufTensor) -> QuantizedTensor:
    """The codes with their rows in the checkpoint's order."""
    if tensor.transform is None:
        return codes
    kind, arguments = tensor.transform.kind, tensor.transform.arguments
    return codes.moved(lambda rows: values.invert([rows], kind, arguments))
