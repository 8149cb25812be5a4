"""Lower encoder and projector: one trace in FP32, weights by whole-model name, streamed later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.exporter import quiet_exporter
from vlmexport.lower.onnx.linear import MICROSOFT, checked_cast
from vlmexport.lower.onnx.masks import skip_empty_masks
from vlmexport.lower.onnx.precision import EncoderPrecision, choose_storage, half_products, widen
from vlmexport.lower.onnx.relative import AddedScores
from vlmexport.lower.onnx.repeat import Repeats, expand_repeats, repeated_layers
from vlmexport.lower.onnx.selection import keep_every_row
from vlmexport.lower.onnx.simplify import forget_trace, share, simplify, split_gemms
from vlmexport.lower.onnx.standard_attention import neutral_attention, standard_attention
from vlmexport.lower.onnx.versions import ir_version
from vlmexport.lower.onnx.weights import WeightGroup, initializer
from vlmexport.manifest import KeptTensor, TensorSpec
from vlmexport.split.attention import attention_implementation, refuse_changed_scores
from vlmexport.split.parts import Part

Dialect = Literal["ort", "tensorrt"]


@dataclass(frozen=True)
class VisionGraph:
    """A vision-side graph without its weights, the groups that make them, and how each weight is stored and why."""

    model: ir.Model
    groups: tuple[WeightGroup, ...]
    kept: tuple[KeptTensor, ...]


def lower_vision(
    model: nn.Module,
    part: Part,
    precision: EncoderPrecision,
    opset: int,
    *,
    dialect: Dialect = "ort",
    repeat: bool = True,
) -> VisionGraph:
    """The graph of `part` (encoder or projector) of `model`, with the inputs and outputs of its signature.

    Graph inputs and outputs are FP32 in every precision. Initializers have the whole-model names of their parameters;
    a matrix that is only read transposed is stored so. With `dialect` ``tensorrt`` (opset 23 or later) every operator
    is a standard one of static effect, and every picture given counts: rows of padding are not left out.
    `repeat` False traces every layer (the oracle for repetition).
    Raises `UnsupportedModelError` when the part cannot be traced, or has no form in the dialect.
    """
    traced = trace_vision(model, part, opset, dialect=dialect, repeat=repeat)
    return store_vision(traced, model, part, precision, opset, dialect=dialect)


def trace_vision(
    model: nn.Module, part: Part, opset: int, *, dialect: Dialect = "ort", repeat: bool = True
) -> ir.Model:
    """The first half of `lower_vision`: the graph of `part` in FP32, its parameters still inputs by whole-model name.

    A copy of it (``clone``) is what `store_vision` makes a graph of one precision from.
    """
    graph_model, repeats = _trace(model, part, opset, dialect, repeat=repeat)
    graph = graph_model.graph
    simplify(graph_model)
    if dialect == "tensorrt":
        keep_every_row(graph_model, part)
        split_gemms(graph)
    forget_trace(graph)
    expand_repeats(graph, repeats, _parameters(part))
    if dialect == "ort":
        skip_empty_masks(graph)
    return graph_model


def store_vision(
    graph_model: ir.Model,
    model: nn.Module,
    part: Part,
    precision: EncoderPrecision,
    opset: int,
    *,
    dialect: Dialect = "ort",
) -> VisionGraph:
    """The second half of `lower_vision`: weights stored as `precision` says. `graph_model` is used up."""
    graph, parameters = graph_model.graph, _parameters(part)
    named = {v.name: v for v in graph.inputs}
    values = [named[name] for name in parameters if name in named]
    for value in values:
        graph.inputs.remove(value)
    groups, kept, halves = _store(graph, part, [v for v in values if v.uses()], parameters, precision)
    if precision.arithmetic == "fp16":
        half_products(graph, halves)
    if dialect == "tensorrt":
        standard_attention(graph, model, _attending(model, part), part, half=precision.arithmetic == "fp16")
        share(graph_model)
    _sign(graph, part)
    graph_model.ir_version = ir_version(opset)
    graph_model.producer_name, graph_model.producer_version = "vlmexport", None
    return VisionGraph(graph_model, groups, kept)


def _parameters(part: Part) -> dict[str, torch.Tensor]:
    return {part.prefix + name: parameter for name, parameter in part.module.named_parameters()}


class _Positional(nn.Module):
    """`module` called by position, as the exporter wants it; it owns the same parameters under the same names."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._module = (module,)
        self._names = names
        self.training = False

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self._module[0](**dict(zip(self._names, tensors, strict=True)))


