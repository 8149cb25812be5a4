import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from tests.lower.tensorrt.graphs import part_of, write_decoder
from vlmexport.engines import (
    EngineSpec,
    Sidecar,
    TrtLimits,
    built_facts,
    check_sidecar,
    decoder_profiles,
    engine_files,
    engine_path,
    graph_digests,
    sidecar_faults,
    sidecar_path,
    sm_name,
    specs_of,
    static_capacity,
    tensorrt_facts,
)
from vlmexport.errors import ArtifactError
from vlmexport.manifest import file_sha256

HERE: dict[str, Any] = {"flavour": "rtx", "version": "1.7.1.116", "compute_capability": "8.0"}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_decoder(tmp_path)


@pytest.fixture
def engine(graph: Path) -> Path:
    path = engine_path(graph.parent, "sm80", "decoder")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"engine")
    spec = EngineSpec("decoder", "decoder", decoder_profiles(part_of(graph), TrtLimits(2, 48, 1)))
    digest = file_sha256(path)
    Sidecar("rtx", "1.7.1.116", ("8.0",), "a100-80", spec, graph_digests(graph), digest, 6).write(path)
    return path


def edit(path: Path, changes: dict[str, Any]) -> None:
    file = sidecar_path(path)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(engine: Path, graph: Path | None = None, **here: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        check_sidecar(engine, **{**HERE, **here}, graph=graph)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_right_engine_of_the_right_graph_is_accepted(engine: Path, graph: Path) -> None:
    sidecar = check_sidecar(engine, **HERE, graph=graph)
    assert sidecar == Sidecar.read(engine)
    assert [p.name for p in sidecar.spec.profiles] == ["prefill", "decode"]
    assert engine_files(graph.parent) == engine_files(graph.parent, "sm80") == [engine]
    assert engine_files(graph.parent, "sm86") == []


def test_a_portable_engine_is_accepted_by_each_of_its_gpus(engine: Path) -> None:
    replace(Sidecar.read(engine), compute_capabilities=("8.0", "12.0"), gpu="").write(engine)
    assert check_sidecar(engine, **{**HERE, "compute_capability": "12.0"}, graph=None)
    assert "was built for 8.0 and 12.0, this GPU is 8.9: " in refusal(engine, compute_capability="8.9")


def test_another_gpu_is_refused(engine: Path) -> None:
    line = refusal(engine, compute_capability="8.6", gpu="NVIDIA A10")
    assert "was built for 8.0 (a100-80), this GPU is 8.6 (NVIDIA A10): build the engine again" in line


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"version": "1.8.0.1"}, "by TensorRT for RTX 1.7.1.116, here is TensorRT for RTX 1.8.0.1"),
        ({"flavour": "trt"}, "by TensorRT for RTX 1.7.1.116, here is TensorRT 1.7.1.116"),
    ],
)
def test_another_library_is_refused(engine: Path, here: dict[str, Any], words: str) -> None:
    assert words in refusal(engine, **here)


@pytest.mark.parametrize("content", [b"engine!", b"ENGINE"])
def test_changed_bytes_of_an_engine_are_refused(engine: Path, content: bytes) -> None:
    engine.write_bytes(content)
    assert "was changed after it was built" in refusal(engine)


def test_a_changed_graph_is_refused_and_its_file_named(engine: Path, graph: Path) -> None:
    data = graph.parent / "decoder.onnx.data"
    data.write_bytes(b"\xff" + data.read_bytes()[1:])
    assert "another decoder.onnx (decoder.onnx.data differ)" in refusal(engine, graph)
    assert check_sidecar(engine, **HERE, graph=None)


def test_a_graph_that_lost_its_data_is_refused(engine: Path, graph: Path) -> None:
    (graph.parent / "decoder.onnx.data").unlink()
    assert "names the data 'decoder.onnx.data', which is missing" in refusal(engine, graph)


def test_a_missing_engine_and_a_missing_sidecar_are_refused(engine: Path) -> None:
    assert "there is no engine" in refusal(engine.with_name("other.engine"))
    sidecar_path(engine).unlink()
    assert "has no sidecar decoder.engine.json" in refusal(engine)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x80"])
