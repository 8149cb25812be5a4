"""ggml's tensor types, with the sizes of their blocks (ggml.h, ``ggml_type``)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmexport.errors import BadInputError


@dataclass(frozen=True)
class GgmlType:
    """One tensor type: `id` as files store it, `block` values in `bytes` bytes."""

    name: str
    id: int
    block: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of one value, scales included."""
        return 8 * self.bytes / self.block

    def size(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` (rows last-dimension-first as in numpy); the last dim holds whole blocks."""
        return math.prod(shape) // self.block * self.bytes


GGML_TYPES: dict[str, GgmlType] = {
    t.name: t
    for t in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("Q4_0", 2, 32, 18),
        GgmlType("Q4_1", 3, 32, 20),
        GgmlType("Q5_0", 6, 32, 22),
        GgmlType("Q5_1", 7, 32, 24),
        GgmlType("Q8_0", 8, 32, 34),
        GgmlType("Q2_K", 10, 256, 84),
        GgmlType("Q3_K", 11, 256, 110),
        GgmlType("Q4_K", 12, 256, 144),
        GgmlType("Q5_K", 13, 256, 176),
        GgmlType("Q6_K", 14, 256, 210),
        GgmlType("IQ2_XXS", 16, 256, 66),
        GgmlType("IQ2_XS", 17, 256, 74),
        GgmlType("IQ3_XXS", 18, 256, 98),
        GgmlType("IQ1_S", 19, 256, 50),
        GgmlType("IQ4_NL", 20, 32, 18),
        GgmlType("IQ3_S", 21, 256, 110),
        GgmlType("IQ2_S", 22, 256, 82),
        GgmlType("IQ4_XS", 23, 256, 136),
        GgmlType("IQ1_M", 29, 256, 56),
        GgmlType("BF16", 30, 1, 2),
    )
}

# What llama-quantize makes with an importance matrix only (`mix_rules.needs_imatrix` has the exceptions).
NEEDS_IMPORTANCE = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"})


def ggml_type(name: str) -> GgmlType:
    """The type called `name` in any case; raises `BadInputError` with the choices."""
    found = GGML_TYPES.get(name.upper())
    if found is None:
        raise BadInputError(f"{name!r} is no ggml type; choose one of {', '.join(GGML_TYPES)}")
    return found
