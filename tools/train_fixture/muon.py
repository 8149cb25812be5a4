"""Muon: momentum whose matrix updates are orthogonalized (Jordan et al. 2024), shared out over the processes."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

import torch
from torch import distributed

# Coefficients of the quintic Newton-Schulz iteration, from the paper.
QUINTIC: Final = (3.4445, -4.7750, 2.0315)


class Muon:
    """Nesterov momentum, orthogonalization in five steps, update scaled to the RMS of an AdamW step.

    Every process holds all momenta; it orthogonalizes one share of the matrices and the updates are summed.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], momentum: float = 0.95) -> None:
        self._matrices = matrices
        self._momentum = momentum
        self._buffers = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float, rank: int, ranks: int) -> None:
        """Apply one update with learning rate `rate`."""
        flat = torch.zeros(sum(matrix.numel() for matrix in self._matrices))
        views = [part.view_as(m) for part, m in zip(self._split(flat), self._matrices, strict=True)]
        groups: dict[torch.Size, list[int]] = defaultdict(list)
        for index, (matrix, buffer) in enumerate(zip(self._matrices, self._buffers, strict=True)):
            buffer.mul_(self._momentum).add_(matrix.grad)
            if index % ranks == rank:
                groups[matrix.shape].append(index)
        for shape, members in groups.items():
            stack = torch.stack([self._matrices[i].grad + self._momentum * self._buffers[i] for i in members])
            for index, update in zip(members, orthogonalize(stack), strict=True):
                views[index].copy_(update).mul_(0.2 * max(shape) ** 0.5)
        if ranks > 1:
            distributed.all_reduce(flat)
        for matrix, update in zip(self._matrices, views, strict=True):
            matrix.add_(update, alpha=-rate)

    def _split(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return flat.split([matrix.numel() for matrix in self._matrices])


def orthogonalize(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Return the nearest semi-orthogonal matrices, roughly, of a stack [N, rows, columns]."""
    a, b, c = QUINTIC
    wide = stack.mT if stack.shape[-2] > stack.shape[-1] else stack
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if stack.shape[-2] > stack.shape[-1] else x
