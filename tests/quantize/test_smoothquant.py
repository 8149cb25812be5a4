import torch

from tests.quantize.data import inputs, statistics_of, weight
from vlmexport.quantize.smoothquant import smooth_scale


def test_half_and_half_makes_inputs_and_weights_equally_wide() -> None:
    weights, x = [weight(), weight(8, seed=3)], inputs()
    scale = smooth_scale(weights, statistics_of(x))
    assert scale is not None
    widest = torch.cat(weights).abs().amax(0) * scale
    torch.testing.assert_close(widest, (x / scale).abs().amax(0), rtol=1e-5, atol=0)


def test_alpha_is_the_share_that_moves_to_the_weights() -> None:
    w, x = weight(), inputs()
    scale = smooth_scale([w], statistics_of(x), alpha=1.0)
    assert scale is not None
    torch.testing.assert_close((x / scale).abs().amax(0), torch.ones(256), rtol=1e-5, atol=0)


def test_silent_features_and_unread_ones_stay() -> None:
    w, x = weight(), inputs()
    x[:, 3] = 0
    w[:, 9] = 0
    scale = smooth_scale([w], statistics_of(x))
    assert scale is not None
    assert scale[[3, 9]].tolist() == [1.0, 1.0]
    assert smooth_scale([w], statistics_of(torch.zeros(4, 256))) is None
