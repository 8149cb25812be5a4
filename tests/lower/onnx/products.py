"""One matrix product as a graph of its own, run by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.linear import LinearEmitter, LinearRef
from vlmexport.lower.onnx.versions import ir_version
from vlmexport.lower.onnx.weights import WeightGroup
from vlmexport.manifest import QuantizedRecord
from vlmexport.plan import ExportPlan, OnnxOptions, WeightPlan
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.weights import DecoderWeights

KINDS = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}


def one_weight_plan(shapes: dict[str, tuple[int, int]], scheme: QuantScheme) -> ExportPlan:
    """A plan that quantizes the weights of `shapes` with `scheme`, and nothing else."""
    weights = tuple(
        WeightPlan(name, "decoder", shape, "quantize", "", "", scheme, 0, 0) for name, shape in shapes.items()
    )
    return ExportPlan("Tiny", OnnxOptions(), "fp32", "fp32", weights)


def emitted_product(
    weights: dict[str, torch.Tensor],
    scheme: QuantScheme,
    dtype: torch.dtype,
    level: int,
    biases: dict[str, torch.Tensor],
    kind_of_emitter: type[LinearEmitter] = LinearEmitter,
    wide: frozenset[str] = frozenset(),
) -> tuple[ir.Model, list[QuantizedRecord]]:
    """``x`` times all `weights` stacked, as the emitter writes it, with its data filled in."""
    refs = tuple(
        LinearRef(name, f"{name}.bias" if name in biases else "", w.shape[1], w.shape[0]) for name, w in weights.items()
    )
    given = {**weights, **{f"{name}.bias": b for name, b in biases.items()}}
    kind = KINDS[dtype]
    emitter = kind_of_emitter(
        DecoderWeights(given, dict.fromkeys(weights, scheme)),
        one_weight_plan({n: (w.shape[0], w.shape[1]) for n, w in weights.items()}, scheme),
        kind,
        level,
        wide,
    )
    x = ir.Value(name="x", type=ir.TensorType(kind), shape=ir.Shape(["rows", refs[0].in_features]))
    tape = Tape()
    out = emitter.emit(tape, x, refs, "packed.weight")
    out.name, out.shape = "y", ir.Shape(["rows", sum(r.out_features for r in refs)])
    domains = {"": 21, "com.microsoft": 1} if kind_of_emitter is LinearEmitter else {"": 24}
    graph = ir.Graph([x], [out], nodes=tape.nodes, opset_imports=domains, name="product")
    for group in emitter.groups:
        fill(graph, group)
    return ir.Model(graph, ir_version=ir_version(domains[""])), emitter.records


def fill(graph: ir.Graph, group: WeightGroup) -> None:
    """Make a group's arrays and register them."""
    for value, array in zip(group.values, group.produce(), strict=True):
        assert list(array.shape) == list(value.shape or [])
        value.const_value = ir.Tensor(array, name=value.name)
        assert value.const_value.dtype == value.dtype
        graph.register_initializer(value)


def run_model(model: ir.Model, x: torch.Tensor) -> np.ndarray:
    """The output of the one product for the rows `x`; what ONNX Runtime fuses itself rounds no activations."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"x": x.numpy()})[0]
    return result
