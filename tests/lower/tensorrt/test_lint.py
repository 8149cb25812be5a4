"""The lint of graphs for TensorRT: every rule red and green, and each verdict compared with TensorRT for RTX itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.lower.tensorrt.graphs import part_of, write_decoder
from tests.lower.tensorrt.lint_examples import EXAMPLES, Example
from tests.lower.tensorrt.lint_graphs import dequantize, scatter, text, unary
from vlmexport.engines import ShapeProfile, TrtLimits, decoder_profiles
from vlmexport.errors import ArtifactError, UnsupportedModelError
from vlmexport.lower.onnx.versions import ir_version
from vlmexport.lower.tensorrt import operators
from vlmexport.lower.tensorrt.lint import GRAPH_RULES, RULES, Finding, lint_graph, require_clean

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
by_name = pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
# Rules whose examples need a folder or a profile, tested below.
_WITH_SURROUNDINGS = {"profile", "external-data", "node-name"}


def lint(model: onnx.ModelProto, folder: Path, **kwargs: Any) -> tuple[Finding, ...]:
    path = folder / "graph.onnx"
    onnx.save(model, path)
    return lint_graph(path, **kwargs)


def rules(findings: tuple[Finding, ...], severity: str) -> set[str]:
    return {f.rule for f in findings if f.severity == severity}


@by_name
def test_finds_what_the_example_says(example: Example, tmp_path: Path) -> None:
    findings = lint(example.make(), tmp_path)
    assert rules(findings, "error") == set(example.rules), [str(f) for f in findings]
    assert rules(findings, "warning") == set(example.warnings), [str(f) for f in findings]
    assert bool(example.rules) == (example.verdict != "builds")


@needs_rtx
@by_name
def test_agrees_with_tensorrt(example: Example) -> None:
    refusal = refusal_of(example.make())
    assert (refusal == "") == (example.verdict != "refused"), refusal


def test_every_rule_has_a_red_and_a_green_example() -> None:
    named = {rule for e in EXAMPLES for rule in (*e.rules, *e.warnings)}
    assert {r.name for r in (*RULES, *GRAPH_RULES)} - named == _WITH_SURROUNDINGS
    clean = {node.op_type for e in EXAMPLES if not e.rules for node in e.make().graph.node}
    for rule in RULES:
        assert not rule.ops or clean & set(rule.ops), f"{rule.name} is never green"


@needs_rtx
def test_operator_table_is_the_installed_parsers() -> None:
    import tensorrt_rtx as trt

    if trt.__version__ != operators.READ_FROM.rsplit(maxsplit=1)[-1]:
        pytest.skip(f"the table was read from {operators.READ_FROM}, here is {trt.__version__}")
    builder, network, parser, _ = _trt()
    names = {s.name for s in onnx.defs.get_all_schemas() if s.domain == ""}
    assert {n for n in names if not parser.supports_operator(n)} == operators.NOT_IMPORTED
    assert all(parser.supports_operator(n) for n in (operators.MORE_IMPORTED | operators.NEEDS_PLUGIN.keys()))
    del parser, network, builder


@needs_rtx
def test_type_table_is_the_installed_parsers() -> None:
    read = set()
    for dtype in onnx.TensorProto.DataType.values()[1:]:
        value = [onnx.helper.make_tensor_value_info(n, dtype, [2]) for n in "xy"]
        node = onnx.helper.make_node("Identity", ["x"], ["y"])
        graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
        if not parse_errors(model.SerializeToString()):
            read.add(dtype)
    assert read == operators.READ_TYPES


@pytest.mark.slow
@needs_rtx
def test_agrees_on_onnx_own_node_tests(tmp_path: Path) -> None:
    """Of ONNX's node tests, the lint refuses none that parses but for known reasons, and misses few that do not."""
    from onnx.backend.test.case.node import collect_testcases

    with np.errstate(all="ignore"):
        cases = [c for c in collect_testcases(None) if c.model is not None]
    build_or_meaning = {"attention-kernel", "attention-inputs", "fp16-norm", "fp16-softmax", "attention-mask", "opset"}
    build_or_meaning |= {"scatter-memory", "scatter-length", "zero-point", "operator", "quantized-constant"}
    missed = []
    for case in cases:
        errors = rules(lint(case.model, tmp_path), "error")
        parses = not parse_errors(case.model.SerializeToString())
        assert not parses or errors <= build_or_meaning, (case.name, errors)
        if not parses and not errors:
            missed.append(case.name)
    assert len(cases) > 1500
    assert len(missed) < 0.04 * len(cases), missed


def test_a_decoder_in_the_dialect_is_clean(tmp_path: Path) -> None:
    path = write_decoder(tmp_path)
    profiles = decoder_profiles(part_of(path), TrtLimits(max_batch=2, max_seq=48, max_images=1))
    assert require_clean(path, profile=profiles) == ()


