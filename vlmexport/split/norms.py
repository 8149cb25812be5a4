"""Normalisation layers, recognised by what they compute."""

from __future__ import annotations

import inspect

import torch
from torch import nn

_NORM_PROBE_LIMIT = 1e-5
_WIDTH = 16  # of what norms without weights are tried on: they take any


def layer_norm_of(module: nn.Module) -> tuple[float, bool] | None:
    """``(epsilon, has_bias)`` when `module` computes ``weight * (x - mean) / deviation (+ bias)``, else None.

    Found as `rms_norm_of` finds its own.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    given = dict(module.named_parameters())
    if not isinstance(epsilon, float) or given.keys() not in ({"weight"}, {"weight", "bias"}):
        return None
    if any(parameter.ndim != 1 for parameter in given.values()):
        return None
    values = {name: parameter.detach().float() for name, parameter in given.items()}
    x = torch.randn(3, len(values["weight"]), generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        got = torch.func.functional_call(module, values, (x,))
    expected = nn.functional.layer_norm(x, x.shape[-1:], values["weight"], values.get("bias"), epsilon)
    if (got - expected).abs().max() > _NORM_PROBE_LIMIT * expected.abs().max():
        return None
    return epsilon, "bias" in values


def rms_norm_of(module: nn.Module) -> tuple[float, float] | None:
    """``(epsilon, offset)`` when `module` computes ``(offset + weight) * x / rms(x)``, else None.

    Found by running the module on random numbers in FP32, so the class's name does not matter.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    names = [name for name, _ in module.named_parameters()]
    if not isinstance(epsilon, float) or names != ["weight"] or isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return None
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.ndim != 1 or _arguments(module) > 1:
        return None
    x = torch.randn(3, weight.shape[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = torch.func.functional_call(module, {"weight": weight.float()}, (x,))
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    for offset in (0.0, 1.0):
        expected = normed * (weight.float() + offset)
        if (got - expected).abs().max() <= _NORM_PROBE_LIMIT * expected.abs().max():
            return epsilon, offset
    return None


def plain_rms_norm_of(module: nn.Module) -> float | None:
    """Epsilon when `module` has no weights and computes ``x / rms(x)``, else None.

    Found as `rms_norm_of` finds its own.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    owns = [*module.parameters(), *module.children()]
    if not isinstance(epsilon, float) or owns or _arguments(module) != 1:
        return None
    x = torch.randn(3, _WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = module(x)
    expected = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return epsilon if (got - expected).abs().max() <= _NORM_PROBE_LIMIT * expected.abs().max() else None


def gated_rms_norm_of(module: nn.Module) -> float | None:
    """Epsilon when `module` computes ``weight * x / rms(x) * silu(gate)`` of x and a gate of its shape, else None.

    Found as `rms_norm_of` finds its own.
    """
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    given = dict(module.named_parameters())
    if not isinstance(epsilon, float) or given.keys() != {"weight"} or _arguments(module) != len(("x", "gate")):
        return None
    weight = given["weight"].detach().float()
    if weight.ndim != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(3, len(weight), generator=generator) for _ in range(2))
    with torch.no_grad():
        got = torch.func.functional_call(module, {"weight": weight}, (x, gate))
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    expected = normed * weight * nn.functional.silu(gate)
    return epsilon if (got - expected).abs().max() <= _NORM_PROBE_LIMIT * expected.abs().max() else None


def _arguments(module: nn.Module) -> int:
    """How many arguments a call of `module` must give."""
    given = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in given)
