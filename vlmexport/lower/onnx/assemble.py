"""Assemble a decoder graph: repeat the traced layers, and say every neutral operator in a dialect's words."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.cross import CrossEmitter
from vlmexport.lower.onnx.dialect import AttentionCall, Dialect
from vlmexport.lower.onnx.experts import ExpertEmitter, ExpertRegion, expert_ref, without_regions
from vlmexport.lower.onnx.layer_rows import emit_layer_rows
from vlmexport.lower.onnx.linear import LinearEmitter, LinearRef, cast
from vlmexport.lower.onnx.neutral import DOMAIN
from vlmexport.lower.onnx.regions import cut_regions
from vlmexport.lower.onnx.relative import AddedLookup
from vlmexport.lower.onnx.rotation import Rotations
from vlmexport.lower.onnx.shared_kv import SharedCall
from vlmexport.lower.onnx.states import OPERATORS, StateEmitter, wide_nodes
from vlmexport.lower.onnx.trace import TracedDecoder
from vlmexport.lower.onnx.traced_values import linear_behind, linears_before, required, static, unrotated
from vlmexport.lower.onnx.weights import typed_value
from vlmexport.model.kv import KVGeometry
from vlmexport.model.per_token import PER_LAYER

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass
class DecoderAssembler:
    """Builds one decoder graph from a trace; see `assemble_decoder`."""

    traced: TracedDecoder
    kv: KVGeometry
    dialect: Dialect
    linears: LinearEmitter
    tape: Tape = field(default_factory=Tape)
    names: dict[ir.Value, ir.Value] = field(default_factory=dict)  # traced value -> new value
    replaced: dict[ir.Value, ir.Value] = field(default_factory=dict)  # new value -> a newer one that equals it
    constants: dict[ir.Value, ir.Value] = field(default_factory=dict)
    flat: dict[ir.Value, ir.Value] = field(default_factory=dict)  # traced 4-D attention output -> its 3-D form
    presents: list[ir.Value] = field(default_factory=list)
    weights: dict[ir.Value, str] = field(default_factory=dict)  # traced parameter that copied nodes read -> its name
    stored: dict[str, ir.Value] = field(default_factory=dict)  # name of such a parameter -> its initializer
    wide: frozenset[ir.Node] = frozenset()  # traced nodes to compute in float32
    cross: CrossEmitter | None = None
    place: tuple[int, int] = (0, 0)  # the layer that is being emitted, and the traced one that stands for it

    def __post_init__(self) -> None:
        self.rotations = Rotations(self.tape)

    @property
    def float_type(self) -> ir.DataType:
        """The activation type."""
        return self.linears.float_type

    def hidden_states(self, inputs: dict[str, ir.Value], pasts: dict[str, ir.Value]) -> ir.Value:
        """Emit all layers for the trace's `inputs`; the last hidden state ``[B, S, H]`` after the final norm."""
        graph = self.traced.graph
        for value in graph.inputs:
            if value.name in inputs:
                self.names[value] = inputs[value.name]
            else:
                self.weights[value] = str(value.name)
        regions = cut_regions(graph, {kind: self.traced.layer_paths[kind] for kind in self.traced.kind_of})
        self.states, self.wide = StateEmitter(self.tape, self.dialect, pasts), wide_nodes(graph)
        self._emit_all(regions.before, "before.", 0, 0, pasts)
        current: ir.Value | None = None
        for layer, kind in enumerate(self.traced.kind_of):
            nodes = regions.templates[kind]
            if current is not None:
                self.names[required(nodes[0].inputs[0])] = current
            self._emit_all(nodes, f"layers.{layer}.", layer, kind, pasts)
            current = self._new(nodes[-1].outputs[0])
        if current is not None:
            last = max(regions.templates)
            self.names[regions.templates[last][-1].outputs[0]] = current
        self._emit_all(regions.after, "after.", 0, 0, pasts)
        return self._new(graph.outputs[0])

    def _emit_all(self, nodes: list[ir.Node], prefix: str, layer: int, kind: int, pasts: dict[str, ir.Value]) -> None:
        self.place = (layer, kind)
        for node in without_regions(nodes):
            if isinstance(node, ExpertRegion):
                self._experts(node, prefix)
            elif node.domain != DOMAIN:
                self._copy(node, prefix)
            elif node.op_type in ("LayerIn", "LayerOut", "Rotary"):
                self.names[node.outputs[0]] = self._new(node.inputs[0])
            elif node.op_type == "Linear":
                ref = self._linear_ref(node, layer, kind)
                product = self.linears.emit(self.tape, self._new(node.inputs[0]), (ref,), ref.weight)
                self._define(node.outputs[0], product, prefix, product.dtype)
            elif node.op_type == "RMSNorm":
                self._norm(node, prefix, layer, kind)
            elif node.op_type == "LayerNorm":
                self._layer_norm(node, prefix, layer, kind)
            elif node.op_type == "Rotation":
                x, cos, sin = (self._new(v) for v in node.inputs)
                turned = self.rotations.emit(node, cast(self.tape, x, self.float_type), cos, sin)
                self._define(node.outputs[0], turned, prefix)
            elif node.op_type == "Attention":
                self._attention(node, prefix, layer, kind, pasts)
            elif node.op_type == "CrossAttention":
                out, query = node.outputs[0], required(node.inputs[0])
                flat = required(self.cross).emit(node, self._new(query), layer)
                self._output(out, flat, static(query, 1), static(query, 3), f"{prefix}cross.")
            elif node.op_type == "SharedAttention":
                self._shared_attention(node, prefix, layer)
            elif node.op_type == "LayerRows":
                rows = emit_layer_rows(self.tape, self._new(node.inputs[0]), layer)
                self._define(node.outputs[0], rows, prefix)
            elif node.op_type in OPERATORS:
                result, present = self.states.emit(node, [self._new(v) for v in node.inputs], layer)
                self.presents.append(present)
                self._define(node.outputs[0], result, prefix, result.dtype)
            else:
                raise ValueError(f"unknown neutral operator {node.op_type}")

    def _new(self, value: ir.Value | None) -> ir.Value:
        value = required(value)
        if value.const_value is not None and value.producer() is None:
            return self._constant(value)
        if value in self.weights:
            return self._weight(self._weight_name(self.weights[value], *self.place))
        found = self.names[value]
        while found in self.replaced:
            found = self.replaced[found]
        return found

    def _weight(self, name: str) -> ir.Value:
        """A parameter that a copied node reads, in the activation type."""
        if name not in self.stored:
            kind = ir.DataType.FLOAT if self.linears.stays_wide(name) else None
            held = self.traced.buffers.get(name)
            value = self.linears.weights.tensor(name) if held is None else held
            self.stored[name] = self.linears.constant(name, value, kind)
        return self.stored[name]

    def _constant(self, value: ir.Value) -> ir.Value:
        if value not in self.constants:
            tensor = required(value.const_value)
            if len(tensor.shape) > 1 and tensor.size > 64:
                raise UnsupportedModelError(f"the decoder's trace holds the weight {value.name}, which no rule writes")
            made = ir.Tensor(tensor.numpy(), name=f"constant.{value.name}")
            self.constants[value] = ir.Value(
                name=f"constant.{value.name}", type=ir.TensorType(made.dtype), shape=value.shape, const_value=made
            )
        return self.constants[value]

    def _define(self, traced: ir.Value, new: ir.Value, prefix: str, float_type: ir.DataType | None = None) -> None:
        new.name = f"{prefix}{traced.name}"
        dtype = (float_type or self.float_type) if traced.dtype == ir.DataType.FLOAT else traced.dtype
        if dtype is not None:
            new.type = ir.TensorType(dtype)
        new.shape = traced.shape
        self.names[traced] = new

    def _copy(self, node: ir.Node, prefix: str) -> None:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Reshape" and source in self.flat and len(required(node.outputs[0].shape)) == 3:
            self.names[node.outputs[0]] = self.flat[source]  # [B, S, N, D] back to [B, S, N * D]: never left it
            return
        inputs = [None if v is None else self._new(v) for v in node.inputs]
        kind = ir.DataType.FLOAT if node in self.wide else self._float_kind(inputs)
        inputs = [v if v is None or v.dtype not in _FLOATS else cast(self.tape, v, kind) for v in inputs]
        attributes = {a.name: a for a in node.attributes.values()}
        outputs = self.tape.op_multi_out(
            node.op_type, inputs, attributes, domain=node.domain, num_outputs=len(node.outputs)
        )
        for old, new in zip(node.outputs, outputs, strict=True):
            self._define(old, new, prefix, kind)

    def _experts(self, region: ExpertRegion, prefix: str) -> None:
        """Every expert's own copy of a region, and what sends rows there and back."""

        def one(tape: Tape, rows: ir.Value, expert: int) -> ir.Value:
            outside, self.tape = self.tape, tape
            own = f"{prefix}{region.name}.{expert}."
            self.names[region.first.outputs[0]] = rows
            for node in region.inside:
                if (parameter := region.parameter(node)) is None:
                    self._copy(node, own)
                else:
                    ref = expert_ref(node, self._weight_name(parameter, *self.place), expert)
                    product = self.linears.emit(tape, self._new(node.inputs[0]), (ref,), ref.weight)
                    self._define(node.outputs[0], product, own, product.dtype)
            self.tape = outside
            return self._new(region.last.inputs[0])

        emitter = ExpertEmitter(self.tape, f"{prefix}{region.name}.", region, one)
        rows, *routing = (self._new(v) for v in region.first.inputs)
        out = emitter.emit(cast(self.tape, rows, self.float_type), routing)
        self._define(region.last.outputs[0], cast(self.tape, out, self.float_type), prefix)

    def _float_kind(self, inputs: list[ir.Value | None]) -> ir.DataType:
        """Float type of a copied node: the widest of its operands; numbers made from integers start in float32."""
        kinds = {v.dtype for v in inputs if v is not None and v.const_value is None and v.dtype in _FLOATS}
        if ir.DataType.FLOAT in kinds or not kinds:
            return ir.DataType.FLOAT
        return self.float_type

    def _weight_name(self, name: str, layer: int, kind: int) -> str:
        own = self.traced.layer_paths[kind] + "."
        return self.traced.layer_paths[layer] + "." + name.removeprefix(own) if name.startswith(own) else name

    def _linear_ref(self, node: ir.Node, layer: int, kind: int) -> LinearRef:
        text = {k: node.attributes[k].as_string() for k in ("weight", "bias")}
        sizes = {k: node.attributes[k].as_int() for k in ("in_features", "out_features")}
        bias = self._weight_name(text["bias"], layer, kind) if text["bias"] else ""
        return LinearRef(self._weight_name(text["weight"], layer, kind), bias, **sizes)

    def _norm(self, node: ir.Node, prefix: str, layer: int, kind: int) -> None:
        name = self._weight_name(node.attributes["weight"].as_string(), layer, kind)
        offset, epsilon = node.attributes["offset"].as_float(), node.attributes["epsilon"].as_float()
        x = self._new(node.inputs[0])
        if self.dialect.wide_norms:
            x = cast(self.tape, x, ir.DataType.FLOAT)
        if name:
            weight = self.linears.constant(name, self.linears.weights.tensor(name).float() + offset, x.dtype)
        else:
            ones = torch.ones(static(required(node.inputs[0]), -1))
            weight = self.linears.constant(f"{prefix}{node.outputs[0].name}.ones", ones, x.dtype)
        normed, again = self.dialect.rms_norm(self.tape, x, weight, epsilon)
        if again is not None:
            again.name, again.type, again.shape = f"{x.name}.sum", x.type, x.shape
            self.replaced[x] = again
        normed.type, normed.shape = x.type, x.shape
        self._define(node.outputs[0], cast(self.tape, normed, self.float_type), prefix)

    def _layer_norm(self, node: ir.Node, prefix: str, layer: int, kind: int) -> None:
        x = self._new(node.inputs[0])
        if self.dialect.wide_norms:
            x = cast(self.tape, x, ir.DataType.FLOAT)
        inputs = [x]
        for key in ("weight", "bias"):
            if name := node.attributes[key].as_string():
                name = self._weight_name(name, layer, kind)
                inputs.append(self.linears.constant(name, self.linears.weights.tensor(name), x.dtype))
        attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float(), "stash_type": 1}
        normed = self.tape.op("LayerNormalization", inputs, attributes)
        normed.type, normed.shape = x.type, x.shape
        self._define(node.outputs[0], cast(self.tape, normed, self.float_type), prefix)

    def _attention(self, node: ir.Node, prefix: str, layer: int, kind: int, pasts: dict[str, ir.Value]) -> None:
        past = pasts[f"past_key_values.{layer}.key"], pasts[f"past_key_values.{layer}.value"]
        query, key, value = (required(v) for v in node.inputs)
        rotates = self._rotates(query, key)
        query, key = unrotated(query), unrotated(key)
        heads, head_dim = static(query, 1), static(query, 3)
        call = AttentionCall(
            query=cast(self.tape, self._new(query), self.float_type),
            key=cast(self.tape, self._new(key), self.float_type),
            value=cast(self.tape, self._new(value), self.float_type),
            packed=self._packed(node, layer, kind) if self.dialect.packs_qkv else None,
            heads=heads,
            kv_heads=static(key, 1),
            head_dim=head_dim,
            scale=node.attributes["scale"].as_float(),
            softcap=node.attributes["softcap"].as_float(),
            window=node.attributes["window"].as_int(),
            chunk=self.traced.chunks[layer] if self.traced.chunks else 0,
            past_key=past[0],
            past_value=past[1],
            rotates=rotates,
            layer=layer,
            key_weight=self._weight_behind(key, layer, kind),
            value_weight=self._weight_behind(value, layer, kind),
            value_makers=tuple(self._linear_ref(n, layer, kind).weight for n in linears_before(value)),
            added=self._added(),
        )
        result = self.dialect.attention(self.tape, call)
        self._present(result.present_key, past[0], f"present.{layer}.key")
        self._present(result.present_value, past[1], f"present.{layer}.value")
        self._output(node.outputs[0], result.output, heads, head_dim, prefix)

    def _added(self) -> AddedLookup | None:
        """What attention to the tokens adds to its scores."""
        lookup = self.traced.relative
        return None if lookup is None else AddedLookup(lookup, self._weight(lookup.weight))

    def _shared_attention(self, node: ir.Node, prefix: str, layer: int) -> None:
        query, source = required(node.inputs[0]), node.attributes["source"].as_int()
        if unrotated(query) is not query:
            raise UnsupportedModelError(
                "layers that read another layer's keys cannot rotate inside attention; use --attention standard"
            )
        kept = {value.name: value for value in self.presents}
        call = SharedCall(
            query=cast(self.tape, self._new(query), self.float_type),
            key=kept[f"present.{source}.key"],
            value=kept[f"present.{source}.value"],
            heads=static(query, 1),
            kv_heads=node.attributes["kv_heads"].as_int(),
            head_dim=static(query, 3),
            scale=node.attributes["scale"].as_float(),
            softcap=node.attributes["softcap"].as_float(),
            window=node.attributes["window"].as_int(),
            layer=layer,
        )
        result = self.dialect.shared_attention(self.tape, call)
        self._output(node.outputs[0], result, call.heads, call.head_dim, prefix)

    def _rotates(self, query: ir.Value, key: ir.Value) -> bool:
        """Was the rotary embedding of this attention taken out? Refuses what does not rotate just before attention."""
        marked = unrotated(query) is not query, unrotated(key) is not key
        if marked[0] != marked[1]:
            raise UnsupportedModelError("an attention rotates its queries or its keys alone, which no operator does")
        return marked[0]

    def _present(self, present: ir.Value, past: ir.Value, name: str) -> None:
        dims = list(required(past.shape))
        present.name, present.type = name, past.type
        present.shape = ir.Shape([*dims[:2], self.dialect.cache_lengths[1], dims[3]])
        self.presents.append(present)

    def _output(self, traced: ir.Value, flat: ir.Value, heads: int, head_dim: int, prefix: str) -> None:
        flat.name, flat.type = f"{prefix}{traced.name}.flat", ir.TensorType(self.float_type)
        flat.shape = ir.Shape([*list(required(traced.shape))[:2], heads * head_dim])
        self.flat[traced] = flat
        shape = self.tape.initializer(ir.tensor([0, 0, heads, head_dim], name=f"{prefix}{traced.name}.shape"))
        self._define(traced, self.tape.op("Reshape", [flat, shape]), prefix)

    def _weight_behind(self, value: ir.Value, layer: int, kind: int) -> str | None:
        linear = linear_behind(value)
        return None if linear is None else self._linear_ref(linear, layer, kind).weight

    def _packed(self, node: ir.Node, layer: int, kind: int) -> ir.Value | None:
        linears = [linear_behind(unrotated(required(v))) for v in node.inputs]
        if any(n is None for n in linears):
            return None
        nodes = [required(n) for n in linears]
        if len({n.inputs[0] for n in nodes}) != 1:
            return None
        refs = tuple(self._linear_ref(n, layer, kind) for n in nodes)
        if not self.linears.uniform(refs):
            return None
        parent = refs[0].weight.removesuffix(".weight").rpartition(".")[0]
        return self.linears.emit(self.tape, self._new(nodes[0].inputs[0]), refs, f"{parent}.qkv_proj.weight")


