"""The file types of llama-quantize: what ``--quant`` names, and what ``general.file_type`` stores."""

from __future__ import annotations

from dataclasses import dataclass

from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.types import NEEDS_IMPORTANCE

# Q2_K_S by a rule of its own; IQ3_XS for its IQ3_XXS tensors.
_ALSO_NEED_IMATRIX = ("Q2_K_S", "IQ3_XS")


@dataclass(frozen=True)
class FileType:
    """One file type: `id` is llama.h's ``LLAMA_FTYPE_*``, `default` the tensor type that its mix starts from."""

    name: str
    id: int
    default: str

    @property
    def is_float(self) -> bool:
        """F32, F16 or BF16: nothing is quantized."""
        return self.default in ("F32", "F16", "BF16")

    @property
    def needs_imatrix(self) -> bool:
        """Some tensor of a model whose rows are multiples of 256 is refused without an importance matrix."""
        return self.default in NEEDS_IMPORTANCE or self.name in _ALSO_NEED_IMATRIX


FILE_TYPES: dict[str, FileType] = {
    kind.name: kind
    for kind in (
        FileType("F32", 0, "F32"),
        FileType("F16", 1, "F16"),
        FileType("BF16", 32, "BF16"),
        FileType("Q8_0", 7, "Q8_0"),
        FileType("Q4_0", 2, "Q4_0"),
        FileType("Q4_1", 3, "Q4_1"),
        FileType("Q5_0", 8, "Q5_0"),
        FileType("Q5_1", 9, "Q5_1"),
        FileType("Q2_K", 10, "Q2_K"),
        FileType("Q3_K_S", 11, "Q3_K"),
        FileType("Q3_K_M", 12, "Q3_K"),
        FileType("Q3_K_L", 13, "Q3_K"),
        FileType("Q4_K_S", 14, "Q4_K"),
        FileType("Q4_K_M", 15, "Q4_K"),
        FileType("Q5_K_S", 16, "Q5_K"),
        FileType("Q5_K_M", 17, "Q5_K"),
        FileType("Q6_K", 18, "Q6_K"),
        FileType("IQ3_S", 26, "IQ3_S"),
        FileType("IQ3_M", 27, "IQ3_S"),
        FileType("IQ4_NL", 25, "IQ4_NL"),
        FileType("IQ4_XS", 30, "IQ4_XS"),
        FileType("Q2_K_S", 21, "Q2_K"),
        FileType("IQ1_S", 24, "IQ1_S"),
        FileType("IQ1_M", 31, "IQ1_M"),
        FileType("IQ2_XXS", 19, "IQ2_XXS"),
        FileType("IQ2_XS", 20, "IQ2_XS"),
        FileType("IQ2_S", 28, "IQ2_XS"),
        FileType("IQ2_M", 29, "IQ2_S"),
        FileType("IQ3_XXS", 23, "IQ3_XXS"),
        FileType("IQ3_XS", 22, "IQ3_S"),
    )
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
