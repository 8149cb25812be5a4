"""What an export of a decoder that attends to states beside its tokens cannot have yet."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.split.parts import Role

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.plan import OnnxOptions
    from vlmexport.split.parts import Split


def fitting_options(split: Split, options: OnnxOptions) -> OnnxOptions:
    """`options` with a method and a form of attention that a decoder beside whose tokens are states has."""
    if not split.merge.crosses:
        return options
    fitted = dataclasses.replace(options, scheme=make_scheme("rtn"), choice=None)
    return dataclasses.replace(fitted, attention="standard") if _adds_positions(split) else fitted


def fitting_words(split: Split | None) -> str:
    """What a suggested command says for `fitting_options`, with a space before each: nothing for other decoders."""
    if split is None or not split.merge.crosses:
        return ""
    return " --quant rtn" + (" --attention standard" if _adds_positions(split) else "")


def _adds_positions(split: Split) -> bool:
    return getattr(split.parts[Role.DECODER].module, "relative", None) is not None


def check_cross(vlm: VLM, split: Split, options: OnnxOptions) -> None:
    """Raise `BadInputError` for options that know decoders of their own tokens alone.

    Raises `UnsupportedModelError` for a form of attention that cannot say what the decoder adds to its scores.
    """
    if not split.merge.crosses:
        return
    if _adds_positions(split) and options.attention != "standard":
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: its attention adds learned relative positions to its scores, which --attention "
            f"{options.attention} has no form for; choose --attention standard"
        )
    what = f"{vlm.facts.model_type}: its decoder attends to states beside its own tokens"
    if options.layout != "split":
        raise BadInputError(f"{what}, which layout {options.layout!r} has no form for; choose --layout split")
    for name, value in (("--kv-cache", options.kv_cache), ("--prefill", options.prefill)):
        if value != "same":
            raise BadInputError(f"{what}, for which there is no {name} {value} yet; choose {name} same")
    if options.choice is not None and not hasattr(options.choice, "scheme"):
        raise BadInputError(f"{what}; --quant auto measures decoders of tokens alone, choose --quant rtn or hqq")
    scheme = options.scheme
    schemes: tuple[QuantScheme, ...] = () if scheme is None else (scheme, *scheme.overrides.values())
    for each in schemes:
        if each.calibrated:
            raise BadInputError(
                f"{what}; {each.algorithm} calibrates decoders of tokens alone, choose --quant rtn or hqq"
            )