def test_a_profile_longer_than_the_cache(tmp_path: Path) -> None:
    path = write_decoder(tmp_path)
    profiles = decoder_profiles(part_of(path), TrtLimits(max_batch=2, max_seq=49, max_images=1))
    with pytest.raises(
        UnsupportedModelError, match=r"writes 49 slots in profile prefill, its cache has 48.*1 of 4 errors"
    ):
        require_clean(path, profile=profiles)


def test_int4_on_a_gpu_without_it(tmp_path: Path) -> None:
    assert rules(lint(dequantize(), tmp_path, weights=("fp16", "int8")), "error") == {"quantized-codes"}
    assert not lint(dequantize(), tmp_path, weights=("fp16", "int4"))


@needs_rtx
def test_int4_is_refused_for_sm75() -> None:
    assert "int4" in refusal_of(dequantize(), "SM75")


def profile(**shapes: tuple[tuple[int, ...], ...]) -> tuple[ShapeProfile, ...]:
    return (ShapeProfile("p", dict(shapes)),)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({}, "no range for the dynamic axes of x [-1, 16]"),
        ({"x": ((1, 16), (2, 16), (4, 16)), "z": ((1,), (1,), (1,))}, "a shape for z, which is no input"),
        ({"x": ((1, 16), (2, 17), (4, 16))}, "gives x [2, 17], the graph [-1, 16]"),
        ({"x": ((1,), (2,), (4,))}, "gives x [1], the graph [-1, 16]"),
        ({"x": ((1, 16), (8, 16), (4, 16))}, "no rising range"),
    ],
)
def test_profiles(shapes: Any, reason: str, tmp_path: Path) -> None:
    (finding,) = lint(unary("Relu"), tmp_path, profile=profile(**shapes))
    assert (finding.rule, finding.severity) == ("profile", "error")
    assert reason in finding.reason
    assert not lint(unary("Relu"), tmp_path, profile=profile(x=((1, 16), (2, 16), (4, 16))))


def test_an_input_without_a_name(tmp_path: Path) -> None:
    model = unary("Relu")
    model.graph.input[0].name = ""
    findings = lint(model, tmp_path)
    assert "input 0 has no name" in {f.reason for f in findings if f.rule == "value"}


def external(folder: Path, location: str, length: int = 64) -> onnx.ModelProto:
    model = text(
        "g (float[16] x) => (float[16] y) { y = Add(x, w) }", numpy_helper.from_array(np.ones(16, np.float32), "w")
    )
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location, 0, length)
    tensor.ClearField("raw_data")
    (folder / "graph.data").write_bytes(b"\0" * 64)
    return model


@pytest.mark.parametrize(
    ("location", "length", "reason"),
    [
        ("graph.data", 65, "ends at byte 65, graph.data has 64"),
        ("gone.data", 64, "gone.data is missing"),
        ("../graph.data", 64, "outside of the graph's folder"),
        ("/etc/passwd", 64, "outside of the graph's folder"),
        ("C:\\graph.data", 64, "outside of the graph's folder"),
    ],
)
def test_external_data(location: str, length: int, reason: str, tmp_path: Path) -> None:
    (finding,) = lint(external(tmp_path, location, length), tmp_path)
    assert (finding.node, finding.rule, finding.severity) == ("w", "external-data", "error")
    assert reason in finding.reason
    assert not lint(external(tmp_path, "graph.data"), tmp_path)


def test_a_link_out_of_the_folder(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 64)
    (inner / "link.data").symlink_to(tmp_path / "secret")
    (finding,) = lint(external(inner, "link.data"), inner)
    assert "outside" in finding.reason


def test_a_zero_point_in_the_external_data_is_a_warning(tmp_path: Path) -> None:
    model = dequantize(zero=1)
    (tmp_path / "graph.data").write_bytes(b"\0" * 64)
    zero = next(t for t in model.graph.initializer if t.name == "z")
    length = len(zero.raw_data)
    onnx.external_data_helper.set_external_data(zero, "graph.data", 0, length)
    zero.ClearField("raw_data")
    (finding,) = lint(model, tmp_path)
    assert (finding.rule, finding.severity) == ("zero-point", "warning")


def test_two_nodes_of_one_name(tmp_path: Path) -> None:
    model = text("g (float[4] x) => (float[4] y) { a = Relu(x) y = Neg(a) }")
    for node in model.graph.node:
        node.name = "same"
    assert rules(lint(model, tmp_path), "warning") == {"node-name"}


