"""Engines by the real TensorRT for RTX, without a GPU; `test_worker` has the ways in which a build can fail."""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from tests.lower.tensorrt.graphs import decoder_graph, part_of, write_decoder
from vlmexport.engines import (
    EngineSpec,
    ShapeProfile,
    Sidecar,
    TrtLimits,
    check_sidecar,
    decoder_profiles,
    engine_files,
    graph_digests,
)
from vlmexport.errors import BadInputError, NotPossibleHereError, UnsupportedModelError
from vlmexport.gpu import RTX_PORTABLE, load_gpu
from vlmexport.lower.tensorrt.build import build_engine, build_engines, rtx_version
from vlmexport.progress import SilentProgress

pytestmark = pytest.mark.skipif(rtx_version() is None, reason="TensorRT for RTX is not installed")
LIMITS = TrtLimits(2, 48, 1)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("int4"))


def spec_of(graph: Path, name: str = "decoder") -> EngineSpec:
    return EngineSpec(name, "decoder", decoder_profiles(part_of(graph), LIMITS))


def refusal(graph: Path, target: str, kind: type[Exception], spec: EngineSpec | None = None) -> str:
    out = graph.parent / "refused" / "decoder.engine"
    with pytest.raises(kind) as caught:
        build_engine(graph, spec or spec_of(graph), [target], out)
    assert list(out.parent.iterdir()) == []
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_export_gets_its_engines_with_sidecars(tmp_path: Path) -> None:
    graph = write_decoder(tmp_path)
    part = part_of(graph)
    prefill, decode = decoder_profiles(part, LIMITS)
    both = EngineSpec("decoder", "decoder", (prefill, decode))
    (built,) = build_engines(tmp_path, [both], {"decoder": part}, load_gpu("a100"), SilentProgress())
    assert built.path == tmp_path / "engines" / "sm80" / "decoder.engine"
    assert (built.place, built.version) == ("sm80", rtx_version())
    assert engine_files(tmp_path) == [built.path]
    assert Sidecar.read(built.path) == built.sidecar
    sidecar = check_sidecar(
        built.path, flavour="rtx", version=built.version, compute_capability="8.0", graph=graph
    )  # fmt: skip
    assert (sidecar.compute_capabilities, sidecar.gpu, sidecar.spec) == (("8.0",), "a100-80", both)
    assert sidecar.graph == graph_digests(graph)
    result = built.result
    assert result.bytes == sidecar.bytes == built.path.stat().st_size
    assert result.layers > 200
    assert 0 < result.cpu_seconds < 60
    assert result.seconds > 0
    assert 100e6 < result.peak_rss < 500e6
    assert sorted(p.name for p in built.path.parent.iterdir()) == ["decoder.engine", "decoder.engine.json"]


def test_a_portable_engine_serves_every_architecture_with_int4(tmp_path: Path) -> None:
    graph = write_decoder(tmp_path)
    spec = spec_of(graph)
    (built,) = build_engines(tmp_path, [spec], {"decoder": part_of(graph)}, None, SilentProgress())
    assert built.place == "portable"
    assert (built.sidecar.compute_capabilities, built.sidecar.gpu) == (RTX_PORTABLE, "")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["SM80", "SM86", "SM89", "SM120", "SM121"])
@pytest.mark.parametrize("window", [0, 8])
def test_int4_builds_for_every_architecture_that_has_it(tmp_path: Path, target: str, window: int) -> None:
    graph = write_decoder(tmp_path, window=window)
    assert build_engine(graph, spec_of(graph), [target], tmp_path / "decoder.engine").bytes > 1e6


@pytest.mark.slow
@pytest.mark.parametrize("target", ["SM75", "SM80", "SM86", "SM89", "SM120", "SM121"])
def test_fp16_builds_for_every_architecture(tmp_path: Path, target: str) -> None:
    graph = write_decoder(tmp_path, weights="fp16")
    assert build_engine(graph, spec_of(graph), [target], tmp_path / "decoder.engine").bytes > 1e6


@pytest.mark.slow
def test_each_profile_can_have_an_engine_of_its_own(tmp_path: Path) -> None:
    graph = write_decoder(tmp_path)
    part = part_of(graph)
    specs = [EngineSpec(f"decoder_{p.name}", "decoder", (p,)) for p in decoder_profiles(part, LIMITS)]
    built = build_engines(tmp_path, specs, {"decoder": part}, load_gpu("l4"), SilentProgress())
    assert [engine.path.name for engine in built] == ["decoder_prefill.engine", "decoder_decode.engine"]


@pytest.mark.parametrize("target", ["SM90", "SM100", "CURRENT"])
def test_an_architecture_that_it_does_not_build_for_is_refused(graph: Path, target: str) -> None:
    line = refusal(graph, target, NotPossibleHereError)
    assert f"builds nothing for {target}; it builds for SM75, SM80, SM86, SM89, SM120, SM121" in line


def test_int4_for_sm75_is_refused(graph: Path) -> None:
    line = refusal(graph, "SM75", BadInputError)
    assert line == (
        "TensorRT for RTX cannot build decoder.onnx for SM75: it has no INT4 weights there; "
        "choose --quant int8 or fp16"
    )  # fmt: skip


def test_a_gpu_without_a_target_is_refused_before_anything_is_built(graph: Path) -> None:
    with pytest.raises(NotPossibleHereError, match=r"compute capability 9\.0, which TensorRT for RTX does not build"):
        build_engines(graph.parent, [spec_of(graph)], {"decoder": part_of(graph)}, load_gpu("h100"), SilentProgress())
    assert not (graph.parent / "engines").exists()


def test_what_the_parser_refuses_is_named_with_its_reason(tmp_path: Path) -> None:
    model = decoder_graph()
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(helper.make_attribute("softmax_precision", 1))
    graph = tmp_path / "decoder.onnx"
    onnx.save(model, graph)
    line = refusal(graph, "SM80", UnsupportedModelError)
    assert re.fullmatch(
        r"TensorRT for RTX cannot read decoder\.onnx at Attention node 'node_Attention_\d+': "
        r"Setting softmax precision is not supported in TensorRT Attention\. \(and 1 more\)",
        line,
    )


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    graph = tmp_path / "decoder.onnx"
    graph.write_bytes(b"garbage" * 30)
    line = refusal(graph, "SM80", UnsupportedModelError, EngineSpec("decoder", "decoder", ()))
    assert line.endswith("cannot read decoder.onnx: Failed to parse the ONNX model.")


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        ("past_key_values.0.key", ((1, 2, 47, 16),) * 3, "Dimension mismatch for tensor past_key_values.0.key"),
        ("inputs_embeds", ((1, 4, 64), (1, 2, 64), (1, 48, 64)), "profiles satisfy MIN<=OPT<=MAX"),
        ("inputs_embeds", ((1, 4), (1, 4), (1, 4)), "has 3 dimensions but profile 0 has 2 dimensions"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(graph: Path, name: str, shapes: Any, words: str) -> None:
    right = spec_of(graph).profiles[0].shapes
    spec = EngineSpec("decoder", "decoder", (ShapeProfile("prefill", {**right, name: shapes}),))
    assert words in refusal(graph, "SM80", BadInputError, spec)
