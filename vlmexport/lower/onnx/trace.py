"""Trace a decoder once, in neutral operators, one layer of each kind.

transformers' own decoder runs under ``torch.export``; its linear layers, RMS norms and attention emit the neutral
operators of :mod:`vlmexport.lower.onnx.neutral` instead of computing, everything else is traced as it is. Hooks:
transformers' `AttentionInterface` and `AttentionMaskInterface`, and instance-level ``forward`` overrides that are taken
back afterwards. No family name: RMS norms are recognised by what they compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx import neutral
from vlmexport.lower.onnx.complex_numbers import real_pairs
from vlmexport.lower.onnx.counted import counted_in_trace
from vlmexport.lower.onnx.cross import CrossTrunk, trace_rows
from vlmexport.lower.onnx.expert_trace import expert_region, float_routers
from vlmexport.lower.onnx.exporter import quiet_exporter
from vlmexport.lower.onnx.layer_rows import LayerRows, layer_rows_kept
from vlmexport.lower.onnx.relative import RelativeLookup, relative_lookup
from vlmexport.lower.onnx.rotary import Rotary, RotaryInTrace, RotaryOperator, find_rotary
from vlmexport.lower.onnx.state_trace import traced_states
from vlmexport.lower.onnx.wide_heads import wide_attention
from vlmexport.model.per_token import PER_LAYER
from vlmexport.split.attention import refuse_changed_scores
from vlmexport.split.cross import CrossAttention
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.expert_forms import find_expert_forms
from vlmexport.split.kinds import proven_kinds
from vlmexport.split.layers import find_layers, layer_buffers, overridden, stored_buffers
from vlmexport.split.matrices import is_plain_linear
from vlmexport.split.names import module_path
from vlmexport.split.norms import gated_rms_norm_of, layer_norm_of, plain_rms_norm_of, rms_norm_of
from vlmexport.split.per_layer import text_arguments
from vlmexport.split.sharing import find_sources


@dataclass(frozen=True)
class TracedDecoder:
    """A neutral graph and how it repeats.

    `graph` takes ``inputs_embeds``, ``position_ids`` and the further inputs of the family, and gives the last hidden
    state ``[B, S, H]``. `kind_of[i]` is the index of the traced layer that stands for layer i; `layer_paths[i]` the
    whole-model path of layer i. `buffers` are numbers of layers that a checkpoint holds and that are no parameters, by
    whole-model name. `rotary` is set when the rotation was taken out of the trace: for an attention operator
    that applies tables of it, or as an operator of its own. `cross`: what layers attend to beside the tokens.
    `relative`: what attention to the tokens adds to its scores.
    `chunks`: those of the decoder part.
    """

    graph: ir.Graph
    kind_of: tuple[int, ...]
    layer_paths: tuple[str, ...]
    rotary: Rotary | RotaryOperator | RotaryInTrace | None
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    cross: CrossAttention | None = None
    relative: RelativeLookup | None = None
    chunks: tuple[int, ...] = ()


def trace_decoder(model: nn.Module, part: DecoderPart, *, fuse_rotary: bool, repeat: bool = True) -> TracedDecoder:
    """Trace the decoder of `part`, which lives inside `model`.

    `fuse_rotary` takes the rotary embedding out of the trace; raises `UnsupportedModelError` when it has no form that
    the attention operator can apply. `repeat` False traces every layer (the oracle for the repetition).
    """
    decoder: Any = part.decoder
    attribute, layers = find_layers(decoder)
    paths = tuple(module_path(model, layer) for layer in layers)
    sources = find_sources(decoder)
    kind_of = _kinds(part, layers, sources) if repeat else tuple(range(len(layers)))
    axes = part.position_axes
    rotary = find_rotary(decoder, list(layers), axes) if fuse_rotary else None
    deepstack, inputs = _Deepstack(), _trace_inputs(part)
    named = {id(module): name for name, module in model.named_modules()}  # before layers are left out
    with ExitStack() as stack:
        stack.enter_context(_neutral_modules(model, decoder))
        stack.enter_context(_neutral_attention(decoder, sources, part.cross, _added(part)))
        stack.enter_context(counted_in_trace(part))
        stack.enter_context(real_pairs())
        rows = stack.enter_context(layer_rows_kept(decoder))
        if rotary is not None:
            stack.enter_context(rotary.emitted())
        indices = sorted(set(kind_of))
        stack.enter_context(_only_layers(decoder, attribute, indices, deepstack, rows))
        if stateful := [layers[i] for i in indices if part.kv is not None and part.kv.states_of(i)]:
            stack.enter_context(traced_states(stateful))
        trunk = _Trunk(decoder, deepstack) if part.cross is None else CrossTrunk(decoder, part.cross)
        graph = _export(named, trunk, inputs)
    every = zip(paths, layers, strict=True)
    buffers = {f"{path}.{name}": held for path, layer in every for name, held in layer_buffers(layer).items()}
    relative = relative_lookup(named, part.relative)
    return TracedDecoder(graph, kind_of, paths, rotary, buffers, part.cross, relative, part.chunks)


def _added(part: DecoderPart) -> tuple[str, ...]:
    """What attention is given to add to its scores, and the assembled graph adds."""
    return () if part.relative is None else ("position_bias",)


@dataclass
class _Deepstack:
    """What the running trace adds to its first layers' results: ``[layers, B, S, H]``."""

    embeds: torch.Tensor | None = None

    def added(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """`hidden` ``[B, S, H]`` of `layer` with its part."""
        return hidden if self.embeds is None or layer >= len(self.embeds) else hidden + self.embeds[layer]


def _kinds(part: DecoderPart, layers: nn.ModuleList, sources: Mapping[int, int]) -> tuple[int, ...]:
    """`proven_kinds`, but a layer that something is added behind stands for itself alone, and by what layers read."""
    kinds = [(kind, sources.get(index)) for index, kind in enumerate(proven_kinds(part.decoder, layers, part.cross))]
    first: dict[tuple[int, int | None], int] = {}
    alone = part.deepstack_layers
    return tuple(range(alone)) + tuple(first.setdefault(kinds[i], i) for i in range(alone, len(kinds)))


@contextmanager
def _only_layers(
    decoder: nn.Module, attribute: str, indices: list[int], deepstack: _Deepstack, rows: LayerRows
) -> Iterator[None]:
    layers = getattr(decoder, attribute)
    config: Any = decoder.config
    text = config.get_text_config()
    count, types = text.num_hidden_layers, getattr(text, "layer_types", None)
    setattr(decoder, attribute, nn.ModuleList([layers[i] for i in indices]))
    text.num_hidden_layers = len(indices)
    if types is not None:  # decoders look a layer's mask and rotary table up by its place in the list
        text.layer_types = [types[i] for i in indices]
    with ExitStack() as stack:
        for i in indices:
            stack.enter_context(overridden(layers[i], _bracketed(layers[i], i, deepstack, rows)))
        try:
            yield
        finally:
            setattr(decoder, attribute, layers)
            text.num_hidden_layers = count
            if types is not None:
                text.layer_types = types


def _bracketed(layer: nn.Module, index: int, deepstack: _Deepstack, rows: LayerRows) -> Callable[..., Any]:
    forward = layer.forward

    def run(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        inside = neutral.bracket(hidden, "LayerIn", index)
        args, kwargs = rows.given(layer, inside, args, kwargs)
        out = forward(inside, *args, **kwargs)
        result = deepstack.added(out[0] if isinstance(out, tuple) else out, index)
        result = neutral.bracket(result, "LayerOut", index)
        return (result, *out[1:]) if isinstance(out, tuple) else result

    return run


@contextmanager
def _neutral_modules(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    paths = {id(m): path for path, m in model.named_modules()}
    experts = find_expert_forms(decoder)
    with ExitStack() as stack:
        stack.enter_context(float_routers(model, decoder))
        for module in decoder.modules():
            path = paths[id(module)]
            if module in experts:
                stack.enter_context(overridden(module, expert_region(module, experts[module], path)))
            elif is_plain_linear(module):
                stack.enter_context(overridden(module, _linear(module, path)))
            elif (norm := rms_norm_of(module)) is not None:
                epsilon, offset = norm
                forward = functools.partial(neutral.rms_norm, weight=f"{path}.weight", epsilon=epsilon, offset=offset)
                stack.enter_context(overridden(module, forward))
            elif (plain := plain_rms_norm_of(module)) is not None:
                forward = functools.partial(neutral.rms_norm, weight="", epsilon=plain, offset=0.0)
                stack.enter_context(overridden(module, forward))
            elif (gated := gated_rms_norm_of(module)) is not None:
                stack.enter_context(overridden(module, _gated_norm(f"{path}.weight", gated)))
            elif (norm := layer_norm_of(module)) is not None:
                bias = f"{path}.bias" if norm[1] else ""
                forward = functools.partial(neutral.layer_norm, weight=f"{path}.weight", bias=bias, epsilon=norm[0])
                stack.enter_context(overridden(module, forward))
        yield


def _gated_norm(weight: str, epsilon: float) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return neutral.rms_norm(x, weight, epsilon, 0.0) * nn.functional.silu(gate)

    return forward


def _linear(module: nn.Linear, path: str) -> Callable[..., torch.Tensor]:
    return functools.partial(
        neutral.linear,
        weight=f"{path}.weight",
        bias="" if module.bias is None else f"{path}.bias",
        in_features=module.in_features,
        out_features=module.out_features,
    )


@contextmanager
def _neutral_attention(
    decoder: Any, sources: Mapping[int, int], cross: CrossAttention | None, written: Sequence[str] = ()
) -> Iterator[None]:
    """Within, attention emits its operator; what is `written` of its settings is added when that is lowered."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attend(module: Any, query: Any, key: Any, value: Any, _mask: Any, **kwargs: Any) -> Any:
        refuse_changed_scores(module, kwargs, written=frozenset({"softcap", *written}))
        scale = float(query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"])
        if cross is not None and cross.layer_of(module) is not None:
            return neutral.cross_attention(query, module.layer_idx, scale), None
        softcap, window = kwargs.get("softcap"), kwargs.get("sliding_window")
        layer: int = module.layer_idx
        settings: dict[str, Any] = {
            "scale": scale,
            "softcap": float(softcap or 0.0),
            "window": -1 if window is None else int(window),
        }
        if layer in sources:
            shared = {"layer": layer, "source": sources[layer], "kv_heads": int(key.shape[1])}
            return neutral.shared_attention(query, **shared, **settings), None
        return wide_attention(query, key, value, layer, settings), None

    AttentionInterface.register("vlmexport_trace", attend)
    # The mask itself is written by the dialect; split/decoder.py has checked that it is the causal one.
    AttentionMaskInterface.register("vlmexport_trace", lambda *_args, **_kwargs: None)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("vlmexport_trace")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


class _Trunk(nn.Module):
    def __init__(self, decoder: nn.Module, deepstack: _Deepstack) -> None:
        super().__init__()
        self.decoder = decoder
        self.deepstack = deepstack

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        deepstack_embeds: torch.Tensor | None = None,
        per_layer_inputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.deepstack.embeds = deepstack_embeds
        given = {} if per_layer_inputs is None else {PER_LAYER: per_layer_inputs}
        out = self.decoder(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=False, **given)
        hidden: torch.Tensor = out.last_hidden_state
        return hidden


@dataclass(frozen=True)
class _TraceInputs:
    """Example inputs of a trace by name, and which of their axes are the batch and the tokens."""

    tensors: dict[str, torch.Tensor]
    batch_axes: dict[str, int]


def _trace_inputs(part: DecoderPart) -> _TraceInputs:
    decoder: Any = part.decoder
    axes, deepstack_layers = part.position_axes, part.deepstack_layers
    hidden = decoder.config.get_text_config().hidden_size
    positions = torch.arange(3).expand(2, 3)
    inputs = _TraceInputs({"inputs_embeds": torch.zeros(2, 3, hidden)}, {"inputs_embeds": 0, "position_ids": 0})
    inputs.tensors["position_ids"] = positions.contiguous()
    if axes > 1:
        inputs.tensors["position_ids"] = positions.expand(axes, 2, 3).contiguous()
        inputs.batch_axes["position_ids"] = 1
    if deepstack_layers:
        inputs.tensors["deepstack_embeds"] = torch.zeros(deepstack_layers, 2, 3, hidden)
        inputs.batch_axes["deepstack_embeds"] = 1
    rows = {} if part.cross is None else trace_rows(part.cross)
    for name, tensor in {**text_arguments(decoder, 2, 3), **rows}.items():
        inputs.tensors[name], inputs.batch_axes[name] = tensor, 0
    return inputs


def _export(paths: Mapping[int, str], trunk: _Trunk | CrossTrunk, inputs: _TraceInputs) -> ir.Graph:
    batch, length = torch.export.Dim("batch_size"), torch.export.Dim("sequence_length")
    shapes = {name: {axis: batch, axis + 1: length} for name, axis in inputs.batch_axes.items()}
    with quiet_exporter(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                trunk, kwargs=inputs.tensors, dynamic_shapes=shapes, dynamo=True, optimize=False, verbose=False
            )
        except torch.onnx.OnnxExporterError as error:
            if isinstance(error.__cause__, UnsupportedModelError):
                raise error.__cause__ from None
            raise
        _name_weights(program.model.graph, paths, trunk.decoder)
        program.optimize()
    graph: ir.Graph = program.model.graph
    return graph


def _name_weights(graph: ir.Graph, paths: Mapping[int, str], decoder: nn.Module) -> None:
    """Make the weights that `graph` reads inputs, by whole-model name; `paths` are those of modules, by identity."""
    repeated = {id(module) for layer in find_layers(decoder)[1] for module in layer.modules()}
    own = {
        f"decoder.{local}.{name}" if local else f"decoder.{name}": f"{paths[id(module)]}.{name}"
        for local, module in decoder.named_modules()
        for name in (*module._parameters, *(stored_buffers(module) if id(module) in repeated else ()))
    }
    for value in [v for v in graph.initializers.values() if v.name in own]:
        graph.initializers.pop(str(value.name))
        value.name, value.const_value = own[str(value.name)], None
        graph.inputs.append(value)
