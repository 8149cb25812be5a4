"""Rules of the lint that hold for any operator: which it is, its types, attributes and constants, and FP16 norms.

What each says of the parser was measured with the version in `operators.READ_FROM`; the tests build every example.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from vlmexport.lower.tensorrt import operators
from vlmexport.lower.tensorrt.lint_view import GraphRule, Problem, Request, Rule, Site, type_name

_STANDARD = ("", "ai.onnx")
# Opset and IR version that everything here was measured with; later ones parse too.
_NEWEST_OPSET, _NEWEST_IR = 24, 12
_NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "GroupNormalization",
    "InstanceNormalization",
    "MeanVarianceNormalization",
    "LpNormalization",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
_SQUARING_REDUCTIONS = ("ReduceL2", "ReduceSumSquare")
_REDUCTIONS = ("ReduceMean", "ReduceSum")


def operator(site: Site) -> Iterator[Problem]:
    """An operator that the parser has no importer for, or only one that asks for what is not shipped."""
    node, standard = site.node, site.node.domain in _STANDARD
    name = node.op_type if standard else f"{node.domain}.{node.op_type}"
    if node.op_type in operators.NEEDS_PLUGIN:
        yield Problem("error", f"{name}: {operators.NEEDS_PLUGIN[node.op_type]}", "compute it outside of the graph")
    elif not _imported(node.op_type):
        yield Problem("error", f"TensorRT has no importer for {name}", "write it in standard operators it has")
    elif node.domain == "com.microsoft" and node.op_type in operators.MISTAKEN:
        yield Problem(
            "error",
            f"TensorRT takes {name} for the standard {node.op_type}, which has other inputs",
            f"write the standard {node.op_type}",
        )
    elif not standard or node.op_type in operators.MORE_IMPORTED:
        yield Problem(
            "warning",
            f"{name} is no standard operator: TensorRT goes by its name alone, and other runtimes may not know it",
            "write it in standard operators",
        )


def _imported(op_type: str) -> bool:
    if op_type in operators.MORE_IMPORTED:
        return True
    return op_type not in operators.NOT_IMPORTED and onnx.defs.has(op_type)


def not_in_opset(site: Site) -> Iterator[Problem]:
    """An operator, or an attribute of it, that the graph's opset lacks. TensorRT does not look; ONNX Runtime does."""
    node = site.node
    if node.domain not in _STANDARD or not onnx.defs.has(node.op_type):
        return
    opset = site.request.opsets.get("", 0)
    try:
        schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=opset, domain="")
    except onnx.defs.SchemaError:
        since = min(s.since_version for s in onnx.defs.get_all_schemas_with_history() if s.name == node.op_type)
        yield _not_onnx(f"{node.op_type} is not in opset {opset}", since)
        return
    for attribute in node.attribute:
        if attribute.name not in schema.attributes:
            yield _not_onnx(f"{node.op_type} has no attribute {attribute.name} in opset {opset}", _NEWEST_OPSET)
    if len(node.input) > schema.max_input:
        yield _not_onnx(f"{node.op_type} has {schema.max_input} inputs in opset {opset}, here {len(node.input)}", 24)
    codes = (TensorProto.INT4, TensorProto.UINT4)
    if opset < 21 and any(site.dtype(i) in codes for i in range(len(node.input))):
        yield _not_onnx(f"opset {opset} has no 4-bit tensors", 21)


def _not_onnx(what: str, needed: int) -> Problem:
    return Problem(
        "error",
        f"{what}: the file is not valid ONNX, and ONNX Runtime refuses it though TensorRT does not look",
        f"export with opset {needed} or later",
    )


