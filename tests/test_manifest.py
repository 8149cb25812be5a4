import json
from pathlib import Path

import pytest

from vlmexport.errors import ArtifactError
from vlmexport.manifest import (
    MANIFEST_NAME,
    Artifact,
    Manifest,
    PartFile,
    QuantizedMember,
    QuantizedRecord,
    TensorSpec,
    open_artifact,
    record_result,
    write_manifest,
)


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    (tmp_path / "decoder.onnx").write_bytes(b"graph")
    spec = TensorSpec("logits", "float32", ("batch_size", 7))
    member = QuantizedMember("layers.0.q_proj.weight", (0, 4), "0" * 64)
    manifest = Manifest(
        layout="split",
        target="cpu",
        created_by={"vlmexport": "0"},
        source={"model": "demo"},
        model={},
        plan={},
        parts={"decoder": PartFile("decoder.onnx", (), (spec,))},
        quantized=(QuantizedRecord("decoder", "qkv", 4, 32, True, 64, (member,)),),
        unquantized=(),
        results={"verify": None, "bench": None},
    )
    return write_manifest(tmp_path, manifest)


def edit(artifact: Artifact, **changes: object) -> None:
    file = artifact.path / MANIFEST_NAME
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_manifest_survives_its_json_form(artifact: Artifact) -> None:
    assert open_artifact(artifact.path).manifest == artifact.manifest


def test_writing_twice_gives_the_same_bytes(artifact: Artifact) -> None:
    before = (artifact.path / MANIFEST_NAME).read_bytes()
    write_manifest(artifact.path, artifact.manifest)
    assert (artifact.path / MANIFEST_NAME).read_bytes() == before


def test_a_result_is_recorded_and_the_files_stay_valid(artifact: Artifact) -> None:
    record_result(artifact, "bench", {"artifact": {"decode_tok_s": 1.0}})
    again = open_artifact(artifact.path)
    assert again.manifest.results == {"verify": None, "bench": {"artifact": {"decode_tok_s": 1.0}}}
    assert sorted(p.name for p in artifact.path.iterdir()) == ["decoder.onnx", MANIFEST_NAME]


def test_a_changed_or_missing_file_is_named(artifact: Artifact) -> None:
    (artifact.path / "decoder.onnx").write_bytes(b"grapH")
    with pytest.raises(ArtifactError, match=r"decoder\.onnx was changed after the export"):
        open_artifact(artifact.path)
    (artifact.path / "decoder.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"decoder\.onnx is listed .* but missing"):
        open_artifact(artifact.path)


def test_a_path_outside_the_folder_is_refused(artifact: Artifact) -> None:
    edit(artifact, files={"../secret": {"sha256": "0", "bytes": 1}})
    with pytest.raises(ArtifactError, match="outside"):
        open_artifact(artifact.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "has format 'other'"),
        ({"version": 99}, "has version 99; this vlmexport reads up to 1: upgrade"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"parts": {"decoder": {}}}, "is damaged"),
    ],
)
def test_foreign_newer_and_damaged_manifests_are_refused(
    artifact: Artifact, changes: dict[str, object], message: str
) -> None:
    edit(artifact, **changes)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(artifact.path)
