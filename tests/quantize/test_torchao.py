"""The adapter's codes dequantize to torchao's own values, bit for bit."""

import importlib.util
import itertools

import pytest
import torch

from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.quantize.registry import ALGORITHMS, REFUSED
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.quantize.torchao import quantize_torchao, torchao_tensor
from vlmexport.quantize.weights import quantize_data_free

pytest.importorskip("torchao")

SCHEMES = [
    *(
        make_scheme("torchao:intx", bits=bits, group_size=group, symmetric=symmetric)
        for bits, group, symmetric in itertools.product((2, 3, 4, 8), (32, -1), (True, False))
    ),
    make_scheme("torchao:int4wo"),
    make_scheme("torchao:int4wo", group_size=128, symmetric=False),
    make_scheme("torchao:int8wo"),
    make_scheme("torchao:int8da-int8w"),
]


def weight(rows: int = 24, columns: int = 256) -> torch.Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    made[:, 3] *= 30
    made[2] = 0
    made[4] = made[4].abs()
    return made


def title(scheme: QuantScheme) -> str:
    return f"{scheme.algorithm}-{scheme.bits}-{scheme.group_size}-{'sym' if scheme.symmetric else 'asym'}"


@pytest.mark.parametrize("scheme", SCHEMES, ids=title)
def test_values_are_torchaos_own(scheme: QuantScheme) -> None:
    w = weight()
    q = quantize_torchao(w, scheme)
    theirs = torchao_tensor(w, scheme)
    assert torch.equal(q.dequantize(), theirs.dequantize())
    assert torch.equal(q.codes.int() - 2 ** (scheme.bits - 1), theirs.qdata.int())
    assert int(q.codes.max()) < 2**scheme.bits
    assert (q.zero_point is None) == scheme.symmetric


@pytest.mark.parametrize("name", [n for n in ALGORITHMS if n.startswith("torchao:")])
def test_every_registered_configuration_runs(name: str) -> None:
    q = quantize_data_free(weight(), make_scheme(name))
    assert q.shape == (24, 256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_as_float32(dtype: torch.dtype) -> None:
    half = weight().to(dtype)
    scheme = make_scheme("torchao:int4wo")
    assert quantize_torchao(half, scheme).digest() == quantize_torchao(half.float(), scheme).digest()


def test_the_weight_itself_is_left_alone() -> None:
    w = weight()
    quantize_torchao(w, make_scheme("torchao:int8wo"))
    assert torch.equal(w, weight())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    w = weight()
    w[3, 5] = bad
    with pytest.raises(BadInputError, match=r"layers\.0\.up\.weight: the weight holds NaN or infinity"):
        quantize_torchao(w, make_scheme("torchao:int4wo"), "layers.0.up.weight")


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(BadInputError, match="up: 80 input features are not a multiple of group size 32"):
        quantize_torchao(torch.ones(4, 80), make_scheme("torchao:int4wo"), "up")


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(NotPossibleHereError, match=r"needs torchao, .* run `pip install vlmexport\[torchao\]`"):
        quantize_torchao(weight(), make_scheme("torchao:int4wo"))


@pytest.mark.parametrize("name", REFUSED)
def test_other_configurations_are_refused_with_their_reason(name: str) -> None:
    with pytest.raises(BadInputError, match=f"{name} is refused: .*--quant"):
        make_scheme(name)


def test_an_unknown_configuration_lists_the_choices() -> None:
    with pytest.raises(BadInputError, match=r"'torchao:int5' is unknown; choose one of .*torchao:int4wo"):
        make_scheme("torchao:int5")


def test_what_is_refused_is_not_offered() -> None:
    assert not REFUSED.keys() & ALGORITHMS.keys()
