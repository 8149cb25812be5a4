"""`InputStatistics` and `InputPower`: what is known of a linear layer's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class InputStatistics:
    """Sums over calibration tokens ``x [K]``; on the device of what is added.

    `moment`: float32 ``[K, K]``, the sum of ``x x^T``; `absolute` and `maximum`: float32 ``[K]``, the sum and the
    largest of ``|x|``; `tokens`: their number. GPTQ's Hessian is ``2 * moment / tokens`` (arXiv 2210.17323 eq. 2); the
    squared output error of a weight error ``E [N, K]`` over the tokens is ``trace(E moment E^T)``.
    """

    moment: torch.Tensor
    absolute: torch.Tensor
    maximum: torch.Tensor
    tokens: int = 0

    @staticmethod
    def empty(in_features: int, device: torch.device | str = "cpu") -> InputStatistics:
        """Statistics of no tokens yet."""
        moment = torch.zeros(in_features, in_features, device=device)
        return InputStatistics(moment, torch.zeros(in_features, device=device), torch.zeros(in_features, device=device))

    def add(self, inputs: torch.Tensor) -> None:
        """Take in ``inputs [tokens, K]`` of any float dtype (padding already left out)."""
        x = inputs.float()
        self.moment.addmm_(x.t(), x)
        if x.shape[0]:
            magnitude = x.abs()
            self.absolute += magnitude.sum(0)
            self.maximum = torch.maximum(self.maximum, magnitude.amax(0))
        self.tokens += x.shape[0]

    def power(self) -> InputPower:
        """The part that `InputPower` is."""
        return InputPower(self.moment.diagonal().double(), self.tokens)

    def mean_absolute(self) -> torch.Tensor:
        """Mean of ``|x|`` per input feature, float32 ``[K]``."""
        return self.absolute / max(self.tokens, 1)

    def scaled(self, factor: torch.Tensor) -> InputStatistics:
        """The statistics of ``x * factor`` (``factor [K]``, positive): the inputs after scales were folded."""
        moment = self.moment * factor * factor[:, None]
        return InputStatistics(moment, self.absolute * factor, self.maximum * factor, self.tokens)


@dataclass
class InputPower:
    """Sums over tokens ``x [K]`` that cost next to nothing: `squares`, float64 ``[K]``, of ``x^2``; `tokens`.

    Their quotient is what llama.cpp calls the importance of the weight's columns.
    """

    squares: torch.Tensor
    tokens: int = 0

    @staticmethod
    def empty(in_features: int, device: torch.device | str = "cpu") -> InputPower:
        """The power of no tokens yet."""
        return InputPower(torch.zeros(in_features, dtype=torch.float64, device=device))

    def add(self, inputs: torch.Tensor) -> None:
        """Take in ``inputs [tokens, K]`` of any float dtype (padding already left out)."""
        self.squares += inputs.float().square().sum(0)
        self.tokens += inputs.shape[0]

    def scaled(self, factor: torch.Tensor) -> InputPower:
        """The power of ``x * factor`` (``factor [K]``)."""
        return InputPower(self.squares * factor.double().square(), self.tokens)
