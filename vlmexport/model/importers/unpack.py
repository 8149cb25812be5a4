"""Bits of int32 words to codes. Both GPTQ and compressed-tensors lay codes end to end, first code in the low bits."""

from __future__ import annotations

import torch

# Rows are unpacked in steps of about this many codes, so that the bits of a large matrix are never all in memory.
_STEP_CODES = 1 << 22


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """`words` int32 ``[rows, W]`` (little-endian bit stream per row) to uint8 codes ``[rows, count]``.

    `bits` is 1 to 8; a code may straddle two words. ``W * 32`` must be at least ``count * bits``.
    """
    rows = words.shape[0]
    step = max(1, _STEP_CODES // max(count, 1))
    unpack = _whole_bytes if 8 % bits == 0 else _any_bits
    chunks = [unpack(_bytes(words[start : start + step]), bits)[:, :count] for start in range(0, rows, step)]
    return torch.cat(chunks).contiguous()


def _bytes(words: torch.Tensor) -> torch.Tensor:
    """The bytes of every word, low byte first whatever the machine's order is."""
    shifts = torch.arange(0, 32, 8, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 255).to(torch.uint8).reshape(words.shape[0], -1)


def _whole_bytes(data: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = (data.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.reshape(data.shape[0], -1)


def _any_bits(data: torch.Tensor, bits: int) -> torch.Tensor:
    single = (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    stream = single.reshape(data.shape[0], -1)
    whole = stream[:, : stream.shape[1] // bits * bits].reshape(data.shape[0], -1, bits)
    return (whole << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
