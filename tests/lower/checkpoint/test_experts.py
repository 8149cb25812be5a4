"""A stored tensor is found among packed experts by its numbers, and only where it is exactly once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.checkpoint.experts import ExpertFinder, Place, check_covered, find_rows


def packed_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    values = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    model.whatever = nn.Parameter(values, requires_grad=False)
    return model


def stored(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two tensors of four rows per expert, under names that say nothing."""
    weight = model.get_parameter("whatever")
    return {f"t{7 * e + half}": weight[e, 4 * half : 4 * half + 4].clone() for e in range(3) for half in range(2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_found_by_their_numbers(dtype: torch.dtype) -> None:
    model = packed_model(dtype)
    tensors = stored(model)
    found = find_rows(model, dict.fromkeys(tensors, "whatever"), tensors.items())
    expected = {f"t{7 * e + h}": Place("whatever", e, 4 * h, 4 * h + 4) for e in range(3) for h in range(2)}
    assert found == expected
    check_covered(model, ["whatever"], found.values())


def test_what_is_not_there_exactly_once_is_not_found() -> None:
    model = packed_model()
    finder, weight = ExpertFinder(model), model.get_parameter("whatever")
    assert finder.find("whatever", weight[1, 4:8]) == Place("whatever", 1, 4, 8)
    interleaved, transposed = weight[0, ::2], weight[0].t()
    for other in (weight[1, 2:6], interleaved, transposed, weight[1, 4:8] * 1.01, weight[0], weight[0, 0]):
        place = finder.find("whatever", other.contiguous())
        assert place is None or torch.equal(weight[place.expert, place.start : place.stop], other)
    assert finder.find("whatever", interleaved.contiguous()) is None
    assert finder.find("whatever", transposed.contiguous()) is None
    assert finder.find("nothing", weight[0]) is None
    weight[2, :4] = weight[0, :4]
    assert ExpertFinder(model).find("whatever", weight[0, :4]) is None


@pytest.mark.parametrize("change", ["missing", "twice", "nothing"])
def test_rows_that_are_not_all_there_once_are_refused(change: str) -> None:
    model = packed_model()
    tensors = stored(model)
    places = list(find_rows(model, dict.fromkeys(tensors, "whatever"), tensors.items()).values())
    broken = {"missing": places[1:], "twice": [*places, places[2]], "nothing": []}[change]
    with pytest.raises(UnsupportedModelError, match="the 3 experts of whatever are not in the model's files"):
        check_covered(model, ["whatever"], broken)
