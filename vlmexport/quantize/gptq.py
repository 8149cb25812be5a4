"""GPTQ: round column after column, each making up for the output errors of those before it (arXiv 2210.17323).

The paper's inverse Hessian is not needed. With ``H = R R^T``, R upper triangular in the order of rounding, the error of
a row is ``|R^T (w - q)|^2``, and its term for column i depends on the columns up to i only. The code that makes that
term smallest is the one nearest to ``w_i + sum_{j<i} R_ji (w_j - q_j) / R_ii``: the paper's update (the equivalence
with Babai's nearest plane is arXiv 2507.18553) from one Cholesky factorisation instead of two and an inverse.

The moment is shrunk towards its diagonal first, by what the number of tokens says is chance (`_shrink`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vlmexport.quantize.grid import Grid, positive
from vlmexport.quantize.statistics import InputStatistics

BLOCK = 128
DAMPINGS = (0.01, 0.1, 1.0)
# With one token to 16 features there is still something to gain (benchmarks/synthetic_layers.py --tokens); tokens of a
# sample resemble each other, so fewer are not trusted.
FEATURES_PER_TOKEN = 16
_ROWS = 256
# Adding 1.5 * 2**23 leaves a float32 no bits for a fraction: what `round` does (ties to even), which for a column as
# short as a weight's wakes a second thread at thirty times the cost. Larger values are clamped anyway.
_TO_INTEGER = 12582912.0
# All of it would leave nothing to tell the output error by.
_MOST_SHRINKAGE = 0.95


@dataclass(frozen=True)
class Factor:
    """A factorised second moment: made once for all weights that read the same input.

    `order`: int64 ``[K]``, the input features from the last to be rounded to the first (ascending power: "act-order");
    `lower`: float32 ``[K, K]`` in that order, the Cholesky factor with every column divided by its diagonal; only what
    is below the diagonal means anything. `power`: float32 ``[K]``, that diagonal squared, in units of the mean power of
    a live feature, `unit`; `diagonal`: float32 ``[K]``, the moment's own, in that unit. `shrinkage`: the share that was
    taken from what is off the diagonal; `damping`: the share of `unit` that was added to the diagonal. `dead`: features
    without power; nothing ties them to the others, so they are rounded to nearest (the paper sets them to 0, which an
    input that the samples did not have would pay for).
    """

    order: torch.Tensor
    lower: torch.Tensor
    power: torch.Tensor
    diagonal: torch.Tensor
    unit: float
    shrinkage: float
    damping: float
    dead: int


def factorize(statistics: InputStatistics) -> Factor | str:
    """Factorise ``moment [K, K]``, with more damping while it is singular; or the reason why it cannot be done."""
    features = statistics.moment.shape[0]
    if statistics.tokens * FEATURES_PER_TOKEN < features:
        return f"{statistics.tokens} calibration tokens are too few for {features} input features"
    diagonal = statistics.moment.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        return "the inputs' second moment is not finite"
    live = diagonal > 0
    unit = float(diagonal[live].mean()) if bool(live.any()) else 1.0
    order = torch.argsort(diagonal, stable=True)
    for damping in DAMPINGS:
        ordered = statistics.moment[order[:, None], order].div_(unit)
        shrinkage = _shrink(ordered, statistics.tokens)
        own = ordered.diagonal().clone()
        ordered.diagonal().add_(damping)
        # In place: with 8192 features every copy of the moment takes 0.27 GB.
        failed = torch.empty((), dtype=torch.int32, device=ordered.device)
        lower, _ = torch.linalg.cholesky_ex(ordered, out=(ordered, failed))
        if not int(failed) and bool(torch.isfinite(lower.diagonal()).all()):
            root = lower.diagonal().clone()
            dead = features - int(live.sum())
            return Factor(order, lower.div_(root), root.square(), own, unit, shrinkage, damping, dead)
    return f"the inputs' second moment cannot be factorised, not even with damping {DAMPINGS[-1]}"


def _shrink(moment: torch.Tensor, tokens: int) -> float:
    """Take the chance part out of what is off the diagonal of ``moment [K, K]``, in place; returns the share taken.

    Without it, errors are pushed into directions that only the calibration tokens leave empty: with as many tokens as
    features the weight then does worse on other tokens than plain rounding. The share is the oracle-approximating one
    (OAS: Chen, Wiesel, Eldar, Hero 2010), of the moment with every feature at unit power.
    """
    diagonal = moment.diagonal().clone()
    inverse = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).rsqrt()
    squares = sum(
        float((moment[start : start + _ROWS] * inverse).mul_(inverse[start : start + _ROWS, None]).square_().sum())
        for start in range(0, moment.shape[0], _ROWS)
    )
    features = int((diagonal > 0).sum())
    shared = squares - features
    wanted = squares * (1 - 2 / max(features, 2)) + features**2
    spread = (tokens + 1 - 2 / max(features, 2)) * shared
    share = min(wanted / spread, _MOST_SHRINKAGE) if spread > 0 else _MOST_SHRINKAGE
    moment.mul_(1 - share).diagonal().copy_(diagonal)
    return share


def round_gptq(weight: torch.Tensor, grid: Grid, factor: Factor) -> tuple[torch.Tensor, float]:
    """Codes, uint8 ``[N, K]``, of ``weight [N, K]`` on `grid`, and ``trace(E moment E^T)`` of their error E.

    Groups are static: the grid was fixed from the weight before, so that codes keep the columns' own order whatever
    the order of rounding is.
    """
    columns = weight.shape[1]
    original = weight.t()[factor.order].float()
    codes = torch.empty(original.shape, dtype=torch.uint8, device=weight.device)
    error = torch.empty_like(original)
    missed = torch.zeros(weight.shape[0], device=weight.device)
    levels = _Levels(grid, factor.order)
    for stop in range(columns, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        block = slice(start, stop)
        target = original[block].addmm(factor.lower[stop:, block].t(), error[stop:])
        lower = factor.lower[block, block].contiguous()
        missed += _round_block(original[block], target, lower, levels, factor.power, codes[block], error[block], start)
    squared = error.square().sum(1)
    added = factor.shrinkage * float(squared @ factor.diagonal) + factor.damping * float(squared.sum())
    total = (float(missed.sum()) - added) / (1 - factor.shrinkage)
    natural = torch.empty_like(codes)
    natural[factor.order] = codes
    return natural.t().contiguous(), max(total, 0.0) * factor.unit


class _Levels:
    """A grid's columns in the order of rounding: float32 rows of N scales and zero points."""

    def __init__(self, grid: Grid, order: torch.Tensor) -> None:
        self.top = (1 << grid.bits) - 1
        self.scale = grid.scale.float().t().contiguous()
        self.divisor = positive(self.scale)
        self.zero = grid.zero_point.float().t().contiguous()
        self.group = (order // grid.group_size).tolist()


def _round_block(
    original: torch.Tensor,
    target: torch.Tensor,
    lower: torch.Tensor,
    levels: _Levels,
    power: torch.Tensor,
    codes: torch.Tensor,
    error: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """Round the columns ``start ..`` of a block (rows here), the last first, filling `codes` and `error`.

    Returns the squared output error they leave, per output row.
    """
    width = original.shape[0]
    missed = torch.zeros(original.shape[1], device=original.device)
    for i in range(width - 1, -1, -1):
        group = levels.group[start + i]
        if i + 1 < width:
            target[i].addmv_(error[i + 1 :].t(), lower[i + 1 :, i])
        code = (target[i] / levels.divisor[group]).add_(_TO_INTEGER).sub_(_TO_INTEGER)
        code = code.add_(levels.zero[group]).clamp_(0, levels.top)
        codes[i] = code
        value = code.sub_(levels.zero[group]).mul_(levels.scale[group])
        torch.sub(original[i], value, out=error[i])
        missed.addcmul_(value.sub_(target[i]).square_(), power[start + i])
    return missed
