"""The Triton repository: read back, checked against the graphs, and run by a stand-in for the server."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.lower.tensorrt.fake_triton import END, START, Server, TritonModelException
from tests.lower.tensorrt.test_script import A100, run_sh, tools_at
from tests.runtime.mock_export import F32, VISION_WIDTH, Graph
from tests.runtime.tensorrt.exports import LIMITS, static_export
from tests.runtime.tensorrt.fakes import engine_bytes
from vlmexport.engines import EngineSpec, Sidecar, decoder_profiles, specs_of
from vlmexport.errors import ArtifactError, BadInputError
from vlmexport.lower.tensorrt import triton_config
from vlmexport.lower.tensorrt.script import write_build_scripts
from vlmexport.lower.tensorrt.triton import write_triton
from vlmexport.lower.tensorrt.triton_check import check_triton
from vlmexport.lower.tensorrt.triton_config import read_config
from vlmexport.manifest import Artifact, PartFile, write_manifest
from vlmexport.model.merge import MergeSpec
from vlmexport.runtime.generate import generate_ids
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.sampling import Sampling

IMAGE, CAPACITY = 7, 48


def written(folder: Path, backend: Any, *, eos: tuple[int, ...] = (), **export: Any) -> Artifact:
    """An export with a repository; for TensorRT with plans that the stand-in loads.

    Its weights are FP16: what ONNX Runtime makes of INT4 depends on how a session is opened.
    """
    artifact = static_export(folder, built=False, weights="fp16", **export)
    manifest = artifact.manifest
    specs = specs_of(manifest.model)
    write_build_scripts(folder, manifest.model["tensorrt"], manifest.parts, specs, A100)
    names = write(artifact, backend, eos)
    assert all((folder / name).is_file() for name in names)
    if backend == "tensorrt":
        places = json.loads((folder / "triton" / "engines.json").read_text())
        for spec in specs:
            plan = folder / "triton" / places[spec.name][0]
            plan.parent.mkdir(exist_ok=True)
            plan.write_bytes(engine_bytes(artifact.part_path(spec.part), spec))
    return artifact


def write(artifact: Artifact, backend: Any, eos: tuple[int, ...] = (), **changed: Any) -> tuple[str, ...]:
    model = artifact.manifest.model
    said = {
        "parts": artifact.manifest.parts,
        "specs": specs_of(model),
        "limits": LIMITS,
        "merge": MergeSpec.from_dict(model["merge"]),
    }
    return write_triton(artifact.path, backend=backend, eos_token_ids=eos, **{**said, **changed})


def prompt(images: int = 1, seed: int = 0) -> ModelInputs:
    """Eight tokens of text around the image tokens, of which the stand-in's encoder makes four a picture."""
    rng = np.random.default_rng(seed)
    text = rng.integers(8, 128, 8)
    ids = np.concatenate([text[:3], np.full(4 * images, IMAGE), text[3:]])[None].astype(np.int64)
    pixels = rng.standard_normal((1, images, 3, 32, 32)).astype(np.float32)
    return ModelInputs(ids, {"pixel_values": pixels} if images else {})


def asked(server: Server, inputs: ModelInputs, tokens: int) -> list[int]:
    limit = np.array([tokens], np.int64)
    found = server.ask("vlm", input_ids=inputs.input_ids[0], max_tokens=limit, **inputs.pixel_inputs)
    return [int(t) for t in found["token_ids"]]


def expected(artifact: Artifact, inputs: ModelInputs, tokens: int, end: tuple[int, ...] = ()) -> list[int]:
    runner = OnnxRunner(artifact, threads=1)
    done = generate_ids(runner, [inputs], Sampling(max_new_tokens=tokens), end_tokens=end)
    return list(done.tokens[0])


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_the_loop_gives_the_tokens_of_the_runner(tmp_path: Path, backend: str) -> None:
    artifact = written(tmp_path / "e", backend)
    server = Server(tmp_path / "e" / "triton")
    for images, seed in ((1, 0), (0, 1), (2, 2)):
        inputs = prompt(images, seed)
        answer = asked(server, inputs, 20)
        assert answer == expected(artifact, inputs, 20)
        assert len(set(answer)) > 3
    assert not server.running


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_a_long_prompt_goes_through_in_pieces(tmp_path: Path, backend: str) -> None:
    artifact = written(tmp_path / "e", backend)
    if backend == "tensorrt":
        limit_to(artifact, 5)
    else:
        write(artifact, backend, limits=replace(LIMITS, max_prompt=5))
    server = Server(tmp_path / "e" / "triton")
    inputs = prompt(2)
    assert asked(server, inputs, 6) == expected(artifact, inputs, 6)
    # 16 tokens in four pieces, then five single ones; TensorRT's sequence ends with one more.
    assert [name for name, _ in server.calls].count("decoder") == 4 + 5 + (backend == "tensorrt")