def refused_type(site: Site) -> Iterator[Problem]:
    """A cast to, or a constant of, a data type that TensorRT has not."""
    node = site.node
    for key in ("to", "dtype", "output_dtype"):
        wanted = site.attributes.get(key)
        if isinstance(wanted, int) and wanted and wanted not in operators.READ_TYPES:
            yield Problem("error", f"TensorRT has no {type_name(wanted)}", "use FLOAT16, FLOAT, INT32, INT64 or BOOL")
    if node.op_type == "Constant":
        tensor = site.view.constant_tensor(node.output[0])
        if tensor is None and not set(site.attributes) & {"value_float", "value_floats", "value_int", "value_ints"}:
            yield Problem("error", "TensorRT has constants of numbers only", "write the constant as a dense tensor")
        elif tensor is not None and tensor.data_type not in operators.READ_TYPES:
            yield Problem("error", f"TensorRT has no {type_name(tensor.data_type)}", "store it as INT32 or INT64")


def uint8(site: Site) -> Iterator[Problem]:
    """UINT8 anywhere but in a graph's inputs and outputs, beside a cast, and after QuantizeLinear."""
    node, view = site.node, site.view
    for name in node.input:
        if view.dtype(name) != TensorProto.UINT8 or view.constant_tensor(name) is not None:
            continue
        if node.op_type not in operators.READS_UINT8:
            yield Problem("error", f"{node.op_type} of the UINT8 {name}", "cast it to FLOAT16 or INT32 first")
    for name in node.output if node.op_type != "QuantizeLinear" else ():
        if view.dtype(name) == TensorProto.UINT8 and name not in view.outputs:
            yield Problem("error", f"{name} is UINT8, which is no type of tensors inside a graph", "make it INT32")


def codes_read(site: Site) -> Iterator[Problem]:
    """INT4 or INT8 weights that something other than DequantizeLinear reads."""
    if site.node.op_type in operators.READS_CODES:
        return
    for name in site.node.input:
        tensor = site.view.initializers.get(name)
        if tensor is None or tensor.data_type not in (TensorProto.INT4, TensorProto.INT8):
            continue
        if tensor.dims or tensor.data_type == TensorProto.INT4:
            yield Problem(
                "error",
                f"{site.node.op_type} of the {type_name(tensor.data_type)} weights {name}: only DequantizeLinear may "
                "read them",
                "dequantize them first",
            )


def one_output(site: Site) -> Iterator[Problem]:
    """A second output of an operator that is imported with one."""
    if len([o for o in site.node.output if o]) > 1:
        yield Problem("error", f"TensorRT imports {site.node.op_type} with one output", "drop its other outputs")


def attribute_values(site: Site) -> Iterator[Problem]:
    """An attribute's value that the parser refuses."""
    op, values = site.node.op_type, site.attributes
    for name, value in values.items():
        allowed = operators.ATTRIBUTE_VALUES.get((op, name))
        if allowed is not None and value not in allowed:
            choices = ", ".join(map(str, allowed))
            yield Problem("error", f"{op} with {name}={value}", f"use {name}={choices}")
    if op in operators.NO_DILATION and any(d != 1 for d in values.get("dilations", [])):
        yield Problem("error", f"{op} with dilations {list(values['dilations'])}", "use dilations of 1")
    integer = site.dtype(0) in (None, TensorProto.INT32, TensorProto.INT64)
    if op == "Mod" and not values.get("fmod", 0) and not integer:
        yield Problem("error", f"Mod of {type_name(site.dtype(0))} with fmod=0", "use fmod=1, or INT32 or INT64")


def constant_inputs(site: Site) -> Iterator[Problem]:
    """Axes and scales that must be known when the engine is built."""
    op, view = site.node.op_type, site.view
    name = site.input(operators.CONSTANT_INPUTS.get(op, operators.INNER_INPUTS.get(op, len(site.node.input))))
    if not name:
        return
    if name in view.inputs:
        yield Problem("error", f"{op} takes {name} from an input of the graph", "make it an initializer")
    elif op in operators.CONSTANT_INPUTS and not _constant_or_cast(site, name):
        yield Problem("error", f"{op} computes {name}, which must be a constant", "make it an initializer")


def _constant_or_cast(site: Site, name: str) -> bool:
    while site.view.constant_tensor(name) is None:
        node = site.view.producers.get(name)
        if node is None or node.op_type not in ("Cast", "Identity"):
            return False
        name = node.input[0]
    return True


