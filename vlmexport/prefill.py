"""What ``--prefill int8`` asks of an export, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme

if TYPE_CHECKING:
    from vlmexport.plan import OnnxOptions, WeightPlan
    from vlmexport.target import Target

INT8_ROWS = QuantScheme(bits=8, symmetric=True, group_size=PER_CHANNEL, algorithm="rtn")
_SCALE_BYTES = 4


def check_prefill(options: OnnxOptions, target: Target) -> None:
    """Raise `BadInputError` when ``options.prefill`` does not go with the target or with the other options."""
    if options.prefill not in target.onnx.prefill:
        raise BadInputError(
            f"target {target.name} takes --prefill {', '.join(target.onnx.prefill)}: INT8 prompts are for CPU profiles"
        )
    if options.prefill == "same":
        return
    refused = {
        "--attention gqa": options.attention != "gqa",
        "a quantized decoder (not --quant none)": options.scheme is None,
        "--decoder-dtype fp32": (options.decoder_dtype or target.onnx.decoder_dtype) != "fp32",
        "--kv-cache same": options.kv_cache != "same",
    }
    for need, lacking in refused.items():
        if lacking:
            raise BadInputError(f"--prefill int8 needs {need}; anything else was not proven with it")


def prompt_schemes(weights: Iterable[WeightPlan], head: str) -> dict[str, QuantScheme]:
    """The INT8 scheme of each weight that the prompt graph has itself: what decoding quantizes, but not the `head`."""
    return {w.name: INT8_ROWS for w in weights if w.action == "quantize" and w.name != head}


def prompt_bytes(weights: Mapping[str, WeightPlan], schemes: Iterable[str]) -> int:
    """Bytes of the INT8 matrices and their scales: in the file, and about as much memory once they are loaded."""
    shapes = (weights[name].shape for name in schemes)
    return sum(rows * columns + _SCALE_BYTES * rows for rows, columns in shapes)
