"""Packed experts and routers are found by what the decoder does with them, whatever they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.calibrate.decoders import VARIANTS, make_decoder, part_of
from vlmexport.manifest import TensorSpec
from vlmexport.split.experts import Experts, find_experts
from vlmexport.split.parts import Part, Role, Signature

TOKENS = ("batch_size", "sequence_length")
SIGNATURE = Signature(
    (
        TensorSpec("inputs_embeds", "float32", (*TOKENS, 64)),
        TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
        TensorSpec("position_ids", "int64", (3, *TOKENS)),
        TensorSpec("deepstack_embeds", "float32", (2, *TOKENS, 64)),
    ),
    (),
)
LAYER = "model.language_model.layers.{}.mlp."


def decoder_part(model: Any) -> Part:
    embeds = torch.randn(1, 12, 64, generator=torch.Generator().manual_seed(0))
    example = {"inputs_embeds": embeds, "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    return Part(Role.DECODER, part_of(model), "", Signature(SIGNATURE.inputs[:2], ()), (example,))


def test_every_input_is_cut_to_the_same_first_tokens_on_its_own_axis() -> None:
    numbers = torch.arange(12.0)[None, :, None]
    example = {
        "inputs_embeds": numbers.repeat(1, 1, 64),
        "attention_mask": torch.arange(12)[None],
        "position_ids": torch.arange(12).repeat(3, 1, 1),
        "deepstack_embeds": numbers.repeat(2, 1, 1, 64),
    }
    given: dict[str, torch.Tensor] = {}
    model = make_decoder("experts")
    decoder = part_of(model)
    decoder.forward = given.update  # type: ignore[method-assign]
    find_experts(model, Part(Role.DECODER, decoder, "", SIGNATURE, (example,)))
    wanted = {"inputs_embeds": (1, 8, 64), "attention_mask": (1, 8), "position_ids": (3, 1, 8),
              "deepstack_embeds": (2, 1, 8, 64)}  # fmt: skip
    assert {name: tuple(tensor.shape) for name, tensor in given.items()} == wanted
    assert all(float(tensor.max()) == 7 for tensor in given.values())


@pytest.mark.parametrize("variant", ["experts", "router_and_experts"])
def test_experts_and_routers_are_found(variant: str) -> None:
    model = make_decoder(variant)
    found = find_experts(model, decoder_part(model))
    layers = [LAYER.format(i) for i in range(2)]
    assert found.packed == {f"{layer}experts.{name}" for layer in layers for name in ("gate_up_proj", "down_proj")}
    assert found.routers == {f"{layer}gate.weight" for layer in layers}
    assert not found.other


def test_a_dense_decoder_has_none() -> None:
    model = make_decoder("grouped")
    assert find_experts(model, decoder_part(model)) == Experts()


def test_names_do_not_matter() -> None:
    model = make_decoder("experts")
    for layer in model.get_decoder().layers:
        layer.mlp.vision_tower = layer.mlp.__dict__["_modules"].pop("gate")
        layer.mlp.forward = _renamed(layer.mlp)
    found = find_experts(model, decoder_part(model))
    assert found.routers == {f"{LAYER.format(i)}vision_tower.weight" for i in range(2)}
    assert len(found.packed) == 4


def _renamed(block: Any) -> Any:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = block.vision_tower(rows)
        out: torch.Tensor = block.experts(rows, index, weights)
        return out.reshape(hidden.shape)

    return forward


def test_experts_that_are_not_slices_of_linear_products_are_told_apart() -> None:
    model = make_decoder("experts")
    for layer in model.get_decoder().layers:
        layer.mlp.experts.forward = _batched(layer.mlp.experts)
    found = find_experts(model, decoder_part(model))
    assert not found.packed
    assert len(found.other) == 4


def _batched(experts: Any) -> Any:
    def forward(hidden: torch.Tensor, _index: torch.Tensor, _weights: torch.Tensor) -> torch.Tensor:
        gate, up = torch.einsum("th,enh->ten", hidden, experts.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("ten,ehn->th", experts.act_fn(gate) * up, experts.down_proj)

    return forward


def test_the_gate_of_a_shared_expert_is_a_router_and_its_linears_are_not() -> None:
    model = make_decoder("shared_expert")
    found = find_experts(model, decoder_part(model))
    block = LAYER.format(0)
    assert {n for n in found.routers if n.startswith(block)} == {
        f"{block}gate.weight",
        f"{block}shared_expert_gate.weight",
    }
    assert len(found.packed) == 4


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = {**VARIANTS["shared_expert"], "shared_expert_intermediate_size": 4}
    monkeypatch.setitem(VARIANTS, "shared_expert", narrow)
    model = make_decoder("shared_expert")
    found = find_experts(model, decoder_part(model))
    names = {"gate.weight", "shared_expert_gate.weight"}
    assert found.routers == {LAYER.format(i) + name for i in range(2) for name in names}
