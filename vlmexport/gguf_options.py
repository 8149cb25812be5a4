"""`GgufOptions`, `GgufTensor`, `GgufPlan`: what ``vlmexport gguf`` was asked for and what it does to every weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vlmexport.errors import BadInputError
from vlmexport.model.family import MetaValue, Transform
from vlmexport.quantize.ggml.code_types import BLOCK, codes_type, exact_scheme
from vlmexport.quantize.ggml.mix import file_type
from vlmexport.quantize.ggml.types import ggml_type
from vlmexport.quantize.registry import ALGORITHMS
from vlmexport.quantize.scheme import QuantScheme, make_scheme

File = Literal["text", "mmproj"]
Importance = Literal["auto", "none"]
_ALGORITHMS = ("awq+gptq", "awq", "gptq", "hqq", "rtn")


@dataclass(frozen=True)
class GgufOptions:
    """The choices of ``vlmexport gguf``.

    `quant` is a file type of llama-quantize (``Q4_K_M``); where `scheme` is given, or a checkpoint's own codes are
    kept, codes are handed over without loss as Q4_0, Q4_1 or Q8_0, and `quant` is that type. `smooth` folds AWQ's
    scales into the weights before they are quantized. `imatrix`: made from the calibration (``auto``), none, or a file
    of llama.cpp's. `tensor_types` are (regular expression, type) pairs, first match wins. `compatible` follows
    llama-quantize where it has a quirk. `named` says that the user asked for `quant`: it is no default then that gives
    way to the codes of a quantized checkpoint.
    """

    quant: str = "Q4_K_M"
    mmproj_type: str = "F16"
    imatrix: Importance | Path = "auto"
    tensor_types: tuple[tuple[str, str], ...] = ()
    smooth: Literal["none", "awq"] = "none"
    scheme: QuantScheme | None = None
    compatible: bool = False
    named: bool = True


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of a GGUF file.

    `shape` is in numpy order (the reverse of ggml's ``ne``); `type` a name of `GGML_TYPES`. `source` is the weight in
    the PyTorch model (empty for a computed tensor), `output` which of the `transform`'s tensors this is. `scheme` is
    set where the bytes are codes of ours, handed over without loss. `wanted` is the type that the rules asked for
    where the row length does not allow it.
    """

    name: str
    file: File
    shape: tuple[int, ...]
    type: str
    reason: str
    source: str = ""
    transform: Transform | None = None
    output: int = 0
    scheme: QuantScheme | None = None
    wanted: str = ""
    bytes: int = 0


@dataclass(frozen=True)
class GgufPlan:
    """Every tensor of both files in file order, and every weight that goes nowhere, with the reason.

    `metadata` are the architecture's keys of each file (`vlmexport.model.family.GgufHalf`), without the tokenizer's and
    the general ones; `computed` the values of tensors without a source; `notes` what the user must know of the family.
    """

    architecture: str
    arch: str
    projector: str
    options: GgufOptions
    tensors: tuple[GgufTensor, ...]
    unused: dict[str, str]
    metadata: dict[File, dict[str, MetaValue]]
    computed: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, file: File) -> tuple[GgufTensor, ...]:
        """The tensors of one file, in its order."""
        return tuple(t for t in self.tensors if t.file == file)

    @property
    def fallbacks(self) -> tuple[GgufTensor, ...]:
        """Tensors whose rows are not a multiple of the wanted type's block."""
        return tuple(t for t in self.tensors if t.wanted)

    @cached_property
    def schemes(self) -> dict[str, QuantScheme]:
        """The weights whose codes are handed over, by their PyTorch name."""
        return {t.source: t.scheme for t in self.tensors if t.scheme is not None}

    def bits_per_weight(self, file: File) -> float:
        """Stored bits per value of one file."""
        return 8 * sum(t.bytes for t in self.of(file)) / sum(_elements(t.shape) for t in self.of(file))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data."""
        options = {**dataclasses.asdict(self.options), "imatrix": str(self.options.imatrix)}
        return {
            "architecture": self.architecture,
            "arch": self.arch,
            "projector": self.projector,
            "options": options,
            "tensors": [dataclasses.asdict(t) for t in self.tensors],
            "unused": self.unused,
            "bytes_after": sum(t.bytes for t in self.tensors),
            "bits_per_weight": {file: self.bits_per_weight(file) for file in ("text", "mmproj")},
        }


def gguf_options(
    quant: str = "Q4_K_M",
    mmproj_type: str = "f16",
    imatrix: str = "auto",
    tensor_types: Iterable[tuple[str, str]] = (),
    smooth: Literal["none", "awq"] = "none",
    bits: int | str | None = None,
    symmetric: bool | None = None,
    compatible: bool = False,
    named: bool = True,
) -> GgufOptions:
    """`GgufOptions` from what a user types; `quant` is a file type or an algorithm, `imatrix` may be a file's path.

    `bits` and `symmetric` describe the codes of an algorithm (None: 4, and its own choice). Raises `BadInputError` for
    an unknown type or algorithm (with the choices) and for choices that exclude each other.
    """
    types = tuple((pattern, ggml_type(kind).name) for pattern, kind in tensor_types)
    mmproj = file_type(mmproj_type).name
    source: Importance | Path = imatrix if imatrix in ("auto", "none") else Path(imatrix)  # type: ignore[assignment]
    if isinstance(source, Path) and not source.is_file():
        raise BadInputError(f"--imatrix {imatrix}: no such file; give auto, none or a file of llama-imatrix")
    if quant.lower() in ALGORITHMS:
        if smooth != "none":
            raise BadInputError(
                f"--smooth {smooth} is for file types such as Q4_K_M; --quant awq+gptq smooths by itself"
            )
        if isinstance(source, Path):
            raise BadInputError(f"--imatrix {imatrix} is for file types such as Q4_K_M; {quant} does not read it")
        scheme, kind = _codes(quant.lower(), int(bits or 4), symmetric)
        return GgufOptions(kind, mmproj, "none", types, "none", scheme, compatible, named)
    try:
        own = file_type(quant).name
    except BadInputError as error:
        raise BadInputError(f"--quant: {error}; or one of the algorithms {', '.join(_ALGORITHMS)}") from error
    if bits is not None or symmetric is not None:
        raise BadInputError(f"--bits and --symmetric describe the codes of an algorithm; --quant {quant} has its own")
    return GgufOptions(own, mmproj, source, types, smooth, None, compatible, named)


def _codes(algorithm: str, bits: int, symmetric: bool | None) -> tuple[QuantScheme, str]:
    """The scheme of an algorithm's codes, its scales exact in the type that holds them; and that type."""
    if algorithm not in _ALGORITHMS:
        raise BadInputError(
            f"--quant {algorithm}: GGUF holds no such codes; choose {', '.join(_ALGORITHMS)}, or a file type"
        )
    scheme = make_scheme(algorithm, bits, BLOCK, symmetric)
    return exact_scheme(scheme), codes_type(scheme)


def tensors_from_dict(data: Iterable[dict[str, Any]]) -> tuple[GgufTensor, ...]:
    """Read the ``tensors`` of a manifest's plan back; raises KeyError or TypeError on damaged data."""
    return tuple(_tensor(entry) for entry in data)


def _tensor(entry: dict[str, Any]) -> GgufTensor:
    transform, scheme = entry["transform"], entry["scheme"]
    return GgufTensor(
        **{
            **entry,
            "shape": tuple(entry["shape"]),
            "transform": None if transform is None else Transform(transform["kind"], tuple(transform["arguments"])),
            "scheme": None if scheme is None else QuantScheme.from_dict(scheme),
        }
    )


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