def fp16_norm(site: Site) -> Iterator[Problem]:
    """A norm in FP16: squares of values above 255 are above 65504 (TensorRT-LLM 3223; TensorRT 4723, 2709).

    RTX 1.7.1 imports RMSNormalization with squares in FP32, but LayerNormalization and norms that are written out in
    the type they come in; all are refused alike, as TensorRT promises it of none.
    """
    op = site.node.op_type
    if site.dtype(0) != TensorProto.FLOAT16:
        return
    if op in _REDUCTIONS and not _is_square(site, site.input(0)):
        return
    yield Problem(
        "error",
        f"{op} computes in FP16: values above 65504 overflow (TensorRT-LLM 3223)",
        "cast to FP32 around it",
    )


def _is_square(site: Site, name: str) -> bool:
    """Whether the tensor is x * x or x ** 2."""
    node = site.view.producers.get(name)
    if node is None or len(node.input) != 2:
        return False
    if node.op_type == "Mul":
        return str(node.input[0]) == str(node.input[1])
    exponent = site.view.constant(node.input[1])
    return node.op_type == "Pow" and exponent is not None and bool(np.all(exponent == 2))


def fp16_softmax(site: Site) -> Iterator[Problem]:
    """Softmax in FP16 outside of Attention."""
    if site.dtype(0) == TensorProto.FLOAT16:
        yield Problem(
            "error",
            f"{site.node.op_type} computes in FP16: values above 65504 overflow (TensorRT-LLM 3223)",
            "cast to FP32 around it, or use Attention",
        )


def norm_scale(site: Site) -> Iterator[Problem]:
    """Scale and bias of a norm that are of another type than its input."""
    for index in (1, 2):
        found, wanted = site.dtype(index), site.dtype(0)
        if None not in (found, wanted) and found != wanted:
            yield Problem(
                "error",
                f"{site.node.op_type} of {type_name(wanted)} with {type_name(found)} {site.input(index)}",
                f"store it as {type_name(wanted)}",
            )


def data_dependent_loop(site: Site) -> Iterator[Problem]:
    """Control flow, which parses; what of it depends on data costs synchronizations at every step."""
    yield Problem(
        "warning",
        f"{site.node.op_type} parses, but kernels are not fused across it",
        "unroll it, or move the decision to the caller",
    )


def versions(request: Request) -> Iterator[tuple[str, Problem]]:
    """Opset and IR version against what was measured."""
    opset, newest = request.opsets.get("", 0), onnx.defs.onnx_opset_version()
    if opset > newest:
        yield "opset", Problem("error", f"opset {opset} is not one of ONNX's, which ends at {newest}", "use opset 24")
    elif opset > _NEWEST_OPSET:
        yield "opset", Problem("warning", f"opset {opset} was not measured with TensorRT", f"use opset {_NEWEST_OPSET}")
    if request.model.ir_version > _NEWEST_IR:
        found = request.model.ir_version
        yield "ir_version", Problem("warning", f"IR version {found} was not measured", f"use {_NEWEST_IR}")


_LIMITED = tuple(sorted({op for op, _ in operators.ATTRIBUTE_VALUES} | operators.NO_DILATION | {"Mod"}))

RULES = (
    Rule("operator", (), operator),
    Rule("opset", (), not_in_opset),
    Rule("type", (), refused_type),
    Rule("uint8", (), uint8),
    Rule("quantized-constant", (), codes_read),
    Rule("outputs", tuple(sorted(operators.ONE_OUTPUT)), one_output),
    Rule("attribute", _LIMITED, attribute_values),
    Rule("constant-input", (*operators.CONSTANT_INPUTS, *operators.INNER_INPUTS), constant_inputs),
    Rule("fp16-norm", (*_NORMS, *_SQUARING_REDUCTIONS, *_REDUCTIONS), fp16_norm),
    Rule("fp16-softmax", ("Softmax", "LogSoftmax"), fp16_softmax),
    Rule("norm-scale", ("LayerNormalization", "GroupNormalization", "InstanceNormalization"), norm_scale),
    Rule("control-flow", ("If", "Loop", "Scan"), data_dependent_loop),
)
GRAPH_RULES = (GraphRule("version", versions),)