def limit_to(artifact: Artifact, tokens: int) -> None:
    """A repository and plans whose prefill takes so few tokens at once."""
    limits = replace(LIMITS, max_prompt=tokens)
    part = artifact.manifest.parts["decoder"]
    spec = EngineSpec("decoder", "decoder", decoder_profiles(part, limits))
    others = [s for s in specs_of(artifact.manifest.model) if s.part != "decoder"]
    plans = {p: p.read_bytes() for p in (artifact.path / "triton").glob("*/1/*.plan")}
    write(artifact, "tensorrt", limits=limits, specs=[*others, spec])
    for path, data in plans.items():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(engine_bytes(artifact.part_path("decoder"), spec) if path.parts[-3] == "decoder" else data)


def test_two_engines_share_one_cache(tmp_path: Path) -> None:
    artifact = written(tmp_path / "e", "tensorrt", split_decoder=True)
    assert {p.name for p in (tmp_path / "e" / "triton" / "decoder" / "1").iterdir()} == {
        "model.py",
        "prefill.plan",
        "decode.plan",
    }
    inputs = prompt()
    assert asked(Server(tmp_path / "e" / "triton"), inputs, 12) == expected(artifact, inputs, 12)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_an_end_token_ends_the_answer_and_frees_the_decoder(tmp_path: Path, backend: str) -> None:
    artifact = written(tmp_path / "a", backend)
    inputs = prompt()
    end = expected(artifact, inputs, 20)[5]
    written(tmp_path / "b", backend, eos=(end,))
    server = Server(tmp_path / "b" / "triton")
    short = asked(server, inputs, 20)
    assert short == expected(artifact, inputs, 20, (end,))
    assert end not in short
    assert not server.running
    flags = [f for name, f in server.calls if name == "decoder" and f]
    assert flags == ([START, END] if backend == "tensorrt" else [])


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_an_answer_ends_where_the_cache_is_full(tmp_path: Path, backend: str) -> None:
    written(tmp_path / "e", backend)
    inputs = prompt()
    answer = asked(Server(tmp_path / "e" / "triton"), inputs, 500)
    # The last token needs no slot: nothing comes after it.
    assert len(answer) == CAPACITY - inputs.input_ids.size + 1


def test_requests_that_cannot_be_answered_say_why(tmp_path: Path) -> None:
    written(tmp_path / "e", "tensorrt")
    server = Server(tmp_path / "e" / "triton")
    good = prompt()
    with pytest.raises(TritonModelException, match=r"4 image tokens \(id 7\) but the pixels give 0"):
        asked(server, ModelInputs(good.input_ids), 2)
    with pytest.raises(TritonModelException, match="the prompt has 49 tokens; the KV cache takes 1 to 48"):
        asked(server, ModelInputs(np.ones((1, 49), np.int64)), 2)
    with pytest.raises(TritonModelException, match="max_tokens is 0"):
        asked(server, good, 0)
    assert not server.running
    assert asked(server, good, 2)


def test_an_error_of_the_decoder_comes_through(tmp_path: Path) -> None:
    written(tmp_path / "e", "tensorrt")
    (tmp_path / "e" / "triton" / "decoder" / "1" / "model.plan").write_bytes(b"an engine of another GPU")
    with pytest.raises(TritonModelException, match=r"model\.plan is not an engine of TensorRT 11\.4"):
        asked(Server(tmp_path / "e" / "triton"), prompt(), 2)


