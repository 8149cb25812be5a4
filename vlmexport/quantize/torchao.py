"""Adapter to torchao: its own `quantize_` chooses the integers, scales and zero points; we only read them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.registry import algorithm, check_installed
from vlmexport.quantize.scheme import PER_CHANNEL, QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor


def quantize_torchao(weight: torch.Tensor, scheme: QuantScheme, name: str = "weight") -> QuantizedTensor:
    """Codes of ``weight [N, K]`` (any float dtype, any device) as torchao's configuration ``scheme.algorithm`` gives.

    The weight is handed over in float32, so scales are float32 ``[N, K/g]``. torchao's integers are signed; ours are
    shifted by ``2**(bits-1)``, zero points with them: the dequantized values are torchao's own, bit for bit.

    Raises `BadInputError` when K is not a multiple of the group size or the weight holds NaN or infinity,
    `NotPossibleHereError` when torchao is not installed.
    """
    columns = weight.shape[1]
    group_size = columns if scheme.group_size == PER_CHANNEL else scheme.group_size
    if columns % group_size:
        raise BadInputError(
            f"{name}: {columns} input features are not a multiple of group size {group_size}; "
            "choose a smaller --group-size or keep this layer with --keep"
        )
    if not torch.isfinite(weight).all():
        raise BadInputError(f"{name}: the weight holds NaN or infinity")
    made = torchao_tensor(weight, scheme)
    middle = 1 << (scheme.bits - 1)
    codes = (made.qdata.to(torch.int16) + middle).to(torch.uint8)
    zero_point = None if scheme.symmetric else (made.zero_point.to(torch.int16) + middle).to(torch.uint8)
    return QuantizedTensor(codes, made.scale, zero_point, scheme.bits, group_size)


def torchao_tensor(weight: torch.Tensor, scheme: QuantScheme) -> Any:
    """What torchao itself makes of ``weight [N, K]`` in float32: ``qdata`` (int8), ``scale``, ``zero_point``.

    Raises `NotPossibleHereError` when torchao is not installed.
    """
    quantization = _torchao(scheme.algorithm)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    quantization.quantize_(linear, torchao_config(scheme))
    return linear.weight


def torchao_config(scheme: QuantScheme) -> Any:
    """The configuration of ``torchao.quantization`` that a ``torchao:`` scheme names.

    Raises `NotPossibleHereError` when torchao is not installed.
    """
    return _CONFIGS[scheme.algorithm](_torchao(scheme.algorithm), scheme)


def _intx(quantization: Any, scheme: QuantScheme) -> Any:
    mapping = quantization.MappingType
    per_row = scheme.group_size == PER_CHANNEL
    return quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{scheme.bits}"),
        granularity=quantization.PerAxis(0) if per_row else quantization.PerGroup(scheme.group_size),
        mapping_type=mapping.SYMMETRIC if scheme.symmetric else mapping.ASYMMETRIC,
    )


def _int8(quantization: Any, scheme: QuantScheme) -> Any:
    return quantization.Int8WeightOnlyConfig(set_inductor_config=False)


def _int8_dynamic(quantization: Any, scheme: QuantScheme) -> Any:
    return quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


# torchao's packed INT4 formats need mslk or CUDA; its unpacked one holds the same integers.
_CONFIGS: dict[str, Callable[[Any, QuantScheme], Any]] = {
    "torchao:int4wo": _intx,
    "torchao:intx": _intx,
    "torchao:int8wo": _int8,
    "torchao:int8da-int8w": _int8_dynamic,
}


def _torchao(name: str) -> Any:
    """The module ``torchao.quantization``, for the algorithm `name`."""
    check_installed(algorithm(name))
    logger = logging.getLogger("torchao")
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every CUDA library that it cannot load here
    try:
        return importlib.import_module("torchao.quantization")
    finally:
        logger.setLevel(before)
