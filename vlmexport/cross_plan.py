"""What an export of a decoder that attends to states beside its tokens cannot have yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import QuantScheme

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.plan import OnnxOptions
    from vlmexport.split.parts import Split


def check_cross(vlm: VLM, split: Split, options: OnnxOptions) -> None:
    """Raise `BadInputError` for options that know decoders of their own tokens alone."""
    if not split.merge.crosses:
        return
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
