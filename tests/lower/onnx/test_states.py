"""The operators of layers that keep states: ONNX Runtime computes what their references do, padding and all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.tape import Tape

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.neutral import DOMAIN
from vlmexport.lower.onnx.state_trace import TracedStates, _check_rule, _with_cache, traced_states
from vlmexport.lower.onnx.states import StateEmitter, conv_state, delta_rule, wide_nodes

BATCH, TOKENS = 3, 5
# Rows that are whole, padded on the right, and padded on the left.
VALID = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)


@dataclass
class Given:
    """Stands for a dialect: which tokens are valid is an input of the graph."""

    valid: ir.Value
    last: ir.Value

    def new_valid(self, _tape: Tape) -> ir.Value:
        return self.valid

    def last_valid(self, _tape: Tape) -> ir.Value:
        return self.last


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(
    op: str, tensors: list[torch.Tensor], past: torch.Tensor, name: str, valid: torch.Tensor, **attributes: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The result and the present state of one neutral operator, in ONNX Runtime."""
    kinds = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}

    def given(label: str, tensor: torch.Tensor) -> ir.Value:
        kind = kinds.get(tensor.dtype, ir.DataType.BOOL if tensor.dtype == torch.bool else ir.DataType.INT64)
        return ir.Value(name=label, type=ir.TensorType(kind), shape=ir.Shape(tensor.shape))

    last = TOKENS - 1 - valid[:, : tensors[0].shape[1] if op == "DeltaRule" else TOKENS].flip(1).int().argmax(1).long()
    feed = {f"x{i}": t for i, t in enumerate(tensors)} | {name: past, "valid": valid, "last": last}
    inputs = {label: given(label, tensor) for label, tensor in feed.items()}
    tape = Tape()
    emitter = StateEmitter(tape, Given(inputs["valid"], inputs["last"]), {name: inputs[name]})  # type: ignore[arg-type]
    given_values = [inputs[f"x{i}"] for i in range(len(tensors))]
    node = ir.node(op, given_values, {"layer": 0, **attributes}, domain=DOMAIN)
    result, present = emitter.emit(node, given_values, 0)
    result.name = "result"
    graph = ir.Graph(
        list(inputs.values()), [result, present], nodes=tape.nodes, initializers=tape.initializers,
        opset_imports={"": 20}, name="test",
    )  # fmt: skip
    session = ort.InferenceSession(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    made: list[np.ndarray] = session.run(["result", present.name], {n: t.numpy() for n, t in feed.items()})
    return made[0], made[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_convolution_gets_its_state_and_keeps_that_of_the_last_valid_token(dtype: torch.dtype) -> None:
    x, past = noise(BATCH, 4, TOKENS).to(dtype), noise(BATCH, 4, 3, seed=1).to(dtype)
    wanted = conv_state(x, past, VALID)
    for got, reference in zip(run("ConvState", [x], past, "past_conv.0", VALID, kernel=3), wanted, strict=True):
        assert np.array_equal(got, reference.numpy())
    whole, present = wanted
    assert torch.equal(present[1], torch.cat([past[1], x[1, :, :2]], dim=1)[:, -3:])
    assert not whole[2, :, 3:5].any()


def rule_inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys, values, decay and rate: two key heads for four value heads."""
    query, key, value = (noise(BATCH, TOKENS, n, d, seed=n * d) for n, d in ((2, 8), (2, 8), (4, 6)))
    tensors = [query, key, value, -noise(BATCH, TOKENS, 4, seed=2).abs(), noise(BATCH, TOKENS, 4, seed=3).sigmoid()]
    return [t.to(dtype) for t in tensors]


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 1e-6)])
def test_the_gated_delta_rule_is_its_reference(dtype: torch.dtype, limit: float, normalized: bool) -> None:
    tensors, past = rule_inputs(dtype), noise(BATCH, 4, 8, 6, seed=4)
    wanted = delta_rule(tensors, past, VALID, 0.25, normalized)
    made = run("DeltaRule", tensors, past, "past_recurrent.0", VALID, scale=0.25, normalized=int(normalized))
    for got, reference in zip(made, wanted, strict=True):
        assert got.dtype == np.float32
        assert np.abs(got - reference.numpy()).max() <= limit * reference.abs().max()


def test_padding_does_not_change_the_state_of_linear_attention() -> None:
    tensors, past = rule_inputs(torch.float32), noise(BATCH, 4, 8, 6, seed=4)
    _, state = delta_rule(tensors, past, VALID, 0.25, True)
    for row, places in ((1, slice(0, 2)), (2, slice(2, 5))):
        alone = [t[row : row + 1, places] for t in tensors]
        valid = torch.ones(alone[0].shape[:2], dtype=torch.bool)
        assert torch.allclose(state[row], delta_rule(alone, past[row : row + 1], valid, 0.25, True)[1][0], atol=1e-6)


def test_decay_and_rate_are_computed_in_float32() -> None:
    x, w = ir.Value(name="x"), ir.Value(name="w")
    linear = ir.node("Linear", [x], domain=DOMAIN)
    decay = ir.node("Softplus", [linear.outputs[0]])
    exp = ir.node("Exp", [w])
    scaled = ir.node("Mul", [decay.outputs[0], exp.outputs[0]])
    other = ir.node("Relu", [x])
    rule = ir.node("DeltaRule", [other.outputs[0]] * 3 + [scaled.outputs[0], x], domain=DOMAIN)
    nodes = [linear, decay, exp, scaled, other, rule]
    assert wide_nodes(ir.Graph([x, w], [rule.outputs[0]], nodes=nodes)) == {decay, exp, scaled}


def test_another_rule_is_refused() -> None:
    def other(*tensors: torch.Tensor, initial_state: torch.Tensor, **_more: Any) -> Any:
        valid = torch.ones(tensors[0].shape[:2], dtype=torch.bool)
        out, state = delta_rule(list(tensors), initial_state, valid, 1.0, False)
        return out, state

    with pytest.raises(UnsupportedModelError, match="is not the gated delta rule"):
        _check_rule(other)


def test_what_a_layer_asks_of_its_cache_is_refused_where_it_cannot_be_traced() -> None:
    states = TracedStates()
    with pytest.raises(UnsupportedModelError, match=r"cannot be traced \(get_mask_sizes\)"):
        states.get_mask_sizes(1, 0)
    with pytest.raises(UnsupportedModelError, match="layer 3 of the decoder keeps a state that is not that of"):
        states.update_recurrent_state(torch.zeros(1), 3)
    with pytest.raises(UnsupportedModelError, match="does not say how many inputs it keeps"):
        states.update_conv_state(torch.zeros(1, 2, 3), 3)


def test_a_layer_with_states_must_be_given_a_cache() -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match="Linear keeps a state, but gets no past_key_values"):
        _with_cache(layer, TracedStates())(torch.zeros(1, 2))
    with traced_states([layer]), pytest.raises(UnsupportedModelError, match="gets no past_key_values"):
        layer(torch.zeros(1, 2))
    assert layer(torch.zeros(1, 2)).shape == (1, 2)
