from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from tests.tiny import make_tiny
from vlmexport.lower.onnx.encoder import lower_vision
from vlmexport.lower.onnx.precision import EncoderPrecision
from vlmexport.lower.onnx.repeat import expand_repeats, repeated_layers
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.model.load import load_vlm
from vlmexport.progress import SilentProgress
from vlmexport.split.examples import processor_examples
from vlmexport.split.vision import split_vision


@pytest.mark.slow
@pytest.mark.parametrize("family", ["idefics3", "vipllava"])
def test_repeated_layers_equal_a_full_trace(family: str, tmp_path: Path) -> None:
    vlm = load_vlm(str(make_tiny(family, tmp_path / "model", vision_layers=5)))
    part, _ = split_vision(vlm, processor_examples(vlm))
    inputs = {k: v.numpy() for k, v in part.examples[2].items()}
    operators, outputs = [], []
    for repeat in (True, False):
        graph = lower_vision(vlm.model, part, EncoderPrecision("fp32", "fp32"), 21, repeat=repeat)
        path = tmp_path / f"{repeat}.onnx"
        stream_weights(graph.model, graph.groups, path, SilentProgress(), "write")
        operators.append(Counter(n.op_type for n in graph.model.graph))
        outputs.append(ort.InferenceSession(path).run(None, inputs)[0])
    shape_work = {"Shape", "Gather", "Concat", "Squeeze", "Unsqueeze", "Reshape"}
    heavy = [{op: n for op, n in found.items() if op not in shape_work} for found in operators]
    assert heavy[0] == heavy[1]
    assert np.array_equal(outputs[0], outputs[1])


class Layer(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("factor", torch.tensor([factor]))

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + self.factor * torch.tanh(self.linear(x)) + shift


class Stack(nn.Module):
    """Layer 3 has another buffer, layer 4 is called with another shift; layers 1 and 2 are like layer 0."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(f) for f in (1.0, 1.0, 1.0, 0.5, 1.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift, other = x.mean(-1, keepdim=True), x.amax(-1, keepdim=True)
        states = [x]
        for index, layer in enumerate(self.layers):
            states.append(layer(states[-1], other if index == 4 else shift))
        return torch.cat([states[1], states[2], states[-1]], dim=-1)


def test_layers_that_are_not_alike_are_traced_themselves() -> None:
    torch.manual_seed(0)
    stack = Stack().eval()
    batch = torch.export.Dim("batch")
    with repeated_layers(stack, stack) as repeats, torch.no_grad():
        program = torch.onnx.export(
            stack, (torch.zeros(2, 8),), dynamic_shapes=({0: batch},), dynamo=True, optimize=False, verbose=False
        )
    graph = program.model.graph
    emitted = [n.attributes["layer"].as_int() for n in graph if n.op_type == "Repeat"]
    assert emitted == [1, 2]
    assert repeats.kinds == [0, 0, 0, 3, 0]
    parameters = dict(stack.named_parameters())
    for value in [v for v in graph.initializers.values() if v.name in parameters]:
        graph.initializers.pop(value.name)
        graph.inputs.append(value)
    expand_repeats(graph, repeats, parameters)
    assert {v.name for v in graph.inputs[1:]} == set(parameters)
    x = torch.randn(3, 8)
    feeds = {graph.inputs[0].name: x.numpy(), **{n: p.detach().numpy() for n, p in parameters.items()}}
    session = ort.InferenceSession(ir.serde.serialize_model(program.model).SerializeToString())
    assert np.allclose(session.run(None, feeds)[0], stack(x).detach().numpy(), atol=1e-6)


def test_a_layer_gets_its_own_forward_back() -> None:
    stack = Stack()
    with repeated_layers(stack, stack):
        assert "forward" in stack.layers[0].__dict__
    assert not any("forward" in layer.__dict__ for layer in stack.layers)
