"""What packed experts compute is shown by value: every form gives its module's numbers, anything else is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.aria.configuration_aria import AriaTextConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from tests.calibrate.decoders import make_decoder
from vlmexport.errors import UnsupportedModelError
from vlmexport.split.expert_forms import (
    ExpertForm,
    expert_shapes,
    find_expert_forms,
    transposed_parameters,
    with_packed_experts,
)


def filled(module: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return module


def aria() -> Any:
    config = AriaTextConfig(hidden_size=32, intermediate_size=48, moe_num_experts=5, moe_topk=2)
    config._experts_implementation = "eager"
    return filled(AriaExperts(config))


def llama4() -> Any:
    return filled(Llama4TextExperts(Llama4TextConfig(hidden_size=32, intermediate_size=48, num_local_experts=5)))


def holder(module: nn.Module) -> Any:
    """A model with a decoder that has `module` in it."""
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.experts = module
    return model


def found(module: nn.Module) -> ExpertForm:
    return find_expert_forms(holder(module))[module]


def routed_inputs(experts: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(9, experts, generator=generator).argsort(dim=1)[:, :2]
    return torch.randn(9, width, generator=generator), chosen, torch.rand(9, 2, generator=generator)


@pytest.mark.parametrize("variant", ["experts", "router_and_experts", "shared_expert"])
def test_every_layer_of_a_decoder_has_a_form(variant: str) -> None:
    decoder = make_decoder(variant).get_decoder()
    forms = find_expert_forms(decoder)
    assert len(forms) == 2
    for module, form in forms.items():
        assert (form.up, form.down, form.transposed, form.routed) == ("gate_up_proj", "down_proj", False, True)
        given = routed_inputs(form.experts, form.inputs)
        with torch.no_grad():
            torch.testing.assert_close(form.run(dict(module.named_parameters()), given), module(*given))


def test_experts_stored_the_other_way_round_are_told_apart() -> None:
    module = aria()
    form = found(module)
    assert (form.transposed, form.routed, form.inputs, form.middle) == (True, True, 32, (96, 48))
    given = routed_inputs(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(form.run(dict(module.named_parameters()), given), module(*given))
    model = holder(module)
    forms = find_expert_forms(model.decoder)
    names = {f"decoder.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert transposed_parameters(model, forms) == names
    assert expert_shapes(model, forms)["decoder.experts.gate_up_proj"] == (5, 96, 32)


def test_experts_that_take_the_rows_of_all_are_known() -> None:
    module = llama4()
    form = found(module)
    assert (form.transposed, form.routed) == (True, False)
    rows = torch.randn(5 * 3, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(form.run(dict(module.named_parameters()), (rows,)), module(rows))


def _scaled_before(self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights on what the experts read, not on what they give."""
    out = torch.zeros_like(hidden)
    for expert in chosen.unique():
        token, place = torch.where(chosen == expert)
        rows = hidden[token] * weights[token, place, None]
        gate, up = (rows @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        out.index_add_(0, token, (self.act_fn(gate) * up) @ self.down_proj[expert])
    return out


def _softened(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return torch.tanh(gate) * up + 0.01


def test_what_computes_otherwise_is_refused() -> None:
    scaled = type("Scaled", (type(aria()),), {"forward": _scaled_before})
    module = aria()
    module.__class__ = scaled
    with pytest.raises(UnsupportedModelError, match=r"experts \(Scaled, 5 experts\) computes something else than two"):
        found(module)
    third = aria()
    third.bias = nn.Parameter(torch.zeros(5, 96))
    with pytest.raises(UnsupportedModelError, match="have no ONNX form"):
        found(third)


def _limited(self: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Plain gated experts, but for `expert_limits`: the largest value of each one's gate."""
    out = torch.zeros_like(hidden)
    for expert in chosen.unique().tolist():
        token, place = torch.where(chosen == expert)
        gate, up = (hidden[token] @ self.gate_up_proj[expert]).chunk(2, dim=-1)
        made = self.act_fn(gate.clamp(max=self.expert_limits[expert])) * up @ self.down_proj[expert]
        out.index_add_(0, token, made * weights[token, place, None])
    return out


@pytest.mark.parametrize("limits", [(7.0,) * 5, (5e3,) * 5, (float("inf"),) * 4 + (7.0,)])
def test_a_limit_that_only_large_rows_reach_is_refused_in_any_expert(limits: tuple[float, ...]) -> None:
    module = aria()
    module.__class__ = type("Limited", (type(module),), {"forward": _limited})
    module.expert_limits = (float("inf"),) * 5
    assert found(module).transposed
    module.expert_limits = limits
    with pytest.raises(UnsupportedModelError, match=r"experts \(Limited, 5 experts\) computes something else than two"):
        found(module)


def test_rows_of_zeros_must_give_zeros_where_experts_take_all_rows() -> None:
    module = llama4()
    module.act_fn = nn.Identity()
    assert not found(module).routed
    module.act_fn = nn.Softplus()  # softplus(0) * 0 is 0 as well
    assert not found(module).routed
    odd = llama4()
    odd._apply_gate = _softened
    odd.forward = lambda rows: torch.cat(
        [
            _softened(each @ odd.gate_up_proj[e]) @ odd.down_proj[e]
            for e, each in enumerate(rows.reshape(len(odd.gate_up_proj), -1, 32))
        ]
    )
    with pytest.raises(UnsupportedModelError, match="have no ONNX form"):
        found(odd)


@pytest.mark.parametrize("make", [aria, lambda: next(iter(find_expert_forms(make_decoder("experts").get_decoder())))])
def test_matrices_of_experts_go_into_their_parameter(make: Any) -> None:
    module = make()
    model, form = holder(module), found(module)
    _, outputs, inputs = expert_shapes(model, {module: form})["decoder.experts.gate_up_proj"]
    matrix = torch.arange(outputs * inputs, dtype=torch.float32).reshape(outputs, inputs)
    given = {"decoder.experts.gate_up_proj.2": matrix, "lm_head.weight": torch.ones(1)}
    made = with_packed_experts(model, model.decoder, given)
    assert made.keys() == {"decoder.experts.gate_up_proj", "lm_head.weight"}
    whole = made["decoder.experts.gate_up_proj"]
    assert torch.equal(whole[2].t() if form.transposed else whole[2], matrix)
    others = [e for e in range(form.experts) if e != 2]
    assert torch.equal(whole[others], module.gate_up_proj.detach()[others])
    plain = SimpleNamespace(named_modules=list, modules=list)
    assert with_packed_experts(plain, plain, given) == given  # type: ignore[arg-type]
