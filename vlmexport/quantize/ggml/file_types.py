"""The file types of llama-quantize: what ``--quant`` names, and what ``general.file_type`` stores."""

from __future__ import annotations

from dataclasses import dataclass

from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.types import GGML_TYPES


@dataclass(frozen=True)
class FileType:
    """One file type: `id` is llama.h's ``LLAMA_FTYPE_*``, `default` the tensor type that its mix starts from.

    `needs_imatrix`: some tensor of a model whose rows are multiples of 256 is refused without an importance matrix.
    """

    name: str
    id: int
    default: str
    needs_imatrix: bool
    summary: str

    @property
    def is_float(self) -> bool:
        """F32, F16 or BF16: nothing is quantized."""
        return self.default in ("F32", "F16", "BF16")


def _bits(default: str) -> str:
    return f"{GGML_TYPES[default].bits_per_weight:.2f} bits"


def _types(*rows: tuple[str, int, str, str], needs_imatrix: bool = False) -> dict[str, FileType]:
    return {
        name: FileType(name, number, default, needs_imatrix, f"{_bits(default)}, {words}")
        for name, number, default, words in rows
    }


FILE_TYPES: dict[str, FileType] = {
    **_types(
        ("F32", 0, "F32", "no loss from any checkpoint"),
        ("F16", 1, "F16", "the usual half precision"),
        ("BF16", 32, "BF16", "no loss from BF16 checkpoints; slow on many CPUs"),
        ("Q8_0", 7, "Q8_0", "nearly no loss"),
        ("Q4_0", 2, "Q4_0", "legacy 4 bit, symmetric; the fastest on ARM"),
        ("Q4_1", 3, "Q4_1", "legacy 4 bit, asymmetric"),
        ("Q5_0", 8, "Q5_0", "legacy 5 bit, symmetric"),
        ("Q5_1", 9, "Q5_1", "legacy 5 bit, asymmetric"),
        ("Q2_K", 10, "Q2_K", "2 bit with more for values and outputs; large loss"),
        ("Q3_K_S", 11, "Q3_K", "3 bit throughout"),
        ("Q3_K_M", 12, "Q3_K", "3 bit, 4 and 5 where it matters"),
        ("Q3_K_L", 13, "Q3_K", "3 bit, 5 where it matters"),
        ("Q4_K_S", 14, "Q4_K", "4 bit nearly throughout"),
        ("Q4_K_M", 15, "Q4_K", "4 bit, 6 where it matters; the usual choice"),
        ("Q5_K_S", 16, "Q5_K", "5 bit throughout"),
        ("Q5_K_M", 17, "Q5_K", "5 bit, 6 where it matters"),
        ("Q6_K", 18, "Q6_K", "6 bit throughout"),
        ("IQ3_S", 26, "IQ3_S", "3 bit by code book"),
        ("IQ3_M", 27, "IQ3_S", "3 bit by code book, 4 where it matters"),
        ("IQ4_NL", 25, "IQ4_NL", "4 bit, non-linear, blocks of 32"),
        ("IQ4_XS", 30, "IQ4_XS", "4 bit, non-linear, blocks of 256"),
    ),
    **_types(
        ("Q2_K_S", 21, "Q2_K", "2 bit nearly throughout"),
        ("IQ1_S", 24, "IQ1_S", "1 bit by code book; for very large models"),
        ("IQ1_M", 31, "IQ1_M", "1 bit by code book; for very large models"),
        ("IQ2_XXS", 19, "IQ2_XXS", "2 bit by code book"),
        ("IQ2_XS", 20, "IQ2_XS", "2 bit by code book"),
        ("IQ2_S", 28, "IQ2_XS", "2 bit by code book, more where it matters"),
        ("IQ2_M", 29, "IQ2_S", "2 bit by code book, more where it matters"),
        ("IQ3_XXS", 23, "IQ3_XXS", "3 bit by code book"),
        ("IQ3_XS", 22, "IQ3_S", "3 bit by code book, less where it matters less"),
        needs_imatrix=True,
    ),
}

_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def file_type(name: str) -> FileType:
    """The file type called `name` in any case (``Q4_K`` is ``Q4_K_M``, as in llama-quantize).

    Raises `BadInputError` with the choices.
    """
    upper = name.upper()
    found = FILE_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        raise BadInputError(f"{name!r} is no GGUF file type; choose one of {', '.join(FILE_TYPES)}")
    return found
