"""`DecoderWeights`: whole matrices and packed experts, folded or not, from given codes or made when asked for."""

from __future__ import annotations

import pytest
import torch

from vlmexport.quantize.fold import Fold
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.quantize.weights import DecoderWeights, quantize_data_free

Tensors = dict[str, torch.Tensor]
SCHEMES = [make_scheme("rtn"), make_scheme("hqq"), make_scheme("nf4"), make_scheme("fp8")]


@pytest.fixture
def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {"experts": torch.randn(3, 8, 64, generator=generator), "dense": torch.randn(8, 64, generator=generator)}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.algorithm)
def test_every_expert_is_a_matrix_of_its_own(scheme: QuantScheme, tensors: Tensors) -> None:
    weights = DecoderWeights(tensors, {"experts": scheme, "dense": scheme})
    assert weights.matrices("experts") == ["experts.0", "experts.1", "experts.2"]
    assert weights.matrices("dense") == ["dense"]
    for expert, name in enumerate(weights.matrices("experts")):
        expected = quantize_data_free(tensors["experts"][expert], scheme)
        assert weights.quantized(name).digest() == expected.digest()


@pytest.mark.parametrize("columns", [(64,), (3, 64)])
def test_an_experts_fold_is_its_share_of_the_parameters(columns: tuple[int, ...], tensors: Tensors) -> None:
    fold = Fold(rows=torch.rand(3, 8) + 0.5, columns=torch.rand(columns) + 0.5)
    weights = DecoderWeights(tensors, {"experts": make_scheme("rtn")}, folds={"experts": fold})
    whole = fold.apply(tensors["experts"])
    for expert in range(3):
        assert torch.equal(weights.tensor(f"experts.{expert}"), whole[expert])
        expected = quantize_rtn(whole[expert], make_scheme("rtn"))
        assert weights.quantized(f"experts.{expert}").digest() == expected.digest()


def test_folded_floats_are_those_without_a_scheme(tensors: Tensors) -> None:
    fold = Fold(columns=torch.full((64,), 2.0))
    folds = {"experts": fold, "dense": fold}
    assert DecoderWeights(tensors, {"experts": make_scheme("rtn")}, folds=folds).folded().keys() == {"dense"}
    assert DecoderWeights(tensors, {"dense": make_scheme("rtn")}, folds=folds).folded().keys() == {"experts"}


def test_given_codes_come_first(tensors: Tensors) -> None:
    given = quantize_rtn(torch.ones(8, 64), make_scheme("rtn"))
    weights = DecoderWeights(tensors, {"experts": make_scheme("gptq")}, {"experts.1": given})
    assert weights.quantized("experts.1") is given
    with pytest.raises(ValueError, match=r"experts\.2: codes of gptq come from calibration"):
        weights.quantized("experts.2")


@pytest.mark.parametrize("name", ["experts", "experts.3", "experts.-1", "experts.x", "dense.0", "nothing"])
def test_what_is_no_matrix_is_no_name(name: str, tensors: Tensors) -> None:
    with pytest.raises(KeyError):
        DecoderWeights(tensors, {"experts": make_scheme("rtn"), "dense": make_scheme("rtn")}).quantized(name)
