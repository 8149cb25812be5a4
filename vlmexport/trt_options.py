"""`TrtOptions`: the choices of ``vlmexport trt``, and how its ``--quant`` becomes a scheme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vlmexport.errors import BadInputError
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.registry import CHOICES
from vlmexport.quantize.scheme import DEFAULT_ALGORITHM, PER_CHANNEL, QuantScheme, make_scheme

Backend: TypeAlias = Literal["auto", "rtx", "trt", "script"]
Triton: TypeAlias = Literal["tensorrt", "onnxruntime"]
TARGET = "tensorrt"
# Precisions that ``--quant`` names beside the algorithms.
PRECISIONS = ("fp16", "int4", "int8")
USUAL_LENGTH = 4096
USUAL_PROMPT = 2048
# Of NVIDIA's own INT4 kernels; what a target takes besides is in its profile.
USUAL_GROUP = 128
_INT8_BITS = 8


@dataclass(frozen=True)
class TrtOptions:
    """The choices of ``vlmexport trt``.

    `onnx` are those of the graphs. `gpu` is a profile's name, or an alias of it. `max_seq` None: `USUAL_LENGTH`, or as
    much as the model's positions allow. `max_images` None: as many tiles as the model's own processor makes of one
    picture. `max_prompt` None: `USUAL_PROMPT` new tokens in a call. `engines`: True asks for them (it is an error where
    they cannot be built), False leaves them out, None builds what can be built here. `triton` is the backend of a
    Triton repository, None for none. `portable` builds one RTX engine for all of its architectures. `two_decoders`
    makes an engine each of prefill and decode instead of one with two profiles. `group_named` says that the user asked
    for the group size: it does not give way to a model whose widths it does not divide.
    """

    onnx: OnnxOptions
    gpu: str
    backend: Backend = "auto"
    max_batch: int = 1
    max_seq: int | None = None
    max_images: int | None = None
    max_prompt: int | None = None
    engines: bool | None = None
    triton: Triton | None = None
    portable: bool = False
    two_decoders: bool = False
    group_named: bool = False


def trt_scheme(
    quant: str, *, bits: int | None = None, group_size: int | None = None, clip: bool = False
) -> QuantScheme | None:
    """The scheme that ``--quant`` and its companions mean; None for ``fp16``.

    ``int4`` is the default algorithm in blocks of 128, ``int8`` rounds to nearest with one scale per output channel; an
    algorithm's name gives 4 bits unless `bits` says 8. Raises `BadInputError` for an unknown name and for companions
    that have no effect.
    """
    if quant == "fp16":
        if bits is not None or group_size is not None or clip:
            raise BadInputError("--bits, --group-size and --clip have no effect with --quant fp16")
        return None
    if quant not in (*PRECISIONS, *CHOICES):
        raise BadInputError(f"--quant {quant!r} is unknown; choose one of {', '.join((*PRECISIONS, *CHOICES))}")
    if quant in PRECISIONS and bits is not None:
        raise BadInputError(f"--bits has no effect with --quant {quant}; name an algorithm, such as --quant gptq")
    if quant == "int8":
        return make_scheme("rtn", _INT8_BITS, PER_CHANNEL if group_size is None else group_size, None, clip)
    name = DEFAULT_ALGORITHM if quant == "int4" else quant
    wide = bits == _INT8_BITS or name in ("torchao:int8wo", "fp8", "smoothquant", "torchao:int8da-int8w")
    default = PER_CHANNEL if wide else USUAL_GROUP
    return make_scheme(name, bits, default if group_size is None else group_size, None, clip)


def trt_onnx_options(
    scheme: QuantScheme | None,
    *,
    lm_head: Literal["quantized", "fp16"] = "quantized",
    keep: tuple[str, ...] = (),
    requantize: bool = False,
    scheme_named: bool = False,
) -> OnnxOptions:
    """The choices of the graphs: the static form of attention; the cache's length is settled with the model at hand."""
    return OnnxOptions(
        target=TARGET,
        layout="tensorrt",
        scheme=scheme,
        lm_head=lm_head,
        attention="static",
        keep=keep,
        scheme_named=scheme_named,
        cache_length=USUAL_LENGTH,
        requantize=requantize,
    )