def test_the_build_script_fills_the_repository(tmp_path: Path) -> None:
    written(tmp_path / "e", "tensorrt")
    root = tmp_path / "e" / "triton"
    for plan in root.glob("*/1/*.plan"):
        plan.unlink()
    done = run_sh(tmp_path / "e", tools_at(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    plans = sorted(p.relative_to(root).as_posix() for p in root.glob("*/1/*.plan"))
    assert plans == [f"{role}/1/model.plan" for role in ("decoder", "embed_tokens", "projector", "vision_encoder")]
    assert "decoder: triton/decoder/1/model.plan" in done.stdout


def test_an_engine_of_tensorrt_for_rtx_is_found(tmp_path: Path) -> None:
    artifact = static_export(tmp_path / "e")
    manifest = artifact.manifest
    write(artifact, "tensorrt")
    root = tmp_path / "e" / "triton"
    engine = tmp_path / "e" / "engines" / "sm80" / "decoder.engine"
    assert Sidecar.read(engine).flavour == "rtx"
    assert check_triton(root, manifest.parts) == []
    shutil.copy(engine, root / "decoder" / "1" / "model.plan")
    assert any("TensorRT for RTX, which Triton does not load" in f for f in check_triton(root, manifest.parts))
    assert "TensorRT for RTX do not load here" in " ".join((root / "README.md").read_text().split())


@pytest.mark.parametrize(
    ("model", "before", "after", "fault"),
    [
        ("embed_tokens", "TYPE_INT64", "TYPE_INT32", "embed_tokens: the input input_ids is TYPE_INT32 [-1, -1]"),
        ("embed_tokens", "dims: 64", "dims: 65", "embed_tokens: the output inputs_embeds is TYPE_FP32 [-1, -1, 65]"),
        ("embed_tokens", '"input_ids"', '"ids"', "embed_tokens: the graph has no input ids"),
        ("embed_tokens", "dims: -1", "", "the graph's TYPE_INT64 [-1, -1]"),
        ("embed_tokens", 'name: "embed_tokens"', 'name: "embed"', "config.pbtxt says the name 'embed'"),
        ("embed_tokens", 'name: "embed_tokens"', 'nam: "embed_tokens"', 'no field named "nam"'),
        ("embed_tokens", 'name: "embed_tokens"', 'name: "embed_tokens" max_batch_size: 8', "max_batch_size is 8"),
        ("decoder", "past_key_values.1.value", "past_key_values.9.value", "input past_key_values.1.value is missing"),
        ("decoder", "decoder.onnx", "other.onnx", "decoder: it names the graph 'other.onnx'"),
        ("decoder", 'backend: "onnxruntime"', 'platform: "tensorrt_plan"', "cannot update a cache in place"),
        ("decoder", 'backend: "onnxruntime"', 'backend: "python"', "sequence_batching is missing"),
        ("decoder", 'backend: "onnxruntime"', 'backend: "pytorch"', "runs no part of an export"),
        ("vlm", "max_tokens", "most_tokens", "vlm: the input max_tokens is missing"),
        ("image_features", 'model_name: "projector"', 'model_name: "project"', "a step runs 'project'"),
        ("image_features", 'key: "vision_features"', 'key: "features"', "its input vision_features is not fed"),
        ("projector", "data_type: TYPE_FP32", "data_type: TYPE_FP16", "image_features: projector: vision_features is"),
    ],
)
def test_every_disagreement_is_found(tmp_path: Path, model: str, before: str, after: str, fault: str) -> None:
    artifact = written(tmp_path / "e", "onnxruntime")
    root = tmp_path / "e" / "triton"
    assert check_triton(root, artifact.manifest.parts) == []
    path = root / model / "config.pbtxt"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    faults = check_triton(root, artifact.manifest.parts)
    assert any(fault in line for line in faults), faults


def test_missing_files_are_found(tmp_path: Path) -> None:
    artifact = written(tmp_path / "e", "onnxruntime")
    root = tmp_path / "e" / "triton"
    (root / "decoder" / "1" / "decoder.onnx.data").unlink()
    (root / "vlm" / "1" / "model.py").unlink()
    (root / "projector" / "config.pbtxt").unlink()
    faults = " ".join(check_triton(root, artifact.manifest.parts))
    for words in (
        "decoder.onnx.data', which is missing",
        "vlm: there is no 1/model.py",
        "projector: there is no config",
    ):
        assert words in faults


def test_models_that_vlm_cannot_serve_are_refused(tmp_path: Path) -> None:
    artifact = static_export(tmp_path / "e", built=False)
    without = {role: part for role, part in artifact.manifest.parts.items() if role != "projector"}
    with pytest.raises(BadInputError, match="a model without projector; leave out --triton"):
        write(artifact, "onnxruntime", parts=without)
    with pytest.raises(BadInputError, match=r"further decoder inputs \(position_ids\)"):
        write(artifact, "onnxruntime", merge=MergeSpec(IMAGE, extras=("position_ids",)))
    assert not (tmp_path / "e" / "triton").exists()
    with pytest.raises(ArtifactError, match="not prefill and decode"):
        write(artifact, "tensorrt", specs=specs_of(artifact.manifest.model)[:-1])


def test_onnx_reads_the_export_and_the_copies(tmp_path: Path) -> None:
    """It refuses external data with a second name, which looks like an attack to it."""
    artifact = written(tmp_path / "e", "onnxruntime")
    for role, part in artifact.manifest.parts.items():
        for folder in (artifact.path, artifact.path / "triton" / role / "1"):
            assert onnx.load(folder / part.file).graph.node


def with_two_features(artifact: Artifact) -> Artifact:
    """The export with an encoder that hands two tensors to its projector, which tells them apart."""
    root, parts = artifact.path, artifact.manifest.parts
    g = Graph()
    features = g.op("Reshape", "pixel_values", g.const([-1, VISION_WIDTH], np.int64), outputs=["vision_features"])
    g.op("Neg", features, outputs=["vision_features_1"])
    both = [(name, F32, ["rows", VISION_WIDTH]) for name in ("vision_features", "vision_features_1")]
    pixels = ("pixel_values", F32, ["batch", "images", 3, "height", "width"])
    encoder = g.save(root / "vision_encoder.onnx", [pixels], both)
    g, width = Graph(), parts["projector"].outputs[0].dims[-1]
    mixed = g.op("Sub", "vision_features", g.op("Mul", "vision_features_1", g.const(2)))
    grouped = g.op("Reshape", mixed, g.const([-1, 16, VISION_WIDTH], np.int64))
    mean = g.op("ReduceMean", grouped, g.const([1], np.int64), keepdims=0)
    weight = np.random.default_rng(0).normal(size=(VISION_WIDTH, width))
    g.op("MatMul", mean, g.const(weight), outputs=["image_features"])
    projector = g.save(root / "projector.onnx", both, [("image_features", F32, ["image_tokens", width])])
    changed: dict[str, PartFile] = {**parts, "vision_encoder": encoder, "projector": projector}
    return write_manifest(root, replace(artifact.manifest, parts=changed))


def test_encoders_may_hand_several_tensors_to_their_projector(tmp_path: Path) -> None:
    artifact = with_two_features(written(tmp_path / "e", "onnxruntime"))
    write(artifact, "onnxruntime")
    inputs = prompt(2)
    answer = asked(Server(tmp_path / "e" / "triton"), inputs, 8)
    assert answer == expected(artifact, inputs, 8)


def test_writing_twice_gives_the_same_files(tmp_path: Path) -> None:
    def contents() -> dict[str, bytes]:
        root = tmp_path / "e" / "triton"
        return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    artifact = written(tmp_path / "e", "onnxruntime")
    first = contents()
    write(artifact, "onnxruntime")
    assert contents() == first


def test_the_readme_claims_no_run(tmp_path: Path) -> None:
    for backend in ("onnxruntime", "tensorrt"):
        written(tmp_path / backend, backend)
        text = (tmp_path / backend / "triton" / "README.md").read_text()
        assert "No Triton server has loaded this repository" in text
        assert "{" not in text


def tritons_own_messages() -> Any:
    """``model_config_pb2`` of tritonclient, without the rest of it, which needs gRPC."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient is not installed")
    path = Path(next(iter(found.submodule_search_locations))) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_tritons_own_protobuf_reads_the_same(tmp_path: Path, backend: str) -> None:
    from google.protobuf import json_format, text_format

    theirs = tritons_own_messages()
    written(tmp_path / "e", backend)
    paths = sorted((tmp_path / "e" / "triton").glob("*/config.pbtxt"))
    assert len(paths) == 6
    for path in paths:
        text = path.read_text()
        config = text_format.Parse(text, theirs.ModelConfig())
        assert json_format.MessageToDict(config) == json_format.MessageToDict(read_config(text, "x"))


def test_the_messages_are_tritons() -> None:
    theirs = tritons_own_messages().ModelConfig.DESCRIPTOR
    seen: list[str] = []
    same_fields(triton_config.model_config().DESCRIPTOR, theirs, seen)
    assert {"ModelConfig", "ModelInput", "Step", "ModelSequenceBatching"} <= set(seen)


def same_fields(ours: Any, theirs: Any, seen: list[str]) -> None:
    if ours.name in seen:
        return
    seen.append(ours.name)
    for field in ours.fields:
        other = theirs.fields_by_name[field.name]
        assert (field.number, field.type, field.is_repeated) == (other.number, other.type, other.is_repeated), (
            field.name
        )
        if field.enum_type is not None:
            known = {v.name: v.number for v in other.enum_type.values}
            assert {v.name: v.number for v in field.enum_type.values}.items() <= known.items()
        if field.message_type is not None:
            same_fields(field.message_type, other.message_type, seen)
