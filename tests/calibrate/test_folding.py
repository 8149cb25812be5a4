"""Scales move only where the layer's function stays, whatever the decoder's form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.calibrate.decoders import make_batches, make_decoder
from vlmexport.calibrate.folding import FOLD_LIMIT, FoldPlan, FoldSite, find_folds, move_scales
from vlmexport.calibrate.replay import LayerReplay, relative_difference
from vlmexport.calibrate.working import working
from vlmexport.split.experts import eager_experts

ATTENTION = "input_layernorm -> self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"
MLP = "post_attention_layernorm -> mlp.gate_proj, mlp.up_proj"
DOWN = "mlp.up_proj -> mlp.down_proj"
OUTPUT = "self_attn.v_proj -> self_attn.o_proj"
EXPERTS = (
    "post_attention_layernorm -> mlp.gate, mlp.experts.gate_up_proj",
    "mlp.experts.gate_up_proj -> mlp.experts.down_proj",
)
EXPECTED = {
    "grouped": {ATTENTION, MLP, DOWN},
    "ungrouped": {ATTENTION, MLP, DOWN, OUTPUT},
    "biased": {ATTENTION, MLP, DOWN, OUTPUT},
    "offset_norms": {ATTENTION, MLP, DOWN},
    "many_norms": {ATTENTION, "pre_feedforward_layernorm -> mlp.gate_proj, mlp.up_proj", DOWN},
    "head_norms": {ATTENTION, MLP, DOWN},
    "fused": {
        "input_layernorm -> self_attn.qkv_proj",
        "post_attention_layernorm -> mlp.gate_up_proj",
        "self_attn.qkv_proj -> self_attn.o_proj",
        "mlp.gate_up_proj -> mlp.down_proj",
    },
    "experts": {ATTENTION, *EXPERTS},
    "router_and_experts": {ATTENTION, *EXPERTS},
    "parallel": {f"{ATTENTION}, mlp.gate_proj, mlp.up_proj", DOWN},
}


def plan_of(model: Any) -> FoldPlan:
    batch = make_batches(1)[0]
    replay = LayerReplay(model.get_decoder(), "tiny")
    with eager_experts(model.get_decoder()), working(replay.layers[0]) as work:
        unchanged = replay.run(0, batch, None)

        def run() -> torch.Tensor:
            return replay.run(0, batch, None)

        return find_folds(work, run, lambda: relative_difference(run(), unchanged, batch.valid))


@pytest.mark.parametrize("variant", EXPECTED)
def test_exactly_the_sites_that_hold_are_found(variant: str) -> None:
    plan = plan_of(make_decoder(variant))
    assert {site.label for site in plan.sites} == EXPECTED[variant]
    grouped = "self_attn.o_proj" in plan.refused
    assert grouped == (variant not in ("ungrouped", "biased", "fused"))


def test_offsets_slices_and_biases_are_part_of_a_site() -> None:
    offsets = {site.maker: site.offset for site in plan_of(make_decoder("offset_norms")).sites}
    assert (offsets["input_layernorm.weight"], offsets["mlp.up_proj.weight"]) == (1.0, 0.0)
    fused = {site.maker: (site.start, site.stop) for site in plan_of(make_decoder("fused")).sites}
    assert fused["self_attn.qkv_proj.weight"] == (128, 192)
    assert fused["mlp.gate_up_proj.weight"] == (96, 192)
    biased = {site.maker: site.vectors for site in plan_of(make_decoder("biased")).sites}
    assert biased["mlp.up_proj.weight"] == ("mlp.up_proj.weight", "mlp.up_proj.bias")


def test_a_reader_that_is_no_linear_layer_stops_the_fold() -> None:
    model = make_decoder("grouped")
    mlp = model.get_decoder().layers[0].mlp
    forward, hidden = mlp.forward, torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    mlp.forward = lambda x: forward(x) + x @ hidden
    plan = plan_of(model)
    assert {site.label for site in plan.sites} == {ATTENTION, DOWN}
    assert "something besides these linear layers" in plan.refused[MLP]


def test_a_linear_layer_that_saw_no_token_stops_the_fold() -> None:
    model = make_decoder("grouped")
    model.get_decoder().layers[0].mlp.spare = torch.nn.Linear(64, 8)
    plan = plan_of(model)
    assert {site.label for site in plan.sites} == {DOWN}
    assert "mlp.spare saw no token" in plan.refused[MLP]


def test_a_nonlinearity_that_scales_along_carries_a_fold() -> None:
    """ReLU lets positive factors through, so gate and up may both make down's input."""
    model = make_decoder("grouped")
    model.get_decoder().layers[0].mlp.act_fn = torch.nn.ReLU()
    assert {site.label for site in plan_of(model).sites} >= {ATTENTION, MLP, DOWN}


@pytest.mark.parametrize("maker", ["mlp.up_proj.weight", "mlp.gate_proj.weight"])
def test_a_move_that_changes_the_output_is_taken_back(maker: str) -> None:
    model, batch = make_decoder("grouped"), make_batches(1)[0]
    replay = LayerReplay(model.get_decoder(), "tiny")
    scale = torch.rand(96, generator=torch.Generator().manual_seed(0)) + 0.5
    with working(replay.layers[0]) as work:
        unchanged = replay.run(0, batch, None)
        site = FoldSite(maker, (maker,), 0, 96, ("mlp.down_proj.weight",))
        refusal = move_scales(
            work, site, scale, lambda: relative_difference(replay.run(0, batch, None), unchanged, batch.valid)
        )
        after = replay.run(0, batch, None)
        if maker == "mlp.up_proj.weight":
            assert refusal == ""
            assert set(work.folds) == {maker, "mlp.down_proj.weight"}
            assert relative_difference(after, unchanged, batch.valid) <= FOLD_LIMIT
        else:
            assert "changes the layer's output by" in refusal
            assert not work.folds
            assert torch.equal(after, unchanged)
