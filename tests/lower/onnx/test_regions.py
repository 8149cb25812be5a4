"""Traces that no repetition can say are refused."""

import onnx_ir as ir
import pytest

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.neutral import DOMAIN
from vlmexport.lower.onnx.regions import cut_regions


def neutral(op: str, *inputs: ir.Value, **attributes: int) -> ir.Node:
    return ir.node(op, inputs, attributes, domain=DOMAIN)


def layer(x: ir.Value, index: int) -> list[ir.Node]:
    start = neutral("LayerIn", x, layer=index)
    return [start, neutral("LayerOut", start.outputs[0], layer=index)]


def graph(x: ir.Value, *nodes: ir.Node) -> ir.Graph:
    return ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes)


def test_layers_are_cut_at_their_brackets() -> None:
    x = ir.Value(name="x")
    first = layer(x, 0)
    second = layer(first[-1].outputs[0], 2)
    regions = cut_regions(graph(x, *first, *second))
    assert regions.templates == {0: first, 2: second}


def test_work_between_layers_is_refused() -> None:
    x = ir.Value(name="x")
    first = layer(x, 0)
    between = ir.node("Relu", [first[-1].outputs[0]])
    with pytest.raises(UnsupportedModelError, match="works between its layers"):
        cut_regions(graph(x, *first, between, *layer(between.outputs[0], 1)))


@pytest.mark.parametrize("changed", [False, True])
def test_only_what_goes_straight_into_attention_may_have_lost_its_rotary_embedding(changed: bool) -> None:
    x = ir.Value(name="x")
    start = neutral("LayerIn", x, layer=0)
    rotated = neutral("Rotary", start.outputs[0])
    after = ir.node("Mul", [rotated.outputs[0], x]) if changed else rotated
    attention = neutral("Attention", after.outputs[0], after.outputs[0], x)
    end = neutral("LayerOut", attention.outputs[0], layer=0)
    made = graph(x, start, rotated, *([after] if changed else []), attention, end)
    if not changed:
        assert list(cut_regions(made).templates) == [0]
        return
    with pytest.raises(UnsupportedModelError, match="after their rotary embedding; use --attention standard"):
        cut_regions(made)


def test_what_reads_a_layers_parameter_alone_belongs_to_the_layer() -> None:
    """Wherever it stands: a repeated layer has parameters of its own."""
    x, w = ir.Value(name="x"), ir.Value(name="layers.0.conv.weight")
    squeeze = ir.node("Squeeze", [w])
    start = neutral("LayerIn", x, layer=0)
    conv = ir.node("Conv", [start.outputs[0], squeeze.outputs[0]])
    end = neutral("LayerOut", conv.outputs[0], layer=0)
    made = ir.Graph([x, w], [end.outputs[0]], nodes=[squeeze, start, conv, end])
    assert cut_regions(made, {0: "layers.0"}).templates == {0: [start, squeeze, conv, end]}
    assert cut_regions(made).before == [squeeze]
