"""Dense bit packing into int32 words, as GPTQ, AWQ and compressed-tensors store their codes."""

from __future__ import annotations

import numpy as np
import torch

_WORD_BITS = 32
# Rows per step of the widths that straddle bytes: their bits are spread to one byte each while they are packed.
_ROWS = 256


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack ``codes [R, C]`` (uint8, below ``2**bits``) along the columns: int32 ``[R, ceil(C * bits / 32)]``.

    Code ``i`` of a row fills bits ``i * bits`` onwards of the row's words, low bits first; a code may straddle two
    words (3 bits), and the last word is padded with zeros.
    """
    rows, columns = codes.shape
    words = -(-columns * bits // _WORD_BITS)
    wide = np.zeros((rows, -(-columns // _WORD_BITS) * _WORD_BITS), dtype=np.uint8)
    wide[:, :columns] = codes.cpu().numpy()
    packed = _whole_bytes(wide, bits) if 8 % bits == 0 else _straddling(wide, bits)
    return torch.from_numpy(np.ascontiguousarray(packed.view("<i4")[:, :words]))


def _whole_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    per_byte = 8 // bits
    packed = codes[:, ::per_byte].copy()
    for place in range(1, per_byte):
        packed |= codes[:, place::per_byte] << np.uint8(place * bits)
    return packed


def _straddling(codes: np.ndarray, bits: int) -> np.ndarray:
    places = np.arange(bits, dtype=np.uint8)
    chunks = []
    for start in range(0, len(codes), _ROWS):
        spread = (codes[start : start + _ROWS, :, None] >> places) & np.uint8(1)
        chunks.append(np.packbits(spread.reshape(len(spread), -1), axis=1, bitorder="little"))
    return np.concatenate(chunks)
