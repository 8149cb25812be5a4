"""The ``transformersjs`` layout's choice of files: several precisions of one model side by side (``--dtypes``)."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vlmexport.errors import BadInputError
from vlmexport.quantize.registry import algorithm
from vlmexport.quantize.scheme import QuantScheme, make_scheme

if TYPE_CHECKING:
    from vlmexport.plan import ExportPlan, OnnxOptions

WEB_LAYOUT = "transformersjs"
DEFAULT_DTYPES = ("q4",)
# What transformers.js takes for the name of a local model: a hub id without an owner.
_FOLDER_NAME = re.compile(r"\w([\w.-]{0,94}\w)?", re.ASCII)


@dataclass(frozen=True)
class WebDtype:
    """One precision of the ``transformersjs`` layout.

    `suffix` is what transformers.js puts behind a file's name. `decoder` is the type of embeddings, image features,
    activations and KV cache, `encoder` the storage of the vision side, `bits` the width of the decoder's codes (None:
    its weights are floats of the type `decoder`).
    """

    name: str
    suffix: str
    decoder: Literal["fp16", "fp32"]
    encoder: Literal["fp16", "fp32"]
    bits: int | None


WEB_DTYPES = {
    dtype.name: dtype
    for dtype in (
        WebDtype("fp32", "", "fp32", "fp32", None),
        WebDtype("fp16", "_fp16", "fp16", "fp16", None),
        WebDtype("q4", "_q4", "fp32", "fp16", 4),
        WebDtype("q4f16", "_q4f16", "fp16", "fp16", 4),
        WebDtype("int8", "_int8", "fp32", "fp16", 8),
    )
}


def settle_dtypes(options: OnnxOptions) -> OnnxOptions:
    """The options of the export's primary dtype, which is what a plan shows; other layouts' options as they are.

    The primary dtype is the one with the fewest bits, the first named of those, and stands first in the result's
    ``dtypes``. Raises `BadInputError` for options that the layout or a dtype has no place for.
    """
    if options.layout != WEB_LAYOUT:
        if options.dtypes:
            raise BadInputError(f"--dtypes is for --layout {WEB_LAYOUT}; layout {options.layout} has one dtype")
        return options
    names = tuple(dict.fromkeys(options.dtypes or DEFAULT_DTYPES))
    if unknown := [name for name in names if name not in WEB_DTYPES]:
        raise BadInputError(f"--dtypes: there is no {unknown[0]!r}; choose of {', '.join(WEB_DTYPES)}")
    _check_fixed(options)
    primary = min((WEB_DTYPES[name] for name in names), key=lambda dtype: dtype.bits or 32)
    _check_choice(options, primary)
    ordered = (primary.name, *(name for name in names if name != primary.name))
    settled = dataclasses.replace(options, dtypes=ordered)
    return options_of(settled, primary, primary_scheme(options, primary))


def options_of(options: OnnxOptions, dtype: WebDtype, scheme: QuantScheme | None) -> OnnxOptions:
    """`options` for one dtype, whose codes are of `scheme`."""
    return dataclasses.replace(options, scheme=scheme, encoder_dtype=dtype.encoder, decoder_dtype=dtype.decoder)


def primary_scheme(options: OnnxOptions, primary: WebDtype) -> QuantScheme | None:
    """The scheme of the primary dtype's codes: the one asked for, of the dtype's width."""
    if primary.bits is None:
        return None
    if options.scheme_named or (options.scheme is not None and options.scheme.bits == primary.bits):
        return options.scheme
    return plain_scheme(primary.bits)


def plain_scheme(bits: int) -> QuantScheme:
    """Round to nearest: for dtypes wide enough that no calibration is needed, beside a primary one that had it."""
    return make_scheme("rtn", bits)


def check_folder_name(out: Path, options: OnnxOptions) -> None:
    """Raise `BadInputError` for a folder that transformers.js would not take for a model, by its name."""
    name = out.resolve().name
    bad = "--" in name or ".." in name or name.endswith((".git", ".ipynb"))
    if options.layout == WEB_LAYOUT and (bad or _FOLDER_NAME.fullmatch(name) is None):
        raise BadInputError(
            f"--out: transformers.js loads no folder named {name!r}; use 1 to 96 letters, digits, '_', '-' and '.', "
            "without '--' or '..', a letter or digit at both ends"
        )


def check_widths(plan: ExportPlan, dtype: WebDtype) -> None:
    """Raise `BadInputError` when no code of `plan` has the width that `dtype` is named for."""
    widths = sorted({scheme.bits for scheme in plan.schemes.values()})
    if dtype.bits is not None and dtype.bits not in widths:
        found = ", ".join(f"{bits}-bit" for bits in widths) or "no"
        raise BadInputError(f"--dtypes {dtype.name} holds {dtype.bits}-bit codes, but the weights have {found} codes")


def _check_fixed(options: OnnxOptions) -> None:
    """Refuse what the client has no words for."""
    fixed: tuple[tuple[str, str, str], ...] = (
        (options.attention, "gqa", "--attention"),
        (options.kv_cache, "same", "--kv-cache"),
        (options.prefill, "same", "--prefill"),
    )
    for value, only, flag in fixed:
        if value != only:
            raise BadInputError(f"{flag} {value}: transformers.js runs only {flag} {only}")
    if options.preprocessor:
        raise BadInputError("--with-preprocessor: transformers.js prepares pictures by itself")
    given = (("--encoder-dtype", options.encoder_dtype), ("--decoder-dtype", options.decoder_dtype))
    for flag, named in given:
        if named is not None:
            raise BadInputError(f"{flag} {named} has no effect with --layout {WEB_LAYOUT}, where --dtypes says it")


def _check_choice(options: OnnxOptions, primary: WebDtype) -> None:
    """Refuse quantization that no dtype holds, and dtypes that nothing was quantized for."""
    if primary.bits is None:
        if options.choice is not None or (options.scheme_named and options.scheme is not None):
            raise BadInputError(f"--dtypes {','.join(options.dtypes)} holds floats only; add q4, q4f16 or int8")
        return
    scheme = options.scheme
    if scheme is None:
        raise BadInputError(
            f"--dtypes {primary.name} holds {primary.bits}-bit codes; with --quant none choose fp32,fp16"
        )
    if options.scheme_named and scheme.bits != primary.bits:
        raise BadInputError(
            f"--dtypes {primary.name} holds {primary.bits}-bit codes, not {scheme.bits}-bit ones; "
            f"add --bits {primary.bits} or choose another dtype"
        )
    if algorithm(scheme.algorithm).codebook:
        raise BadInputError(f"--quant {scheme.algorithm}: --dtypes {primary.name} holds evenly spaced codes only")
