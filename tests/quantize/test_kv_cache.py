import pytest
import torch

from vlmexport.errors import BadInputError
from vlmexport.lower.onnx.rotary import rotate
from vlmexport.quantize.kv_cache import MARGIN, CachePeaks, LayerPeaks, scales_digest

HEADS, TOKENS, DIM = 2, 50, 16


def states(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(HEADS, TOKENS, DIM, generator=generator) for _ in range(2))
    return key, value


@pytest.mark.parametrize("interleaved", [False, True])
def test_key_scales_hold_at_every_position(interleaved: bool) -> None:
    """Rotation by any angle stays in range, although the samples were seen at one angle only."""
    key, value = states()
    scale = LayerPeaks.of(key, value).key_scale(interleaved)
    angles = torch.arange(5000)[:, None] * (10000.0 ** (-torch.arange(0, DIM, 2) / DIM))
    turned = torch.cat(
        [
            rotate(key[None], angles.cos(), angles.sin(), torch.full((1, TOKENS), position), interleaved)
            for position in range(0, 5000, 37)
        ],
        dim=2,
    )
    assert scale.shape == (1, HEADS, 1, DIM) and scale.dtype == torch.float32
    assert float((turned / scale).abs().max()) <= 127
    assert float((turned / scale).abs().max()) > 127 / MARGIN * 0.98  # and no step is wasted on it


def test_the_wrong_pairs_would_not_hold() -> None:
    key = torch.zeros(1, 1, 4)
    key[..., 0], key[..., 2] = 3.0, 4.0
    peaks = LayerPeaks.of(key, key)
    half, interleaved = peaks.key_scale(False)[0, 0, 0], peaks.key_scale(True)[0, 0, 0]
    assert torch.allclose(half[[0, 2]] * 127 / MARGIN, torch.tensor([5.0, 5.0]))
    assert torch.allclose(interleaved * 127 / MARGIN, torch.tensor([3.0, 3.0, 4.0, 4.0]))


def test_value_scales_are_the_largest_value_and_follow_a_fold() -> None:
    key, value = states()
    peaks = LayerPeaks.of(key, value)
    wanted = value.abs().amax(1)[None, :, None] * MARGIN / 127
    assert torch.allclose(peaks.value_scale(), wanted)
    rows = torch.linspace(0.1, 2.0, HEADS * DIM) * torch.tensor([1.0, -1.0]).repeat(HEADS * DIM // 2)
    folded = LayerPeaks.of(key, value * rows.reshape(HEADS, 1, DIM))
    assert torch.allclose(peaks.value_scale(rows), folded.value_scale())


def test_samples_join_to_the_largest_of_each() -> None:
    (key, value), (other_key, other_value) = states(1), states(2)
    both = LayerPeaks.of(torch.cat([key, other_key], 1), torch.cat([value, other_value], 1))
    joined = CachePeaks.over([[LayerPeaks.of(key, value)], [LayerPeaks.of(other_key, other_value)]])
    assert torch.equal(joined.layers[0].half, both.half)
    assert torch.equal(joined.layers[0].interleaved, both.interleaved)
    assert torch.equal(joined.layers[0].value, both.value)


def test_silent_channels_and_heads_keep_a_positive_scale() -> None:
    key, value = states()
    value[0] = 0
    value[1, :, 3] = 0
    scale = LayerPeaks.of(key, value).value_scale()
    assert bool((scale > 0).all())
    assert float(scale[0, 0].unique()) == 1.0
    assert float(scale[0, 1, 0, 3]) < 1e-3 * float(scale[0, 1].max())


def test_no_samples_and_nan_are_refused() -> None:
    with pytest.raises(BadInputError, match="at least one calibration sample"):
        CachePeaks.over([])
    key, value = states()
    good = LayerPeaks.of(key, value)
    value[0, 3, 3] = torch.nan
    with pytest.raises(BadInputError, match="layer 1: keys or values of a calibration sample are NaN"):
        CachePeaks.over([[good, LayerPeaks.of(key, value)]])


def test_the_digest_sees_order_and_value() -> None:
    one, other = torch.ones(3), torch.arange(3.0)
    assert scales_digest([one, other]) == scales_digest([one.double(), other])
    assert scales_digest([one, other]) != scales_digest([other, one])
    assert scales_digest([one]) != scales_digest([one * (1 + 1e-6)])
