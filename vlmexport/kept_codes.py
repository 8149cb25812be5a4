"""Codes that came with a quantized checkpoint, as the plans see them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError
from vlmexport.quantize.registry import IMPORTED
from vlmexport.quantize.scheme import MAX_GROUP, MIN_GROUP, PER_CHANNEL, QuantScheme, make_scheme

if TYPE_CHECKING:
    from vlmexport.model.importers.packed import CodeFormat, QuantizedCheckpoint
    from vlmexport.quantize.tensor import QuantizedTensor


def check_kept(kept: QuantizedCheckpoint | None, scheme: QuantScheme | None, *, named: bool) -> None:
    """Refuse a `scheme` that the model's own codes contradict; `named` says that it was asked for.

    Raises `BadInputError` for a quantized checkpoint with any scheme but the default one, and for kept codes of a
    checkpoint that has none.
    """
    if scheme is None or (kept is None and scheme.algorithm != IMPORTED):
        return
    if kept is None:
        raise BadInputError("the plan keeps codes of a quantized checkpoint, but the model is not quantized")
    if scheme.algorithm != IMPORTED and (named or scheme != make_scheme()):
        raise BadInputError(
            f"the checkpoint is already quantized ({kept.summary}) and keeps its codes: {scheme.algorithm} would need "
            "the original weights; leave --quant and its options out, or choose --quant none for floats"
        )


def kept_scheme(name: str, codes: CodeFormat, float_dtype: str) -> QuantScheme:
    """The scheme that describes `codes` of the weight `name`, for scales of `float_dtype` (``fp16``, ``fp32``).

    Raises `BadInputError` for bits, groups or scales that no scheme describes.
    """
    if codes.wide_scales and not codes.codebook and float_dtype == "fp16":
        raise BadInputError(f"{name}: its scales do not fit float16; choose --decoder-dtype fp32, or --quant none")
    try:
        return codes_scheme(name, codes)
    except BadInputError as error:
        raise BadInputError(f"{error}; or --quant none for floats") from error


def codes_scheme(name: str, codes: CodeFormat) -> QuantScheme:
    """The scheme that describes `codes` of the weight `name`; raises `BadInputError` when none does."""
    size = codes.group_size
    storable = MIN_GROUP <= size <= MAX_GROUP and size & (size - 1) == 0
    if codes.whole_rows and (codes.codebook == "fp8" or not storable):
        size = PER_CHANNEL
    try:
        return QuantScheme(codes.bits, codes.symmetric, size, codes.codebook or IMPORTED)
    except BadInputError as error:
        raise BadInputError(f"{name} came quantized, {codes.words(per_channel=True)}: {error}") from error


def requantized_scheme(codes: CodeFormat, name: str, group_sizes: Mapping[str, list[int]]) -> QuantScheme:
    """What `codes` that a target cannot hold become when they are rounded again: symmetric, as many bits or more.

    `group_sizes` are those that the target takes, by bits; the first that divides is taken. Raises `BadInputError` when
    none does.
    """
    bits = 8 if codes.bits == 8 else 4
    return make_scheme("rtn", bits, fitting_group({codes.in_features}, group_sizes[str(bits)], name))


def fitting_group(widths: set[int], sizes: Sequence[int], name: str) -> int:
    """The first of the group `sizes` that divides every one of the input `widths` (-1 always does, and is the last).

    Raises `BadInputError` naming the width when none does.
    """
    for size in sizes:
        if size == PER_CHANNEL or all(width % size == 0 for width in widths):
            return size
    least = min(sizes)
    odd = min(width for width in widths if width % least)
    raise BadInputError(f"{name} has {odd} input features, not a multiple of {least}, the smallest group; use --keep")


class _Subset(Mapping[str, "QuantizedTensor"]):
    """Those codes of a checkpoint that are kept; read when asked for, like the checkpoint's own."""

    def __init__(self, codes: Mapping[str, QuantizedTensor], names: frozenset[str]) -> None:
        self._codes, self._names = codes, names

    def __getitem__(self, name: str) -> QuantizedTensor:
        if name not in self._names:
            raise KeyError(name)
        return self._codes[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def kept_codes(kept: QuantizedCheckpoint, requantized: Collection[str]) -> Mapping[str, QuantizedTensor]:
    """The checkpoint's codes but those of the `requantized` weights, which are to be rounded again."""
    return _Subset(kept.codes, frozenset(kept.codes) - frozenset(requantized)) if requantized else kept.codes
