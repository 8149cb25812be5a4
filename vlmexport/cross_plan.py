"""What an export of a decoder that attends to states beside its tokens cannot have yet."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.quantize.scheme import QuantScheme, make_scheme

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.plan import OnnxOptions
    from vlmexport.split.parts import Split


# Settings of a generation_config that change a greedy answer and are not applied, with the number that asks nothing.
_NOT_APPLIED: dict[str, float | None] = {
    "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0,
    "min_length": 0, "min_new_tokens": 0, "guidance_scale": 1, "bad_words_ids": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "exponential_decay_length_penalty": None,
}  # fmt: skip


def fitting_options(split: Split, options: OnnxOptions) -> OnnxOptions:
    """`options` with a form of attention and a method that the decoder has: one that attends to states has no other."""
    fitted = dataclasses.replace(options, attention="standard") if _needs_standard(split) else options
    return dataclasses.replace(fitted, scheme=make_scheme("rtn"), choice=None) if split.merge.crosses else fitted


def fitting_words(split: Split | None) -> str:
    """What a suggested command says for `fitting_options`, with a space before each: nothing for other decoders."""
    if split is None:
        return ""
    form = " --attention standard" if _needs_standard(split) else ""
    return (" --quant rtn" if split.merge.crosses else "") + form


def answer_notes(vlm: VLM, split: Split | None) -> tuple[str, ...]:
    """What the generation_config of an encoder-decoder asks of answers and no runner here does; none for others."""
    if split is None or split.merge.decoder_start_token_id is None:
        return ()
    config = vlm.model.generation_config
    asked = {name: getattr(config, name, None) for name in _NOT_APPLIED}
    found = [f"{name} {value}" for name, value in asked.items() if value not in (None, _NOT_APPLIED[name])]
    if not found:
        return ()
    return (f"answers are made without what generation_config also asks for: {', '.join(found)}",)


def _needs_standard(split: Split) -> bool:
    """Has the decoder what the standard form of attention alone has: added positions, chunks, counted rows?"""
    module = _decoder(split)
    return any(getattr(module, name, None) for name in ("relative", "chunks", "counted"))


def _decoder(split: Split) -> Any:
    from vlmexport.split.parts import Role  # torch-side code, which help does not load

    return split.parts[Role.DECODER].module


def _adds_positions(split: Split) -> bool:
    return getattr(_decoder(split), "relative", None) is not None


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
