"""What every algorithm of the registry must do, and how the calibrated ones share their work."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.quantize.data import inputs, statistics_of, weight
from vlmexport.errors import BadInputError
from vlmexport.quantize import calibrated
from vlmexport.quantize.calibrated import quantize_calibrated, quantize_group, search_scale
from vlmexport.quantize.registry import ALGORITHMS
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme, make_scheme

_FP16 = torch.finfo(torch.float16)
_STATISTICS = statistics_of(inputs())


def claimed() -> Iterator[QuantScheme]:
    """Every combination that an algorithm says it takes (imported ones bring their own codes)."""
    for method in ALGORITHMS.values():
        if method.imported or method.name.startswith("torchao"):
            continue
        symmetries = (True, False) if method.symmetric is None else (method.symmetric,)
        groups = (16, 32, 64, 128, 256, -1) if method.group_sizes is None else method.group_sizes
        clips = (False, True) if method.clips else (False,)
        for bits, symmetric, group, clip in itertools.product(method.bits, symmetries, groups, clips):
            yield QuantScheme(bits=bits, symmetric=symmetric, group_size=group, algorithm=method.name, clip=clip)


def label(scheme: QuantScheme) -> str:
    kind = "sym" if scheme.symmetric else "asym"
    return f"{scheme.algorithm}{'-clip' * scheme.clip}-{scheme.bits}-{kind}-g{scheme.group_size}"


@pytest.mark.parametrize("scheme", list(claimed()), ids=label)
def test_every_algorithm_takes_what_it_claims(scheme: QuantScheme) -> None:
    w = weight(8)
    w[3], w[:, 32:64] = 0, 0
    made, report = quantize_calibrated(w, _STATISTICS, scheme)
    group = 256 if scheme.group_size == -1 else scheme.group_size
    assert made.codes.dtype == torch.uint8
    assert made.codes.shape == w.shape
    assert int(made.codes.max()) < 2**scheme.bits
    assert made.scale.shape == (8, 256 // group)
    assert made.group_size == group
    assert (made.zero_point is None) == (scheme.symmetric or made.codebook is not None)
    if made.scale.dtype == torch.float16:
        stored = made.scale.float()
        assert ((stored == 0) | ((stored >= _FP16.tiny) & (stored <= _FP16.max))).all()
    dequantized = made.dequantize()
    assert not dequantized[3].any()
    assert report.fallback == ""
    assert 0 < report.error < 1


@pytest.mark.parametrize("name", [n for n, method in ALGORITHMS.items() if not method.imported])
def test_the_same_inputs_give_the_same_codes(name: str) -> None:
    one, two = (quantize_calibrated(weight(8), statistics_of(inputs()), make_scheme(name)) for _ in range(2))
    assert one[0].digest() == two[0].digest()
    assert one[1] == two[1]


_CALIBRATED = [name for name, method in ALGORITHMS.items() if method.calibrated and not method.imported]


@pytest.mark.parametrize("name", _CALIBRATED)
def test_calibrated_algorithms_beat_rounding_to_nearest(name: str) -> None:
    w, statistics, scheme = weight(), statistics_of(inputs()), make_scheme(name)
    plain = QuantScheme(bits=scheme.bits, symmetric=scheme.symmetric, group_size=scheme.group_size)
    _, baseline = quantize_calibrated(w, statistics, plain)
    scale = search_scale([w], statistics, [scheme])
    if scale is not None:
        w, statistics = w * scale, statistics.scaled(1 / scale)
    _, report = quantize_calibrated(w, statistics, scheme)
    # SmoothQuant's scales help the 8-bit inputs, and may cost the weights something.
    assert report.error < baseline.error * (2 if name == "smoothquant" else 0.9)


@pytest.mark.parametrize("name", [n for n, method in ALGORITHMS.items() if not method.imported])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(name: str, bad: float) -> None:
    w = weight(8)
    w[3, 5] = bad
    with pytest.raises(BadInputError, match=r"up\.weight: the weight holds NaN or infinity"):
        quantize_calibrated(w, statistics_of(inputs()), make_scheme(name), "up.weight")


@pytest.mark.parametrize("name", ["rtn", "hqq", "gptq", "awq", "awq+gptq"])
def test_a_group_size_that_does_not_divide_is_refused(name: str) -> None:
    with pytest.raises(BadInputError, match="k: 80 input features are not a multiple of group size 32"):
        quantize_calibrated(torch.ones(4, 80), statistics_of(inputs(100, 80)), make_scheme(name), "k")


def test_weights_that_share_an_input_are_rounded_as_if_alone_and_factorised_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, statistics = [weight(), weight(8, seed=1).bfloat16(), weight(seed=2)], statistics_of(inputs())
    schemes = [QuantScheme(algorithm="gptq"), QuantScheme(algorithm="awq+gptq", bits=8), QuantScheme()]
    alone = [quantize_calibrated(w, statistics, s) for w, s in zip(weights, schemes, strict=True)]
    calls = []
    factorize = calibrated.factorize
    monkeypatch.setattr(calibrated, "factorize", lambda s: calls.append(s) or factorize(s))
    together = quantize_group(weights, statistics, schemes, ["q", "k", "v"])
    assert len(calls) == 1
    assert [made.digest() for made, _ in together] == [made.digest() for made, _ in alone]
    assert [report for _, report in together] == [report for _, report in alone]


def test_only_algorithms_that_smooth_move_scales() -> None:
    w, statistics = weight(), statistics_of(inputs())
    for name in ("rtn", "gptq", "hqq"):
        assert search_scale([w], statistics, [make_scheme(name)]) is None
    for name in ("awq", "awq+gptq", "smoothquant"):
        assert search_scale([w], statistics, [make_scheme(name)]) is not None


def test_the_error_of_a_data_free_algorithm_is_reported_too() -> None:
    w, statistics, scheme = weight(), statistics_of(inputs()), QuantScheme()
    made, report = quantize_calibrated(w, statistics, scheme)
    assert made.digest() == quantize_rtn(w, scheme).digest()
    x, difference = inputs(), made.dequantize() - w
    expected = (x @ difference.t()).square().sum() / (x @ w.t()).square().sum()
    assert report.error == pytest.approx(float(expected), rel=1e-4)
