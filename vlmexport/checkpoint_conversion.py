"""A checkpoint that came quantized, in another format: its codes are kept, or the reason says why they cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError
from vlmexport.kept_codes import codes_scheme
from vlmexport.quantize.registry import IMPORTED
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme, make_scheme

if TYPE_CHECKING:
    from vlmexport.checkpoint_plan import CheckpointFormat, CheckpointOptions
    from vlmexport.model.importers.packed import CodeFormat, QuantizedCheckpoint


def check_conversion(kept: QuantizedCheckpoint, kind: CheckpointFormat, options: CheckpointOptions) -> None:
    """Refuse options that would need the original weights; raises `BadInputError` naming them."""
    if options.scheme_named or options.scheme != make_scheme(kind.default_quant):
        raise BadInputError(
            f"the checkpoint is already quantized ({kept.summary}) and keeps its codes: {options.scheme.algorithm} "
            "would need the original weights; leave --quant and its options out"
        )
    if options.keep:
        raise BadInputError(
            f"--keep {options.keep[0]!r}: the checkpoint is already quantized ({kept.summary}) and keeps its codes; "
            "unquantized weights would need the original ones"
        )


def conversion_schemes(
    kept: QuantizedCheckpoint, kind: CheckpointFormat, linears: Collection[str], outside: Collection[str]
) -> dict[str, QuantScheme]:
    """The scheme that describes each weight's codes in the format `kind`, by name in the model.

    `linears` are the weights of linear layers, `outside` those of them that are not the decoder's own (LM head, vision
    side). Raises `BadInputError` with the first reason for which `kind` cannot hold all of the codes.
    """
    for name, codes in kept.formats.items():
        reason = _refusal(name, codes, kind, linears, outside)
        if reason:
            raise BadInputError(f"the codes of the {kept.method} checkpoint cannot be kept: {reason}")
    schemes = _alike(kept.formats, kind)
    different = {(s.algorithm, s.bits, s.group_size) for s in schemes.values()}
    if len(different) > 1 and not kind.mixed:
        raise BadInputError(
            f"the codes of the {kept.method} checkpoint cannot be kept: they are of several kinds ({kept.summary}) and "
            f"--format {kind.name} holds one for all layers; choose --format compressed-tensors"
        )
    return schemes


def _refusal(
    name: str, codes: CodeFormat, kind: CheckpointFormat, linears: Collection[str], outside: Collection[str]
) -> str:
    """Why `kind` cannot hold the codes of one weight; empty when it can."""
    if name not in linears:
        return f"{name} is not the weight of a linear layer, and loaders look for codes in no other"
    if name in outside and kind.decoder_only:
        return f"{name} is none of the decoder's layers, the only ones that --format {kind.name} names; {_OTHER}"
    if codes.codebook and codes.codebook not in kind.algorithms:
        return f"{name} is {codes.codebook}, whose levels --format {kind.name} does not hold"
    if not codes.codebook and not kind.imported:
        return f"{name} has integer codes, and --format {kind.name} holds {', '.join(kind.algorithms)} only; {_OTHER}"
    if codes.bits not in kind.bits:
        return f"{name} has {codes.bits} bits, --format {kind.name} holds {', '.join(map(str, kind.bits))}; {_OTHER}"
    if codes.wide_scales and kind.half_scales:
        return f"{name} has scales that float16 does not hold, and --format {kind.name} has no others; {_OTHER}"
    return ""


_OTHER = "choose --format compressed-tensors"


def _alike(formats: Mapping[str, CodeFormat], kind: CheckpointFormat) -> dict[str, QuantScheme]:
    """The schemes, with what is the same for all said the same way.

    A whole row is one group of any size that a layer happens to have; one symmetric layer among asymmetric ones has
    zero points in the middle.
    """
    integers = [codes for codes in formats.values() if not codes.codebook]
    per_channel = all(codes.whole_rows for codes in integers)
    symmetric = all(codes.symmetric for codes in integers)
    found = {}
    for name, codes in formats.items():
        scheme = codes_scheme(name, codes)
        if not codes.codebook:
            size = PER_CHANNEL if per_channel else scheme.group_size
            scheme = QuantScheme(scheme.bits, symmetric, size, kind.imported or IMPORTED)
        found[name] = scheme
    return found


def most_common_scheme(schemes: Mapping[str, QuantScheme]) -> QuantScheme:
    """The scheme of most of the weights."""
    different: list[QuantScheme] = []  # a scheme cannot be hashed
    counts: Counter[int] = Counter()
    for scheme in schemes.values():
        if scheme not in different:
            different.append(scheme)
        counts[different.index(scheme)] += 1
    return different[counts.most_common(1)[0][0]]
