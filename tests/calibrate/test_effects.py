"""What each candidate is estimated to do, against what it does when it is measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from vlmexport.calibrate.effects import UnitEffect, stored, unit_effects
from vlmexport.calibrate.judge import Judge
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.sensitivity import decoder_part, held_out_batches, quantizable
from vlmexport.model.load import load_vlm
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.capture import split_model
from vlmexport.split.names import weight_names

BASE, COARSE, WIDE = make_scheme("rtn", 4, 32), make_scheme("rtn", 4, 128), make_scheme("rtn", 8, 32)


@dataclass
class Measured:
    judge: Judge
    weights: DecoderWeights
    names: list[str]
    effects: list[UnitEffect]

    def alone(self, names: tuple[str, ...], scheme: QuantScheme) -> float:
        weights = DecoderWeights(self.weights.tensors, dict.fromkeys(names, scheme))
        return self.judge.divergence({name: stored(weights, name) for name in names}).kl


@pytest.fixture(scope="module")
def demo() -> Iterator[Measured]:
    vlm = load_vlm("demo")
    split = split_model(vlm)
    names = quantizable(vlm, split, BASE)
    batches, _ = held_out_batches(vlm, CalibrationOptions(), 0, 16)
    judge = Judge(vlm.model, decoder_part(split), batches)
    weights = DecoderWeights(weight_names(vlm.model, decoder_part(split)), dict.fromkeys(names, BASE))
    schemes = [dict.fromkeys(names, scheme) for scheme in (BASE, COARSE, WIDE)]
    with judge.ready():
        yield Measured(judge, weights, names, unit_effects(judge, weights, [*schemes, {}], names, SilentProgress()))


def test_units_read_one_input_and_hold_every_weight_once(demo: Measured) -> None:
    kinds = [tuple(n.split(".layers.")[-1][2:].removesuffix(".weight") for n in e.names) for e in demo.effects[:4]]
    attention = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert kinds == [attention, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
    assert [name for effect in demo.effects for name in effect.names] == sorted(demo.names, key=demo.names.index)
    assert demo.effects[-1].names == ("lm_head.weight",)


def test_the_measured_one_is_that_of_the_whole_unit(demo: Measured) -> None:
    for effect in demo.effects[::5]:
        assert effect.under(0) == effect.kl
        assert effect.kl == pytest.approx(demo.alone(effect.names, BASE), rel=1e-3)
        assert effect.under(3) == 0.0


def test_estimates_of_the_others_are_near_the_truth(demo: Measured) -> None:
    for effect in demo.effects:
        assert effect.ratios[1] > 1 > effect.ratios[2] > 0
    for effect in (demo.effects[0], demo.effects[3], demo.effects[-1]):
        assert effect.under(1) == pytest.approx(demo.alone(effect.names, COARSE), rel=0.5)
        assert effect.under(2) < 0.03 * effect.kl
        assert demo.alone(effect.names, WIDE) < 0.03 * effect.kl


def test_only_what_is_asked_for_is_measured(demo: Measured) -> None:
    one = next(n for n in demo.names if "k_proj" in n)
    found = unit_effects(demo.judge, demo.weights, [{one: BASE}], [one], SilentProgress())
    assert [effect.names for effect in found] == [(one,)]
