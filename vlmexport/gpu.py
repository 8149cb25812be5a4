"""`Gpu`: what an NVIDIA GPU has and takes, parsed from one TOML file in ``targets/trt`` and checked."""

from __future__ import annotations

from dataclasses import dataclass

GPU_VERSION = 1


@dataclass(frozen=True)
class Gpu:
    """One GPU; see ``targets/trt/*.toml``.

    `memory` in bytes, `bandwidth` in bytes per second, `fp16_flops` the dense FP16 tensor-core rate in operations per
    second. `shared_memory`: the CPU uses the same memory. `rtx` is TensorRT for RTX's name of its compute capability
    (``SM80``), or empty where it builds nothing for this GPU. `weights` are the precisions its engines take, `refused`
    the reason for each other one (of ``int4``, ``int8``, ``fp16``). `source` says where the numbers are from.
    """

    name: str
    title: str
    aliases: tuple[str, ...]
    compute_capability: str
    memory: int
    bandwidth: float
    fp16_flops: float
    shared_memory: bool
    rtx: str
    weights: tuple[str, ...]
    refused: dict[str, str]
    source: str
