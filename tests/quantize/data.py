"""Small weights and inputs with structure: correlated features, some louder than others."""

import torch

from vlmexport.quantize.statistics import InputStatistics


def weight(rows: int = 24, columns: int = 256, seed: int = 0) -> torch.Tensor:
    """Gaussian ``[rows, columns]``."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 512, columns: int = 256, seed: int = 1) -> torch.Tensor:
    """Tokens ``[tokens, columns]`` that share a few directions, one feature in 32 eight times as loud."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    x = shared + torch.randn(tokens, columns, generator=generator)
    x[:, ::32] *= 8
    return x


def statistics_of(x: torch.Tensor) -> InputStatistics:
    """The statistics of ``x [tokens, K]``."""
    statistics = InputStatistics.empty(x.shape[1])
    statistics.add(x)
    return statistics
