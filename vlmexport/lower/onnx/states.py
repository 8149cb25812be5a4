"""States of fixed size in a decoder graph: a convolution's last inputs, and linear attention by the gated delta rule.

Standard ONNX operators, for every dialect whose graphs know which new tokens are padding. A row's padding changes no
state: the present state is that behind the row's last valid token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from vlmexport.lower.onnx.linear import cast, dtype_of
from vlmexport.lower.onnx.neutral import DOMAIN
from vlmexport.lower.onnx.traced_values import required, static

if TYPE_CHECKING:
    from vlmexport.lower.onnx.dialect import Dialect

OPERATORS = ("ConvState", "DeltaRule")
NORM_EPSILON = 1e-6
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def conv_state(x: torch.Tensor, past: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of ``ConvState``: what the convolution reads, and the state behind each row's last valid token.

    `x` ``[B, channels, S]``, `past` ``[B, channels, kernel]``, `valid` bool ``[B, S]`` with one run of ones a row.
    """
    kernel = past.shape[2]
    whole = torch.cat([past, torch.where(valid[:, None], x, 0.0)], dim=2)
    last = valid.shape[1] - 1 - valid.flip(1).long().argmax(dim=1)
    rows = [row[:, end + 1 : end + 1 + kernel] for row, end in zip(whole, last.tolist(), strict=True)]
    return whole, torch.stack(rows)


