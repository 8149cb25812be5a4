"""An independent reader of the integers in a quantized checkpoint.

Written from the formats' documentation and their readers, sharing no code with the emitter; the digests it compares
with were taken from the logical codes before packing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmexport.checkpoint_manifest import CheckpointManifest, StoredWeight
from vlmexport.errors import ArtifactError
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.verify.codes import CodeFault

Codes = NDArray[np.uint8]
_ROWS = 512


class WeightFiles:
    """The tensors of a checkpoint folder by name, read when asked for.

    `files` are its weight files (None: every safetensors file of the folder is one).
    """

    def __init__(self, folder: Path, files: Iterable[Path] | None = None) -> None:
        from safetensors import safe_open

        open_file: Any = safe_open
        listed = sorted(folder.glob("*.safetensors")) if files is None else files
        self._files = [open_file(file, framework="pt") for file in listed]
        self._where = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118

    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._where)

    def __call__(self, name: str) -> torch.Tensor:
        """One tensor; raises `ArtifactError` when it is missing."""
        if name not in self._where:
            raise ArtifactError(f"the files hold no tensor {name}")
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor


@dataclass(frozen=True)
class _Stored:
    """One weight to be read: its record, the files, and the checkpoint's ``quantization_config``."""

    record: StoredWeight
    files: WeightFiles
    config: dict[str, Any]

    def tensor(self, suffix: str) -> torch.Tensor:
        return self.files(f"{self.record.module}.{suffix}")

    def array(self, suffix: str) -> NDArray[Any]:
        array: NDArray[Any] = self.tensor(suffix).numpy()
        return array


def read_weight(record: StoredWeight, files: WeightFiles, config: dict[str, Any]) -> QuantizedTensor:
    """The logical codes of one weight, from its tensors and `config` (``quantization_config``).

    Raises `ArtifactError` when tensors are missing or do not fit the recorded shape.
    """
    method = config.get("quant_method")
    if method not in _READERS:
        raise ArtifactError(f"config.json has quant_method {method!r}; known: {', '.join(_READERS)}")
    made = _READERS[method](_Stored(record, files, config))
    if made.shape != record.shape:
        raise ArtifactError(f"the codes are {made.shape}, the manifest says {record.shape}")
    return made