def _trace(model: nn.Module, part: Part, opset: int, dialect: Dialect, *, repeat: bool) -> tuple[ir.Model, Repeats]:
    """The traced graph, its parameters as further inputs, so that nothing can read (and fold) their values."""
    specs = part.signature.inputs
    example = _trace_example(part)
    tensors = tuple(_plain(example[spec.name]) for spec in specs)
    shapes = tuple(_dynamic(spec) for spec in specs)
    with ExitStack() as stack:
        stack.enter_context(quiet_exporter())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_fused_attention(model, part, dialect))
        stack.enter_context(_empty_fp32_weights(part))
        encoder = _attending(model, part)
        repeats = stack.enter_context(repeated_layers(model, encoder)) if repeat and encoder is not None else Repeats()
        try:
            program: Any = torch.onnx.export(
                _Positional(part.module, tuple(spec.name for spec in specs)),
                tensors,
                dynamic_shapes={"tensors": shapes},
                dynamo=True,
                optimize=False,
                opset_version=opset,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            if isinstance(error.__cause__, UnsupportedModelError):
                raise error.__cause__ from None
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            raise UnsupportedModelError(f"{part.role}: torch.export cannot trace it: {reason}") from error
    traced: ir.Model = program.model
    local = {name for name, _ in part.module.named_parameters()}
    for value in [v for v in traced.graph.initializers.values() if v.name in local]:
        traced.graph.initializers.pop(str(value.name))
        value.name, value.const_value = f"{part.prefix}{value.name}", None
        traced.graph.inputs.append(value)
    return traced, repeats


def _trace_example(part: Part) -> Mapping[str, torch.Tensor]:
    """The first example whose varying axes are all longer than 1 (a trace takes 1 for a constant)."""
    for example in part.examples:
        sizes = [example[s.name].shape[i] for s in part.signature.inputs for i in _dynamic(s)]
        if all(size > 1 for size in sizes):
            return example
    raise UnsupportedModelError(f"{part.role}: no example has more than one of everything that may vary")


def _dynamic(spec: TensorSpec) -> dict[int, Any]:
    return {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(spec.dims) if isinstance(dim, str)}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


@contextmanager
def _empty_fp32_weights(part: Part) -> Iterator[None]:
    """Give the part FP32 parameters without values for the time of the trace (and widen its narrow buffers).

    Their memory is never touched, so none is used. Parameters outside the part share one element.
    """
    names = {id(p): part.prefix + n for n, p in part.module.named_parameters()}
    used = set(getattr(part.module, "used", names.values()))
    made: dict[int, torch.Tensor] = {}
    undo: list[tuple[dict[str, Any], str, Any]] = []
    for module in part.module.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for key, tensor in list(store.items()):
                if tensor is None or not tensor.is_floating_point():
                    continue
                undo.append((store, key, tensor))
                if id(tensor) not in made:
                    made[id(tensor)] = _stand_in(tensor, names.get(id(tensor), "") in used)
                store[key] = made[id(tensor)]
    try:
        yield
    finally:
        for store, key, tensor in undo:
            store[key] = tensor


def _stand_in(tensor: torch.Tensor, used: bool) -> torch.Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.float()
    empty = torch.empty(tensor.shape) if used else torch.zeros(1).expand(tensor.shape)
    return nn.Parameter(empty, requires_grad=False)


def _attending(model: Any, part: Part) -> Any:
    """The module whose attention is written as an operator, and whose layers are repeated: the part's, or the tower."""
    if hasattr(part.module, "attending"):
        return part.module.attending
    encoder = model.get_encoder("image")
    return None if encoder in (model, model.base_model) else encoder


def _fused_attention(model: Any, part: Part, dialect: Dialect) -> Any:
    """Within, the encoder's attention emits one operator a layer instead of its products and softmax."""
    encoder = _attending(model, part)
    if not hasattr(encoder, "set_attn_implementation"):
        return nullcontext()
    if dialect == "tensorrt":
        return neutral_attention(model, encoder)
    relative = getattr(part.module, "relative", None)
    if relative is None:
        return attention_implementation(encoder, "vlmexport_vision", _attend)
    added = AddedScores(relative)

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        given = {name: setting for name, setting in kwargs.items() if name != "position_bias"}
        return _attend(module, query, key, value, added.with_mask(mask, query.shape[2], key.shape[2]), **given)

    return attention_implementation(encoder, "vlmexport_vision", attend)


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Emit ``MultiHeadAttention`` for q, k, v ``[B, N, S, D]``; the result is ``[B, S, N, D]``."""
    if attention_mask is None and (kwargs.get("is_causal") or getattr(module, "is_causal", False)):
        raise UnsupportedModelError(f"{type(module).__name__}: causal attention in an image encoder is not supported")
    refuse_changed_scores(module, kwargs)
    batch, heads, length, head_dim = query.shape
    groups = heads // key.shape[1]
    key, value = (t if groups == 1 else t.repeat_interleave(groups, dim=1) for t in (key, value))
    flat = [t.transpose(1, 2).reshape(batch, t.shape[2], heads * t.shape[3]) for t in (query, key, value)]
    scale = kwargs.get("scaling")
    attributes: dict[str, Any] = {"num_heads": heads, "scale": float(head_dim**-0.5 if scale is None else scale)}
    inputs = flat if attention_mask is None else [*flat, None, None, attention_mask]
    out = torch.onnx.ops.symbolic(
        f"{MICROSOFT}::MultiHeadAttention",
        inputs,
        attributes,
        dtype=query.dtype,
        shape=[batch, length, heads * value.shape[3]],
        version=1,
    )
    return out.reshape(batch, length, heads, value.shape[3]), None


def _store(
    graph: ir.Graph,
    part: Part,
    values: list[ir.Value],
    parameters: Mapping[str, torch.Tensor],
    precision: EncoderPrecision,
) -> tuple[tuple[WeightGroup, ...], tuple[KeptTensor, ...], set[ir.Value]]:
    """Make each parameter an initializer of its storage type; returns groups, records, and the FP16 initializers."""
    groups, kept, halves = [], [], set()
    for value in values:
        name = str(value.name)
        tensor = parameters[name].detach()
        storage = choose_storage(name, tensor, precision.storage)
        transposed = _fold_transposes(graph, value)
        stored = initializer(name, storage.dtype, reversed(tensor.shape) if transposed else tensor.shape)
        if storage.dtype == ir.DataType.FLOAT16:
            widen(value, stored, graph)
            halves.add(stored)
        else:
            ir.convenience.replace_all_uses_with(value, stored)
        groups.append(_group(stored, tensor, transposed))
        kept.append(KeptTensor(name, part.role.value, str(storage.dtype.numpy()), storage.reason))
    return tuple(groups), tuple(kept), halves


def _group(stored: ir.Value, tensor: torch.Tensor, transposed: bool) -> WeightGroup:
    name, dtype = str(stored.name), stored.dtype or ir.DataType.FLOAT

    def produce() -> tuple[np.ndarray]:
        return (checked_cast(name, tensor.t() if transposed else tensor, dtype),)

    return WeightGroup((stored,), produce)


def _fold_transposes(graph: ir.Graph, value: ir.Value) -> bool:
    """Take out the transposes of a matrix that is read in no other way; True when it must be stored transposed."""
    readers = [node for node, _ in value.uses()]
    if not readers or any(n.op_type != "Transpose" or list(n.attributes["perm"].as_ints()) != [1, 0] for n in readers):
        return False
    for node in readers:
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        graph.remove(node, safe=True)
    return True


def _sign(graph: ir.Graph, part: Part) -> None:
    """Give the graph the names, types and dims of the part's signature."""
    for values, specs in ((graph.inputs, part.signature.inputs), (graph.outputs, part.signature.outputs)):
        if len(values) != len(specs):
            raise UnsupportedModelError(f"{part.role}: traced {len(values)} tensors, the signature has {len(specs)}")
        for value, spec in zip(values, specs, strict=True):
            value.name, value.shape = spec.name, ir.Shape(spec.dims)
    graph.name = part.role.value
