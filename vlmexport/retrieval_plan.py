"""Which options an export of a model that gives embeddings takes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vlmexport.errors import UnsupportedModelError
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import make_scheme

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

NOT_CALIBRATED = "rtn, hqq or none"


def method_words(vlm: VLM) -> str:
    """What a suggested command says of the method, with a space before it: nothing where the usual one will do."""
    return " --quant rtn" if vlm.facts.output == "embeddings" else ""


def usual_options(vlm: VLM, target: str) -> OnnxOptions:
    """The default options for `target`, with a method that needs no samples where there are none."""
    options = OnnxOptions(target)
    return dataclasses.replace(options, scheme=make_scheme("rtn")) if method_words(vlm) else options


def check_retrieval(vlm: VLM, options: OnnxOptions) -> None:
    """Raise `UnsupportedModelError` for a model that gives embeddings and options that are not for it.

    Such a decoder has no cache, and calibration samples are questions about pictures, which its processor cannot take.
    """
    if vlm.facts.output != "embeddings":
        return
    told = f"{vlm.facts.model_type} gives embeddings of pages and queries, so"
    scheme = options.scheme
    if options.choice is not None or (scheme is not None and scheme.calibrated):
        method = "auto" if options.choice is not None or scheme is None else scheme.algorithm
        raise UnsupportedModelError(
            f"{told} --quant {method} has no samples to calibrate on (they are questions about pictures); choose "
            f"--quant {NOT_CALIBRATED}"
        )
    choices = (
        ("--layout", options.layout, "split"),
        ("--attention", options.attention, "gqa"),
        ("--kv-cache", options.kv_cache, "same"),
        ("--prefill", options.prefill, "same"),
    )
    for name, value, only in choices:
        if value != only:
            raise UnsupportedModelError(f"{told} {name} {value} is not for it; choose {name} {only}")
    if options.preprocessor:
        raise UnsupportedModelError(f"{told} --with-preprocessor, which is made for questions, is not for it")
