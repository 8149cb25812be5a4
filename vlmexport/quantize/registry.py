"""The quantization algorithms by name: what each takes, and where its code is (one module and one entry each)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from vlmexport.errors import BadInputError, NotPossibleHereError

_ALL_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Algorithm:
    """One method of quantizing a weight.

    `function` is ``module:name`` below ``vlmexport.quantize`` of the data-free ``(weight [N, K], scheme, name) ->
    QuantizedTensor``, or empty when the method needs activations (`calibrated`: the layer loop calls its functions).
    `smooths` methods fold scales into the layer before; `clips` ones take ``clip``. `bits`, `symmetric` and
    `group_sizes` are what it takes (None: anything). `codebook` methods have levels that are not evenly spaced.
    `wide_scales` ones keep float32 scales; the others float16 wherever it holds them. `package` is the Python package
    that an optional extra of the same name installs, or empty. `dtype` names the format where the bits do not.
    `imported` codes came with the checkpoint: it makes none, so it is nothing that a user can choose.
    """

    name: str
    summary: str
    function: str = ""
    bits: tuple[int, ...] = _ALL_BITS
    symmetric: bool | None = None
    group_sizes: tuple[int, ...] | None = None
    default_bits: int = 4
    default_group: int = 32
    smooths: bool = False
    clips: bool = False
    codebook: bool = False
    wide_scales: bool = False
    package: str = ""
    dtype: str = ""
    imported: bool = False

    @property
    def calibrated(self) -> bool:
        """True when the method needs the activations of calibration samples."""
        return not self.function and not self.imported

    def stored_dtype(self, bits: int) -> str:
        """What a weight of this method is stored as: ``int4``, ``nf4``, ``float8_e4m3fn``..."""
        return self.dtype or f"int{bits}"


_TORCHAO = "torchao:quantize_torchao"
ALGORITHMS: dict[str, Algorithm] = {
    a.name: a
    for a in (
        Algorithm("awq+gptq", "activation-aware scales, then error-compensating rounding", smooths=True, clips=True),
        Algorithm("awq", "activation-aware scales folded into the layer before", smooths=True, clips=True),
        Algorithm("gptq", "error-compensating rounding, act-order with static groups", clips=True),
        Algorithm("hqq", "half-quadratic search of zero points, no data", "hqq:quantize_hqq", symmetric=False),
        Algorithm("rtn", "round to nearest, no data", "rtn:quantize_rtn"),
        Algorithm(
            "nf4", "4-bit NormalFloat of bitsandbytes, no data", "nf4:quantize_nf4",
            bits=(4,), symmetric=True, group_sizes=(64, 128, 256), default_group=64, codebook=True,
            wide_scales=True, dtype="nf4",
        ),
        Algorithm(
            "nf4:nested", "NF4 with its scales quantized again to 8 bits", "nf4:quantize_nf4_nested",
            bits=(4,), symmetric=True, group_sizes=(64, 128, 256), default_group=64, codebook=True,
            wide_scales=True, dtype="nf4",
        ),
        Algorithm(
            "fp8", "FP8 E4M3 weights, one scale per output row", "fp8:quantize_fp8",
            bits=(8,), symmetric=True, group_sizes=(-1,), default_bits=8, default_group=-1, codebook=True,
            wide_scales=True, dtype="float8_e4m3fn",
        ),
        Algorithm(
            "smoothquant", "INT8 weights and activations, outliers moved into the weights",
            bits=(8,), symmetric=True, group_sizes=(-1,), default_bits=8, default_group=-1, smooths=True,
        ),
        Algorithm(
            "torchao:int4wo", "torchao's own INT4 weights", _TORCHAO,
            bits=(4,), wide_scales=True, package="torchao",
        ),
        Algorithm(
            "torchao:intx", "torchao's own weights of 2, 3, 4 or 8 bits", _TORCHAO,
            wide_scales=True, package="torchao",
        ),
        Algorithm(
            "torchao:int8wo", "torchao's own INT8 weights", _TORCHAO,
            bits=(8,), symmetric=True, group_sizes=(-1,), default_bits=8, default_group=-1,
            wide_scales=True, package="torchao",
        ),
        Algorithm(
            "torchao:int8da-int8w", "torchao's INT8 weights with dynamic INT8 activations", _TORCHAO,
            bits=(8,), symmetric=True, group_sizes=(-1,), default_bits=8, default_group=-1,
            wide_scales=True, package="torchao",
        ),
    )
}  # fmt: skip

IMPORTED = "imported"
# What ``--quant`` offers. Codes of a quantized checkpoint are kept without being asked for.
CHOICES = tuple(ALGORITHMS)
ALGORITHMS[IMPORTED] = Algorithm(IMPORTED, "codes kept from a quantized checkpoint", imported=True)

_PACKED_INT4 = (
    "its kernels need CUDA or the package mslk; --quant torchao:int4wo is torchao's INT4 that runs everywhere"
)
_FLOAT8_ACTIVATIONS = "its kernels need an NVIDIA GPU of compute capability 8.9, MI300 or an XPU; --quant fp8 makes FP8"
# Configurations of torchao 0.18 that exist and are not offered, with what was seen when they were tried.
REFUSED: dict[str, str] = {
    "torchao:int4wo-plain": _PACKED_INT4,
    "torchao:int4wo-preshuffled": _PACKED_INT4,
    "torchao:int4wo-plain-int32": _PACKED_INT4,
    "torchao:int4wo-tile-packed": _PACKED_INT4,
    "torchao:float8wo": "it makes NaN of a row of zeros; --quant fp8 gives the same codes for every other row",
    "torchao:float8da-float8w": _FLOAT8_ACTIVATIONS,
    "torchao:float8da-int4w": "its kernels need CUDA and the package mslk; choose --quant torchao:int4wo",
    "torchao:int8da-intxw": "it is made for ExecuTorch, which is no target; choose --quant torchao:int4wo",
    "torchao:int8sa-int8w": "its activation scales are fixed beforehand; choose --quant smoothquant",
    "torchao:nf4": "it is for training; --quant nf4 makes the bytes that bitsandbytes and ONNX Runtime read",
}


def refusal(name: str) -> str:
    """What to say of a method in `REFUSED`."""
    return f"quantization method {name} is refused: {REFUSED[name]}"


def algorithm(name: str) -> Algorithm:
    """The algorithm `name`; raises `BadInputError` with the reason it is refused, or listing the choices."""
    if name in REFUSED:
        raise BadInputError(refusal(name))
    if name not in ALGORITHMS:
        raise BadInputError(f"quantization method {name!r} is unknown; choose one of {', '.join(CHOICES)}")
    return ALGORITHMS[name]


def check_installed(method: Algorithm) -> None:
    """Raise `NotPossibleHereError` when the optional package of `method` is missing."""
    if method.package and importlib.util.find_spec(method.package) is None:
        raise NotPossibleHereError(
            f"--quant {method.name} needs {method.package}, which is not installed; "
            f"run `pip install vlmexport[{method.package}]`"
        )


def check_bits(method: Algorithm, bits: int) -> None:
    """Refuse a bit width that `method` does not take."""
    if bits not in method.bits:
        raise BadInputError(f"{method.name} takes {', '.join(map(str, method.bits))} bits, not {bits}")
