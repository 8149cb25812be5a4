import torch

from tests.quantize.data import inputs, statistics_of, weight
from vlmexport.quantize.awq import output_error
from vlmexport.quantize.clip import clipped_grid
from vlmexport.quantize.grid import Grid
from vlmexport.quantize.rtn import rtn_grid
from vlmexport.quantize.scheme import QuantScheme


def error(w: torch.Tensor, grid: Grid, moment: torch.Tensor) -> float:
    return output_error(grid.nearest(w).dequantize() - w, moment)


def test_a_group_by_itself_never_gets_worse() -> None:
    for scheme in (QuantScheme(bits=3, group_size=32), QuantScheme(bits=4, symmetric=False, group_size=64)):
        w, statistics = weight(), statistics_of(inputs())
        apart = torch.zeros_like(statistics.moment)
        for start in range(0, 256, scheme.group_size):
            block = slice(start, start + scheme.group_size)
            apart[block, block] = statistics.moment[block, block]
        clipped, whole = clipped_grid(w, statistics, scheme), rtn_grid(w, scheme)
        for row in range(w.shape[0]):
            parts = [Grid(g.scale[row : row + 1], g.zero_point[row : row + 1], g.bits, g.group_size, g.symmetric)
                     for g in (clipped, whole)]  # fmt: skip
            assert error(w[row : row + 1], parts[0], apart) <= error(w[row : row + 1], parts[1], apart) * (1 + 1e-5)
        assert error(w, clipped, apart) < 0.95 * error(w, whole, apart)


def test_a_lone_large_weight_on_a_silent_feature_is_clipped() -> None:
    w = weight(4, 32)
    w[:, 7] = 20.0
    x = inputs(256, 32)
    x[:, 7] = 0
    scheme = QuantScheme(bits=8)
    clipped = clipped_grid(w, statistics_of(x), scheme)
    assert (clipped.scale.float() < 0.65 * rtn_grid(w, scheme).scale.float()).all()


def test_one_group_per_row_is_judged_by_the_diagonal() -> None:
    w, statistics = weight(8, 512), statistics_of(inputs(512, 512))
    scheme = QuantScheme(bits=3, group_size=-1)
    alone = torch.diag(statistics.moment.diagonal())
    assert error(w, clipped_grid(w, statistics, scheme), alone) < error(w, rtn_grid(w, scheme), alone)


def test_zeros_stay_zero_and_scales_stay_storable() -> None:
    w = weight()
    w[3] = 0
    w[:, 32:64] = 0
    for scheme in (QuantScheme(), QuantScheme(symmetric=False)):
        q = clipped_grid(w, statistics_of(inputs()), scheme).nearest(w)
        assert q.scale.dtype == torch.float16
        assert not q.dequantize()[3].any()
        assert not q.dequantize()[:, 32:64].any()


def test_a_scale_that_float16_cannot_hold_keeps_the_whole_range() -> None:
    w = weight(4, 32) * 1e-4
    scheme = QuantScheme(bits=4, symmetric=False)
    tiny = torch.finfo(torch.float16).tiny
    w *= tiny * 1.01 / float(rtn_grid(w, scheme).scale.float().min())
    grid = clipped_grid(w, statistics_of(inputs(256, 32)), scheme)
    assert grid.scale.dtype == rtn_grid(w, scheme).scale.dtype == torch.float16
    assert (grid.scale >= tiny).all()
