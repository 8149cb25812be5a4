"""`TrtOptions`: the choices of ``vlmexport trt``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from vlmexport.plan import OnnxOptions

Backend: TypeAlias = Literal["auto", "rtx", "trt", "script"]


@dataclass(frozen=True)
class TrtOptions:
    """The choices of ``vlmexport trt``.

    `onnx` are those of the graphs. `gpu` is a profile's name. `max_images` None: as many tiles as the model's own
    processor makes of one picture. `engines`: True asks for them (it is an error where they cannot be built), False
    leaves them out, None builds what can be built here. `portable` builds one RTX engine for all of its architectures.
    `two_decoders` makes an engine each of prefill and decode instead of one with two profiles.
    """

    onnx: OnnxOptions
    gpu: str
    backend: Backend = "auto"
    max_batch: int = 1
    max_seq: int = 4096
    max_images: int | None = None
    engines: bool | None = None
    triton: bool = False
    portable: bool = False
    two_decoders: bool = False