def read_checkpoint_codes(
    folder: Path, manifest: CheckpointManifest
) -> Iterator[tuple[StoredWeight, QuantizedTensor | None, CodeFault | None]]:
    """Every quantized weight of the checkpoint, one at a time, with its fault when it is not the recorded one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config", {})
    files = WeightFiles(folder)
    for record in manifest.quantized:
        try:
            tensor = read_weight(record, files, config)
        except (ArtifactError, ValueError) as error:
            yield record, None, CodeFault(record.name, "decoder", str(error))
            continue
        same = tensor.digest() == record.digest
        reason = "codes, scales or zero points differ from what the quantizer chose"
        yield record, tensor, None if same else CodeFault(record.name, "decoder", reason)


def unpack_bits(packed: NDArray[Any], bits: int, count: int) -> Codes:
    """The first `count` integers of each row of int32 ``packed [R, words]``, low bits first: uint8 ``[R, count]``."""
    rows = packed.shape[0]
    if packed.shape[1] * 32 < count * bits:
        raise ArtifactError(f"{packed.shape[1]} words a row hold fewer than {count} integers of {bits} bits")
    powers = (1 << np.arange(bits)).astype(np.uint8)
    out = np.empty((rows, count), dtype=np.uint8)
    for start in range(0, rows, _ROWS):
        chunk = np.ascontiguousarray(packed[start : start + _ROWS]).astype("<i4", copy=False).view(np.uint8)
        spread = np.unpackbits(chunk, axis=1, count=count * bits, bitorder="little")
        out[start : start + _ROWS] = spread.reshape(len(chunk), count, bits) @ powers
    return out


def _compressed_tensors(stored: _Stored) -> QuantizedTensor:
    record, scale = stored.record, stored.tensor("weight_scale")
    rows, columns = record.shape
    group = _group(stored)
    if group["format"] != "pack-quantized":
        return _whole_numbers(stored, group["format"], scale)
    bits = int(group["weights"]["num_bits"])
    if stored.tensor("weight_shape").tolist() != [rows, columns]:
        raise ArtifactError(f"weight_shape is {stored.tensor('weight_shape').tolist()}, expected {[rows, columns]}")
    codes = unpack_bits(stored.array("weight_packed"), bits, columns)
    zeros = None
    if not group["weights"]["symmetric"]:
        zeros = _needed(record, unpack_bits(stored.array("weight_zero_point").T, bits, rows).T)
    size = columns if group["weights"]["strategy"] == "channel" else int(group["weights"]["group_size"])
    return _made(codes, scale, zeros, bits, size)


def _whole_numbers(stored: _Stored, kind: str, scale: torch.Tensor) -> QuantizedTensor:
    weight, columns = stored.tensor("weight"), stored.record.shape[1]
    if kind == "float-quantized":
        levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return QuantizedTensor(weight.view(torch.uint8), scale, None, 8, columns, codebook=levels)
    return _made((weight.to(torch.int16) + 128).to(torch.uint8).numpy(), scale, None, 8, columns)


def _group(stored: _Stored) -> dict[str, Any]:
    names = {stored.record.module, stored.record.name.removesuffix(".weight")}
    if names & set(stored.config["ignore"]):
        raise ArtifactError("the module is quantized and in `ignore`")
    groups: list[dict[str, Any]] = list(stored.config["config_groups"].values())
    exact = [g for g in groups if names & set(g["targets"])]
    found = exact or [g for g in groups if "Linear" in g["targets"]]
    if len(found) != 1:
        raise ArtifactError(f"{len(found)} config groups mean the module, expected 1")
    return found[0]


def _gptq(stored: _Stored) -> QuantizedTensor:
    record, bits = stored.record, int(stored.config["bits"])
    rows, columns = record.shape
    size = columns if stored.config["group_size"] == -1 else int(stored.config["group_size"])
    if not np.array_equal(stored.array("g_idx"), np.arange(columns) // size):
        raise ArtifactError("g_idx is not in the natural order")
    codes = unpack_bits(stored.array("qweight").T, bits, columns)
    zeros = unpack_bits(stored.array("qzeros"), bits, rows).T
    if stored.config["checkpoint_format"] == "gptq":
        zeros = zeros + np.uint8(1)
    return _made(codes, stored.tensor("scales").t(), _needed(record, zeros), bits, size)


# The output in nibble 0, 1, ... of an AWQ word (autoawq, `awq/utils/packing_utils.py`).
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq(stored: _Stored) -> QuantizedTensor:
    record = stored.record
    codes, zeros = _awq_words(stored.array("qweight")).T, _awq_words(stored.array("qzeros")).T
    size = record.shape[1] if stored.config["group_size"] == -1 else int(stored.config["group_size"])
    return _made(codes, stored.tensor("scales").t(), _needed(record, zeros), 4, size)


def _awq_words(packed: NDArray[np.int32]) -> Codes:
    out = np.empty((packed.shape[0], packed.shape[1] * 8), dtype=np.uint8)
    for nibble, place in enumerate(_AWQ_ORDER):
        out[:, place::8] = (packed >> (4 * nibble)) & 15
    return out


def _bitsandbytes(stored: _Stored) -> QuantizedTensor:
    state = json.loads(stored.array("weight.quant_state.bitsandbytes__nf4").tobytes())
    rows, columns = state["shape"]
    packed, levels = stored.array("weight").reshape(-1), stored.tensor("weight.quant_map")
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(rows, columns)
    absmax = stored.tensor("weight.absmax")
    if "nested_offset" in state:
        level = stored.tensor("weight.nested_quant_map")[absmax.long()]
        blocks = stored.tensor("weight.nested_absmax").repeat_interleave(state["nested_blocksize"])[: level.numel()]
        absmax = level * blocks + state["nested_offset"]
    size = int(state["blocksize"])
    scale = absmax.reshape(rows, columns // size)
    return QuantizedTensor(torch.from_numpy(codes), scale, None, 4, size, codebook=levels)


def _torchao(stored: _Stored) -> QuantizedTensor:
    record = stored.record
    middle = 1 << (record.bits - 1)
    scale = stored.tensor("_weight_scale")
    zeros = None
    if f"{record.module}._weight_zero_point" in stored.files.names():
        shifted = stored.array("_weight_zero_point").astype(np.int16) + middle
        zeros = _needed(record, shifted.astype(np.uint8))
    codes = (stored.array("_weight_qdata").astype(np.int16) + middle).astype(np.uint8)
    return _made(codes, scale, zeros, record.bits, record.shape[1] // scale.shape[1])


_READERS: dict[str, Callable[[_Stored], QuantizedTensor]] = {
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}


def _needed(record: StoredWeight, zeros: Codes) -> Codes | None:
    """The zero points, or None when the weight is recorded as symmetric and they are all the middle."""
    if not record.symmetric:
        return zeros
    middle = 1 << (record.bits - 1)
    if (zeros != middle).any():
        raise ArtifactError(f"the weight is recorded as symmetric, and has zero points other than {middle}")
    return None


def _made(codes: Codes, scale: torch.Tensor, zeros: Codes | None, bits: int, size: int) -> QuantizedTensor:
    zero_point = None if zeros is None else torch.from_numpy(np.ascontiguousarray(zeros))
    return QuantizedTensor(torch.from_numpy(np.ascontiguousarray(codes)), scale, zero_point, bits, size)