def assemble_decoder(
    traced: TracedDecoder,
    kv: KVGeometry,
    hidden_size: int,
    head: LinearRef,
    dialect: Dialect,
    linears: LinearEmitter,
    logit_cap: float = 0.0,
) -> ir.Model:
    """The decoder graph of docs/manifest.md, its large weights still to come from ``linears.groups``.

    `head` is the LM head; its logits become ``cap * tanh(logits / cap)`` where `logit_cap` is not 0. Raises
    `UnsupportedModelError` for a trace that cannot be repeated.
    """
    build = DecoderAssembler(traced, kv, dialect, linears)
    kind = linears.float_type
    inputs = _with_further_inputs(dialect.inputs(kind, hidden_size), traced, kind)
    pasts = {
        name: typed_value(
            name, dialect.cache_type or kind, ["batch_size", kept.heads, dialect.cache_lengths[0], kept.head_dim]
        )
        for name, kept in kv.pasts().items()
    }
    for state in kv.states:
        stored = ir.DataType.FLOAT if state.dtype == "float32" else kind
        pasts[state.past] = typed_value(state.past, stored, ["batch_size", *state.shape])
    dialect.prologue(build.tape, inputs, next(iter(pasts.values())))
    build.cross = None if traced.cross is None else CrossEmitter(build.tape, traced.cross, kind)
    given, further = ({}, {}) if build.cross is None else build.cross.prologue(inputs["inputs_embeds"])
    embeds, positions = inputs["inputs_embeds"], dialect.positions(inputs)
    hidden = build.hidden_states({**inputs, **further, "inputs_embeds": embeds, "position_ids": positions}, pasts)
    kept = dialect.kept_rows(build.tape, hidden, inputs)
    logits = linears.emit(build.tape, kept, (head,), head.weight)
    logits = cast(build.tape, logits, ir.DataType.FLOAT)
    if logit_cap:
        cap = build.tape.initializer(ir.tensor(logit_cap, dtype=ir.DataType.FLOAT, name="logits.cap"))
        logits = build.tape.op("Mul", [build.tape.op("Tanh", [build.tape.op("Div", [logits, cap])]), cap])
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["batch_size", "kept_length", head.out_features])
    if not dialect.needs_position_ids:
        _take_sizes_from(embeds, positions)
        inputs.pop("position_ids", None)
    return _model(build, [*inputs.values(), *given.values(), *pasts.values()], [logits, *build.presents])