def test_functions_are_looked_into(tmp_path: Path) -> None:
    body = '<domain: "foo", opset_import: ["" : 24]> Bar (x) => (y) { y = %s(x) }'
    graph = (
        '<ir_version: 11, opset_import: ["" : 24, "foo" : 1]> g (float[b,16] x) => (float[b,16] y) { y = foo.Bar(x) }'
    )
    assert not lint(onnx.parser.parse_model(f"{graph} {body % 'Relu'}"), tmp_path)
    assert rules(lint(onnx.parser.parse_model(f"{graph} {body % 'Bernoulli'}"), tmp_path), "error") == {"operator"}


def test_errors_come_first_and_name_the_node(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(scatter(axis=1, mode="circular"), path)
    with pytest.raises(UnsupportedModelError) as caught:
        require_clean(path)
    line, second = str(caught.value).splitlines()
    assert "graph.onnx is not for TensorRT: TensorScatter scatter: TensorScatter with mode=circular [attribute]" in line
    assert line.endswith("(1 of 2 errors)")
    assert second.startswith("graph.onnx: TensorScatter scatter: ")


def test_every_error_is_listed_up_to_eight(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    chain = " ".join(f"y{i} = Bernoulli({f'y{i - 1}' if i else 'x'})" for i in range(11))
    model = text(f"g (float[4] x) => (float[4] y10) {{ {chain} }}")
    for index, node in enumerate(model.graph.node):
        node.name = f"n{index}"
    onnx.save(model, path)
    with pytest.raises(UnsupportedModelError) as caught:
        require_clean(path)
    first, *more = str(caught.value).splitlines()
    assert first.startswith("graph.onnx is not for TensorRT: Bernoulli n0: ") and first.endswith("(1 of 11 errors)")
    assert [line.split(": ")[1] for line in more[:-1]] == [f"Bernoulli n{i}" for i in range(1, 8)]
    assert more[-1] == "graph.onnx: and 3 more"


@pytest.mark.parametrize(("ir", "rules_found"), [(ir_version(23), set()), (ir_version(24), set()), (13, {"version"})])
def test_ir_versions_that_were_measured_are_not_warned_about(ir: int, rules_found: set[str], tmp_path: Path) -> None:
    model = text("g (float[4] x) => (float[4] y) { y = Relu(x) }", ir=ir)
    assert rules(lint(model, tmp_path), "warning") == rules_found


def test_warnings_do_not_stop(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(unary("Relu", "double"), path)
    assert {f.severity for f in require_clean(path)} == {"warning"}


@pytest.mark.parametrize("content", [b"", b"no graph at all"])
def test_what_is_no_graph(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"graph\.onnx"):
        lint_graph(path)
    with pytest.raises(ArtifactError, match=r"gone\.onnx"):
        lint_graph(tmp_path / "gone.onnx")


def test_nonsense_is_reported_not_raised(tmp_path: Path) -> None:
    model = dequantize(axis=0)
    model.graph.input[0].type.tensor_type.elem_type = 99
    model.graph.node[0].attribute[0].i = -7
    assert {"value", "types"} <= rules(lint(model, tmp_path), "error")


@needs_rtx
def test_nonpad_kv_seqlen_reaches_no_layer() -> None:
    example = next(e for e in EXAMPLES if e.name == "length without padding")
    builder, network, parser, _ = _trt()
    assert parser.parse(example.make().SerializeToString())
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    fed = {layer.get_input(i).name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i)}
    assert {"q", "k", "v"} & fed
    assert "n" not in fed
    del parser, network, builder


def _trt() -> tuple[Any, Any, Any, list[str]]:
    """A builder with an empty network, its parser, and the errors that they log; the parser outlives neither."""
    import tensorrt_rtx as trt

    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    return builder, network, trt.OnnxParser(network, log), errors


def _errors(parser: Any) -> list[Any]:
    return [parser.get_error(i) for i in range(parser.num_errors)]


def parse_errors(model: bytes) -> str:
    """What the parser says against a model; empty when it takes it."""
    builder, network, parser, _ = _trt()
    said = "" if parser.parse(model) else "; ".join(e.desc() for e in _errors(parser)) or "refused"
    del parser, network, builder
    return said


def refusal_of(model: onnx.ModelProto, capability: str = "SM80") -> str:
    """What the parser or the build says against a model; empty when it builds."""
    import tensorrt_rtx as trt

    builder, network, parser, errors = _trt()
    if not parser.parse(model.SerializeToString()):
        return "; ".join(e.desc() for e in _errors(parser)) or "refused"
    config, ranges = builder.create_builder_config(), builder.create_optimization_profile()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        if tensor.is_shape_tensor:
            ranges.set_shape_input(tensor.name, [1], [2], [4])
        elif -1 in tuple(tensor.shape):
            ranges.set_shape(tensor.name, *([n if d == -1 else d for d in tensor.shape] for n in (1, 2, 4)))
    config.add_optimization_profile(ranges)
    return "" if builder.build_serialized_network(network, config) is not None else "; ".join(errors) or "refused"