def delta_rule(
    tensors: list[torch.Tensor], state: torch.Tensor, valid: torch.Tensor, scale: float, normalized: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of ``DeltaRule``: outputs ``[B, S, value heads, value dim]`` and the state after the last valid token.

    `tensors`: queries and keys ``[B, S, key heads, key dim]``, values, the logarithm of the decay and the rate
    ``[B, S, value heads]``; consecutive value heads share a key head. `state` ``[B, value heads, key dim, value dim]``.
    For each valid token t: ``state = exp(g) * state``, then ``state += k (beta (v - k state))``, then ``out = q state``
    (arXiv:2412.06464); queries are scaled, and with `normalized` queries and keys have length 1. `valid`: ``[B, S]``.
    """
    query, key, value, decay, rate = (t.float() for t in tensors)
    if normalized:
        query, key = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + NORM_EPSILON) for t in (query, key))
    query, key = (t.repeat_interleave(value.shape[2] // t.shape[2], dim=2) for t in (query * scale, key))
    decay, rate = torch.where(valid[..., None], decay, 0.0).exp(), torch.where(valid[..., None], rate, 0.0)
    outputs = []
    for t in range(value.shape[1]):
        state = state * decay[:, t, :, None, None]
        change = (value[:, t] - (key[:, t, :, None] @ state).squeeze(2)) * rate[:, t, :, None]
        state = state + key[:, t, :, :, None] * change[:, :, None]
        outputs.append((query[:, t, :, None] @ state).squeeze(2))
    return torch.stack(outputs, dim=1), state


def wide_nodes(graph: ir.Graph) -> frozenset[ir.Node]:
    """The standard nodes of a trace that make the decay and the rate of linear attention out of linears and weights.

    They are computed in float32, as transformers does: what is lost there is lost again with every token.
    """
    waiting = [v for node in graph if node.op_type == "DeltaRule" for v in node.inputs[3:]]
    found: set[ir.Node] = set()
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is not None and node.domain != DOMAIN and node not in found:
            found.add(node)
            waiting.extend(node.inputs)
    return frozenset(found)


@dataclass
class StateEmitter:
    """Emits the operators of layers that keep states.

    `pasts` are the graph's inputs by name. `shared`: what all layers use, made once.
    """

    tape: Tape
    dialect: Dialect
    pasts: dict[str, ir.Value]
    shared: dict[str, ir.Value] = field(default_factory=dict)

    def emit(self, node: ir.Node, inputs: list[ir.Value], layer: int) -> tuple[ir.Value, ir.Value]:
        """The result of the neutral operator `node` on `inputs` for `layer`, and the graph's new output."""
        if node.op_type == "ConvState":
            past = self.pasts[f"past_conv.{layer}"]
            result, present = self._conv(inputs[0], past, static(required(node.inputs[0]), 1))
        else:
            past = self.pasts[f"past_recurrent.{layer}"]
            heads = static(required(node.inputs[1]), 2), static(required(node.inputs[2]), 2)
            result, present = self._delta_rule(node, inputs, past, heads)
        present.name, present.type, present.shape = (
            required(past.name).replace("past", "present", 1),
            past.type,
            past.shape,
        )
        result.type = ir.TensorType(dtype_of(past))
        return result, present

    def _conv(self, x: ir.Value, past: ir.Value, channels: int) -> tuple[ir.Value, ir.Value]:
        """`conv_state`: zeros for padding, and the columns behind each row's last valid token."""
        kind, kernel = dtype_of(past), static(past, 2)
        zero = self._constant("states.zero", 0.0, kind)
        valid = self._once("states.valid.columns", lambda: self.tape.op("Unsqueeze", [self._valid(), self._axes(1)]))
        new = self.tape.op("Where", [valid, cast(self.tape, x, kind), zero])
        whole = self.tape.op("Concat", [past, new], {"axis": 2})
        columns = self._once(f"states.columns.{channels}.{kernel}", lambda: self._columns(channels, kernel))
        return whole, self.tape.op("GatherElements", [whole, columns], {"axis": 2})

    def _columns(self, channels: int, kernel: int) -> ir.Value:
        """int64 ``[B, channels, kernel]``: the `kernel` columns up to each row's last valid token, behind a past."""
        last = self.dialect.last_valid(self.tape)
        offsets = self._constant(f"states.offsets.{kernel}", list(range(1, kernel + 1)), _INT64)
        columns = self.tape.op("Add", [self.tape.op("Unsqueeze", [last, self._axes(1, 2)]), offsets])
        shape = self._constant(f"states.channels.{channels}", [1, channels, 1], _INT64)
        return self.tape.op("Expand", [columns, shape])

    def _delta_rule(
        self, node: ir.Node, inputs: list[ir.Value], past: ir.Value, heads: tuple[int, int]
    ) -> tuple[ir.Value, ir.Value]:
        """`delta_rule` as a Scan over the tokens, in float32."""
        tape = self.tape
        query, key, value, decay, rate = (cast(tape, v, _FLOAT) for v in inputs)
        if node.attributes["normalized"].as_int():
            query, key = self._normalized(query), self._normalized(key)
        scale = node.attributes["scale"].as_float()
        query = tape.op("Mul", [query, self._constant(f"states.scale.{scale:.9g}", scale, _FLOAT)])
        query, key = (self._repeated(v, heads[1] // heads[0], heads[1]) for v in (query, key))
        none = self._constant("states.none", 0.0, _FLOAT)
        valid = self._once("states.valid.tokens", lambda: tape.op("Unsqueeze", [self._valid(), self._axes(2)]))
        decay = tape.op("Exp", [tape.op("Where", [valid, decay, none])])
        rate = tape.op("Where", [valid, rate, none])
        rows = [tape.op("Unsqueeze", [v, self._axes(3)]) for v in (query, key, value)]
        column = tape.op("Unsqueeze", [key, self._axes(4)])
        scalars = [tape.op("Unsqueeze", [v, self._axes(3, 4)]) for v in (decay, rate)]
        scanned = [*rows, column, *scalars]
        attributes: dict[str, Any] = {
            "body": _token(),
            "num_scan_inputs": len(scanned),
            "scan_input_axes": [1] * len(scanned),
            "scan_output_axes": [1],
        }
        present, out = tape.op_multi_out("Scan", [past, *scanned], attributes, num_outputs=2)
        return tape.op("Squeeze", [out, self._axes(3)]), present

    def _normalized(self, x: ir.Value) -> ir.Value:
        """Heads ``[B, S, heads, dim]`` divided by their lengths."""
        epsilon = self._constant("states.epsilon", NORM_EPSILON, _FLOAT)
        squares = self.tape.op("ReduceSum", [self.tape.op("Mul", [x, x]), self._axes(-1)], {"keepdims": 1})
        return self.tape.op("Div", [x, self.tape.op("Sqrt", [self.tape.op("Add", [squares, epsilon])])])

    def _repeated(self, x: ir.Value, times: int, heads: int) -> ir.Value:
        """Heads ``[B, S, heads / times, dim]``, each `times` times, one copy behind the other."""
        if times == 1:
            return x
        copies = self._constant(f"states.copies.{times}", [1, 1, 1, times, 1], _INT64)
        shape = self._constant(f"states.heads.{heads}", [0, 0, heads, -1], _INT64)
        wide = self.tape.op("Expand", [self.tape.op("Unsqueeze", [x, self._axes(3)]), copies])
        return self.tape.op("Reshape", [wide, shape])

    def _valid(self) -> ir.Value:
        """Bool ``[B, S]``: is a new token not padding?"""
        return self._once("states.valid", lambda: self.dialect.new_valid(self.tape))

    def _axes(self, *axes: int) -> ir.Value:
        return self._constant(f"states.axes.{'.'.join(map(str, axes))}", list(axes), _INT64)

    def _constant(self, name: str, value: float | list[int], kind: ir.DataType) -> ir.Value:
        key = f"{name}.{kind}"
        if key not in self.shared:
            self.shared[key] = self.tape.initializer(ir.tensor(value, dtype=kind, name=key))
        return self.shared[key]

    def _once(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


def _token() -> ir.Graph:
    """One token of the gated delta rule: state, query and key rows, values, key column, decay and rate in.

    Its names are of no value outside: a name may not be given twice.
    """
    tape = Tape()
    names = ("state", "query", "key", "value", "key_column", "decay", "rate")
    state, query, key, value, column, decay, rate = inputs = [
        ir.Value(name=f"delta_rule.{name}", type=ir.TensorType(_FLOAT)) for name in names
    ]
    faded = tape.op("Mul", [state, decay])
    change = tape.op("Mul", [tape.op("Sub", [value, tape.op("MatMul", [key, faded])]), rate])
    present = tape.op("Add", [faded, tape.op("MatMul", [column, change])])
    out = tape.op("MatMul", [query, present])
    for index, made in enumerate(node.outputs[0] for node in tape.nodes):
        made.name, made.type = f"delta_rule.{index}", ir.TensorType(_FLOAT)
    return ir.Graph(inputs, [present, out], nodes=tape.nodes, initializers=[], name="delta_rule")