def _with_further_inputs(inputs: dict[str, ir.Value], traced: TracedDecoder, kind: ir.DataType) -> dict[str, ir.Value]:
    """`inputs` with what the trace takes beside them: positions on three axes, what early layers add."""
    made = dict(inputs)
    for value in traced.graph.inputs:
        dims = [d if isinstance(d, int) else str(d) for d in required(value.shape)]
        if value.name == "position_ids" and len(dims) > 2 and "position_ids" in made:
            made["position_ids"].shape = ir.Shape(dims)
        elif value.name in ("deepstack_embeds", PER_LAYER):
            made[value.name] = typed_value(value.name, kind, dims)
    return made


def _model(build: DecoderAssembler, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=build.tape.nodes,
        initializers=[*build.tape.initializers, *build.constants.values()],
        opset_imports={"": build.dialect.opset, **build.dialect.domains},
        name="decoder",
    )
    model = ir.Model(graph, ir_version=build.dialect.ir_version, producer_name="vlmexport")
    RemoveUnusedNodesPass()(model)
    return model


def _take_sizes_from(embeds: ir.Value, positions: ir.Value) -> None:
    """Let nodes that ask for the size of `positions` ``[B, S]`` ask `embeds` ``[B, S, H]``: the trace asks either."""
    for node, index in list(positions.uses()):
        if node.op_type == "Shape":
            node.replace_input_with(index, embeds)
