"""What `--quant auto` chooses among, and what each takes in the export."""

from __future__ import annotations

import pytest

from vlmexport.calibrate.candidates import find_candidates
from vlmexport.errors import BadInputError
from vlmexport.model.load import load_vlm
from vlmexport.plan import OnnxOptions, WeightPlan, plan_export, quantized_bytes
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.split.capture import split_model
from vlmexport.target import load_target


class Planning:
    """Plans of one model for a CPU."""

    def __init__(self, model: str) -> None:
        self.vlm = load_vlm(model)
        self.split = split_model(self.vlm)

    def __call__(self, scheme: QuantScheme, keep: tuple[str, ...]) -> tuple[WeightPlan, ...]:
        return plan_export(self.vlm, self.split, load_target("cpu"), OnnxOptions(scheme=scheme, keep=keep)).weights


@pytest.fixture(scope="module")
def demo() -> Planning:
    return Planning("demo")


def test_sizes_are_those_of_the_export(demo: Planning) -> None:
    found = find_candidates(demo, make_scheme("rtn", 4))
    labels = [candidate.label for candidate in found.every]
    groups = ["4 bits g16", "4 bits g64", "4 bits g128"]
    assert labels == ["4 bits g32", *groups, "8 bits g32", "8 bits g128", "unquantized"]
    for index, size in found.uniform().items():
        scheme = found.every[index].scheme
        assert scheme is not None
        assert size == sum(w.bytes_after for w in demo(scheme, ()))
    assert found.smallest == found.uniform()[labels.index("4 bits g128")]
    mixed = QuantScheme(overrides={found.names[0]: make_scheme("rtn", 8, 128)})
    kept = found.every[-1].sizes[found.names[1]] - found.every[0].sizes[found.names[1]]
    wide = found.every[-2].sizes[found.names[0]] - found.every[0].sizes[found.names[0]]
    after = sum(w.bytes_after for w in demo(mixed, (found.names[1],)))
    assert after == found.uniform()[0] + kept + wide


def test_groups_that_do_not_divide_are_no_candidates_for_a_weight() -> None:
    widths = {"narrow": 32, "wide": 256}

    def planner(scheme: QuantScheme, keep: tuple[str, ...]) -> tuple[WeightPlan, ...]:
        return tuple(plan_by_hand(n, k, None if n in keep else scheme.for_weight(n)) for n, k in widths.items())

    found = find_candidates(planner, make_scheme("rtn", 4, 32))
    able = {candidate.label: set(candidate.sizes) for candidate in found.every}
    assert able["4 bits g16"] == able["4 bits g32"] == able["8 bits g32"] == able["unquantized"] == set(widths)
    assert able["4 bits g64"] == able["4 bits g128"] == able["8 bits g128"] == {"wide"}
    assert set(found.uniform()) == {0, 1, [c.label for c in found.every].index("8 bits g32")}
    assert found.smallest == found.every[0].sizes["narrow"] + min(c.sizes["wide"] for c in found.every)


def plan_by_hand(name: str, width: int, scheme: QuantScheme | None) -> WeightPlan:
    shape = (8, width)
    after = 4 * 8 * width if scheme is None else quantized_bytes(shape, scheme, 4)
    return WeightPlan(name, "decoder", shape, "keep" if scheme is None else "quantize", "", "", scheme, 0, after)


def test_an_algorithm_offers_what_it_takes(demo: Planning) -> None:
    labels = [c.label for c in find_candidates(demo, make_scheme("nf4")).every]
    assert labels == ["4 bits g64", "4 bits g128", "unquantized"]


def test_nothing_to_quantize_is_refused(demo: Planning) -> None:
    def keeping(scheme: QuantScheme, keep: tuple[str, ...]) -> tuple[WeightPlan, ...]:
        return demo(scheme, (*keep, "*"))

    with pytest.raises(BadInputError, match="no weight of this model is to be quantized"):
        find_candidates(keeping, make_scheme("rtn", 4))