def test_a_sidecar_that_is_no_json_object_is_refused(engine: Path, content: str) -> None:
    sidecar_path(engine).write_bytes(content.encode("latin-1"))
    assert "is not " in refusal(engine)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"sidecar_version": 2}, "reads 1: upgrade it"),
        ({"extra": 1}, "unknown keys ['extra']"),
        ({"flavour": "lean"}, "flavour is 'lean'"),
        ({"flavour": []}, "flavour is []"),
        ({"version": 1}, "version is 1"),
        ({"compute_capabilities": []}, "compute_capabilities is []"),
        ({"compute_capabilities": "8.0"}, "compute_capabilities is '8.0'"),
        ({"gpu": None}, "gpu is None"),
        ({"spec": {"name": "decoder"}}, "spec is damaged"),
        ({"spec": {"name": "d", "part": "d", "profiles": [{"name": "p", "shapes": {"x": [1]}}]}}, "spec is damaged"),
        ({"graph": {"decoder.onnx": "short"}}, "graph is "),
        ({"graph": {}}, "graph is {}"),
        ({"engine": "0" * 63}, "engine is "),
        ({"bytes": True}, "bytes is True"),
    ],
)
def test_a_damaged_sidecar_is_refused(engine: Path, changes: dict[str, Any], words: str) -> None:
    edit(engine, changes)
    line = refusal(engine)
    assert "decoder.engine.json is damaged" in line
    assert words in line


def test_a_sidecar_without_a_key_is_refused(engine: Path) -> None:
    data = json.loads(sidecar_path(engine).read_text())
    del data["engine"]
    sidecar_path(engine).write_text(json.dumps(data))
    assert "missing keys ['engine']" in refusal(engine)


def test_writing_a_sidecar_leaves_no_draft_and_the_same_bytes(engine: Path) -> None:
    before = sidecar_path(engine).read_bytes()
    Sidecar.read(engine).write(engine)
    assert sidecar_path(engine).read_bytes() == before
    assert sorted(p.name for p in engine.parent.iterdir()) == ["decoder.engine", "decoder.engine.json"]


def test_compute_capabilities_have_names() -> None:
    assert [sm_name(c) for c in ("8.0", "12.0", "12.1")] == ["sm80", "sm120", "sm121"]
    with pytest.raises(ValueError, match="'sm80' is no compute capability"):
        sm_name("sm80")


@pytest.mark.parametrize(("place", "name"), [("..", "decoder"), ("sm80", "../decoder"), ("sm80", ""), ("/", "d")])
def test_an_engine_stays_in_its_folder(tmp_path: Path, place: str, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot name an engine"):
        engine_path(tmp_path, place, name)


def test_digests_cover_the_graph_and_its_data(graph: Path) -> None:
    assert graph_digests(graph) == {n: file_sha256(graph.parent / n) for n in ("decoder.onnx", "decoder.onnx.data")}


def test_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"1234")
    graph = _with_external_data(tmp_path / "export", "../weights")
    with pytest.raises(ArtifactError, match=re.escape("'../weights', which is outside its folder")):
        graph_digests(graph)


