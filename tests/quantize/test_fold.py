import torch

from tests.quantize.data import weight
from vlmexport.quantize.fold import Fold, folds_from_tensors, folds_to_tensors


def factors(count: int, seed: int) -> torch.Tensor:
    return torch.exp2(torch.randint(-3, 4, (count,), generator=torch.Generator().manual_seed(seed)).float())


def test_rows_and_columns_multiply_outputs_and_inputs() -> None:
    w, rows, columns = weight(8, 16), factors(8, 0), factors(16, 1)
    assert torch.equal(Fold(rows, columns).apply(w), torch.diag(rows) @ w @ torch.diag(columns))


def test_a_norm_that_multiplies_by_one_plus_its_weight() -> None:
    w, rows = weight(1, 16)[0], factors(16, 0)
    torch.testing.assert_close(1 + Fold(rows, offset=1.0).apply(w), (1 + w) * rows)


def test_folding_between_two_linears_keeps_their_product() -> None:
    first, second, s = weight(16, 8), weight(4, 16, seed=1), factors(16, 2)
    made = Fold(columns=s).apply(second) @ Fold(rows=1 / s).apply(first)
    torch.testing.assert_close(made, second @ first)


def test_then_is_one_after_the_other() -> None:
    w = weight(8, 16)
    one, two = Fold(factors(8, 0), factors(16, 1)), Fold(factors(8, 2))
    assert torch.equal(one.then(two).apply(w), two.apply(one.apply(w)))
    assert torch.equal(two.then(one).apply(w), one.apply(two.apply(w)))
    assert torch.equal(Fold().then(Fold()).apply(w), w)


def test_experts_have_factors_of_their_own() -> None:
    packed = torch.stack([weight(8, 16), weight(8, 16, seed=1)])
    rows, columns = torch.stack([factors(8, 0), factors(8, 1)]), torch.stack([factors(16, 2), factors(16, 3)])
    for expert in range(2):
        alone = Fold(rows[expert], columns[expert]).apply(packed[expert])
        assert torch.equal(Fold(rows, columns).apply(packed)[expert], alone)


def test_folds_survive_being_stored() -> None:
    folds = {
        "norm.weight": Fold(rows=torch.tensor([2.0, 0.5]), offset=1.0),
        "layers.0.up.weight": Fold(rows=torch.rand(3), columns=torch.rand(4)),
    }
    weight = torch.randn(3, 4)
    found = folds_from_tensors(folds_to_tensors(folds))
    assert list(found) == list(folds)
    assert found["norm.weight"].columns is None and found["norm.weight"].offset == 1
    assert torch.equal(found["layers.0.up.weight"].apply(weight), folds["layers.0.up.weight"].apply(weight))
