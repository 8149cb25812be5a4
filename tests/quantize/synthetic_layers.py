"""Linear layers with the inputs that make quantization hard: correlated features and a few loud ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from tests.quantize.data import statistics_of
from vlmexport.quantize.calibrated import quantize_calibrated, search_scale
from vlmexport.quantize.scheme import QuantScheme

FEATURES, OUTPUTS, TOKENS = 768, 192, 4096
SEEDS = (0, 1)


@dataclass(frozen=True)
class Layer:
    """``weight [N, K]`` and tokens ``[T, K]``: those to calibrate on, and fresh ones to judge by."""

    weight: torch.Tensor
    calibration: torch.Tensor
    test: torch.Tensor

    def error(self, weight: torch.Tensor, divisor: torch.Tensor | None = None) -> float:
        """Relative output error on the fresh tokens of `weight`, which reads the inputs divided by `divisor`."""
        expected = self.test @ self.weight.t()
        inputs = self.test if divisor is None else self.test / divisor
        return float((inputs @ weight.t() - expected).square().sum() / expected.square().sum())


@cache
def synthetic_layer(decay: float, seed: int, tokens: int = TOKENS) -> Layer:
    """Inputs of covariance ``i^-decay`` in a random basis times log-normal strengths, 1 % of them 12 times louder.

    The weight is Gaussian over the log-normal strength: every feature speaks equally loud in the output but the 1 %.
    That reproduces the rows of RTN, and of AWQ without weight magnitudes, that the facts give for their layers.
    """
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=generator)).Q
    spectrum = torch.arange(1, FEATURES + 1).float() ** (-decay / 2)
    strength = torch.exp(torch.randn(FEATURES, generator=generator) * 0.5)
    weight = torch.randn(OUTPUTS, FEATURES, generator=generator) / (FEATURES**0.5 * strength)
    strength[torch.randperm(FEATURES, generator=generator)[: FEATURES // 100]] *= 12

    def draw(count: int) -> torch.Tensor:
        return torch.randn(count, FEATURES, generator=generator) * spectrum @ basis.t() * strength

    return Layer(weight, draw(tokens), draw(TOKENS))


def layer_error(layer: Layer, scheme: QuantScheme) -> float:
    """Relative output error on fresh tokens of the layer's weight after `scheme`, scales folded."""
    statistics = statistics_of(layer.calibration)
    scale = search_scale([layer.weight], statistics, [scheme])
    if scale is None:
        return layer.error(quantize_calibrated(layer.weight, statistics, scheme)[0].dequantize())
    folded = statistics.scaled(1 / scale)
    return layer.error(quantize_calibrated(layer.weight * scale, folded, scheme)[0].dequantize(), scale)


def mean_error(decay: float, scheme: QuantScheme, tokens: int = TOKENS) -> float:
    """Mean of `layer_error` over the seeds."""
    return sum(layer_error(synthetic_layer(decay, seed, tokens), scheme) for seed in SEEDS) / len(SEEDS)