def test_data_of_a_constant_inside_a_branch_is_found(tmp_path: Path) -> None:
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="inner.data")
    output = helper.make_tensor_value_info("c_out", TensorProto.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Constant", [], ["c_out"], value=tensor)], "branch", [], [output])
    node = helper.make_node("If", ["on"], ["y"], then_branch=branch, else_branch=branch)
    on = helper.make_tensor_value_info("on", TensorProto.BOOL, [])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    model = helper.make_model(helper.make_graph([node], "g", [on], [y]))
    (tmp_path / "g.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "inner.data").write_bytes(b"1234")
    assert sorted(graph_digests(tmp_path / "g.onnx")) == ["g.onnx", "inner.data"]


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"garbage" * 9)
    with pytest.raises(ArtifactError, match="cannot be read as ONNX"):
        graph_digests(tmp_path / "g.onnx")


def _with_external_data(folder: Path, location: str) -> Path:
    folder.mkdir()
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    onnx.save(helper.make_model(graph), folder / "g.onnx")
    return folder / "g.onnx"


def faults(engine: Path, spec: EngineSpec | None = None, *, listed: bool = True, **said: Any) -> list[str]:
    sidecar = replace(Sidecar.read(engine), **said)
    return sidecar_faults(engine, sidecar, spec or Sidecar.read(engine).spec, listed=listed)


def of_batch(spec: EngineSpec, batch: int) -> EngineSpec:
    """The specification with another largest batch in its last profile."""
    *before, last = spec.profiles
    smallest, usual, largest = last.shapes["inputs_embeds"]
    shapes = {**last.shapes, "inputs_embeds": (smallest, usual, (batch, *largest[1:]))}
    return replace(spec, profiles=(*before, replace(last, shapes=shapes)))


def test_a_sidecar_that_says_what_the_manifest_says_has_no_faults(engine: Path) -> None:
    assert faults(engine) == faults(engine, listed=False) == []


def test_other_shapes_than_the_manifests_are_seen_where_it_lists_the_place(engine: Path) -> None:
    spec = Sidecar.read(engine).spec
    (fault,) = faults(engine, spec=of_batch(spec, 99))
    assert "takes inputs_embeds [1, 1, 64] [1, 1, 64] [2, 1, 64] in decode; the manifest has " in fault
    assert fault.endswith("[99, 1, 64]")
    assert faults(engine, spec=of_batch(spec, 99), listed=False) == []
    shapes = dict(spec.profiles[0].shapes)
    del shapes["write_indices"]
    (fault,) = faults(engine, spec=replace(spec, profiles=(replace(spec.profiles[0], shapes=shapes), spec.profiles[1])))
    assert fault.endswith("the manifest has nothing")


@pytest.mark.parametrize("listed", [True, False])
def test_another_part_and_other_profiles_are_seen_everywhere(engine: Path, listed: bool) -> None:
    spec = Sidecar.read(engine).spec
    other = replace(spec, name="embed_tokens", part="embed_tokens", profiles=spec.profiles[:1])
    first, second = faults(engine, spec=other, listed=listed)
    assert first == "decoder.engine is the engine decoder of decoder, as its sidecar says"
    assert second == "decoder.engine has the profiles ['prefill', 'decode']; the manifest has ['prefill']"


@pytest.mark.parametrize(
    ("place", "said", "good"),
    [
        ("sm80", {}, True),
        ("sm86", {}, False),
        ("sm120", {"compute_capabilities": ("12.0",)}, True),
        ("sm80", {"compute_capabilities": ("8.0", "8.6")}, False),
        ("portable", {"compute_capabilities": ("8.0", "8.6"), "gpu": ""}, True),
        ("portable", {}, False),
        ("a100-80", {}, True),
        ("a100-40", {}, False),
        ("h100", {"gpu": ""}, False),
    ],
)
def test_a_folder_is_named_for_what_its_engines_run_on(
    engine: Path, place: str, said: dict[str, Any], good: bool
) -> None:
    sidecar = replace(Sidecar.read(engine), **said)
    found = sidecar_faults(engine.parents[1] / place / engine.name, sidecar, sidecar.spec, listed=True)
    assert [f"decoder.engine lies in {place} and was built for " in f for f in found] == ([] if good else [True])


BUILT = {"flavour": "rtx", "version": "1.7.1.116", "places": ["sm80"], "reason": ""}


def test_a_manifests_facts_are_read_or_named() -> None:
    model = {"attention": "static", "tensorrt": {"built": BUILT, "engines": [], "limits": {"max_seq": 48}}}
    assert (built_facts(model), specs_of(model), static_capacity(model)) == (BUILT, (), 48)
    assert static_capacity({"attention": "gqa"}) is None


@pytest.mark.parametrize(
    ("read", "facts", "words"),
    [
        (tensorrt_facts, None, "has no model.tensorrt"),
        (built_facts, {}, "model.tensorrt lacks 'built'"),
        (built_facts, {"built": None}, "model.tensorrt.built is None"),
        (built_facts, {"built": {**BUILT, "places": "sm80"}}, "model.tensorrt.built is "),
        (built_facts, {"built": {"flavour": "rtx"}}, "built lacks 'version'"),
        (specs_of, {}, "model.tensorrt lacks 'engines'"),
        (specs_of, {"engines": [{"name": "decoder"}]}, "model.tensorrt.engines is damaged: KeyError('part')"),
        (specs_of, {"engines": None}, "model.tensorrt.engines is damaged"),
        (static_capacity, {}, "model.tensorrt lacks 'limits'"),
        (static_capacity, {"limits": {}}, "limits is {}, without max_seq"),
    ],
)
def test_a_damaged_manifest_is_named(read: Any, facts: dict[str, Any] | None, words: str) -> None:
    with pytest.raises(ArtifactError, match=re.escape(words)):
        read({"attention": "static", **({} if facts is None else {"tensorrt": facts})})
