"""A whole export in the formats that are no integers of ours, judged by the gate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from tests.verify.mutate import DECODER, Stored, damaged
from vlmexport import pipeline
from vlmexport.manifest import Artifact, open_artifact
from vlmexport.plan import Dtype, OnnxOptions
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.verify.run import verify_artifact

pytestmark = pytest.mark.slow

CODES = "model.text_model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than these sizes need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def export(model: Path, out: Path, options: OnnxOptions) -> Artifact:
    result = pipeline.export_onnx(str(model), out, options, force=False, verify=False, progress=SilentProgress())
    return result.artifact


@pytest.fixture(scope="module")
def nf4(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("formats") / "nf4"
    return export(tiny_idefics3, out, OnnxOptions(scheme=make_scheme("nf4")))


def operators(artifact: Artifact) -> set[str]:
    return {n.op_type for n in onnx.load(artifact.part_path("decoder"), load_external_data=False).graph.node}


def test_nf4_lowers_exactly(nf4: Artifact) -> None:
    assert "MatMulBnb4" in operators(nf4)
    assert "MatMulNBits" not in operators(nf4)
    assert {r.codebook for r in nf4.manifest.quantized} == {"nf4"}
    report = verify_artifact(nf4.path)
    assert report.status_of("lowering") == "passed"
    assert report.lowering.max_abs_logit < 1e-4
    assert next(c for c in report.checks if c.name == "codes/all").value == 0


def test_the_planned_sizes_are_the_graphs_own(nf4: Artifact) -> None:
    graph = onnx.load(nf4.part_path("decoder"), load_external_data=True).graph
    stored = sum(len(t.raw_data) for t in graph.initializer if t.name.endswith((".codes", ".scale")))
    planned = [w for w in nf4.manifest.plan["weights"] if w["action"] == "quantize"]
    assert {w["dtype"] for w in planned} == {"nf4"}
    assert sum(w["bytes_after"] for w in planned) == stored


@pytest.mark.parametrize("ending", ["codes", "scale"])
def test_one_changed_value_is_seen_and_named(nf4: Artifact, tmp_path: Path, ending: str) -> None:
    def corrupt(folder: Path) -> None:
        with Stored(folder / DECODER, f"{CODES}.{ending}") as values:
            values[5] = values[5] ^ 0x10 if ending == "codes" else np.nextafter(values[5], np.float32(9))

    report = verify_artifact(damaged(nf4.path, tmp_path / "damaged", corrupt))
    (check,) = [c for c in report.failures() if c.name.startswith("codes/")]
    assert CODES in check.name
    assert "differ from what the quantizer chose" in check.reason


def test_nodes_that_the_manifest_does_not_know_are_seen(nf4: Artifact, tmp_path: Path) -> None:
    from vlmexport.verify.codes import unrecorded_matrices

    manifest = open_artifact(nf4.path).manifest
    less = dataclasses.replace(manifest, quantized=manifest.quantized[1:])
    faults = unrecorded_matrices(Artifact(nf4.path, less))
    assert [f.weight for f in faults] == [manifest.quantized[0].initializer]


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (make_scheme("nf4:nested"), "fp16"),
        (make_scheme("torchao:int4wo", symmetric=False), "fp16"),
        (make_scheme("rtn", bits=2, group_size=-1), "fp32"),
    ],
    ids=lambda value: value.algorithm if isinstance(value, QuantScheme) else value,
)
def test_other_formats_lower_exactly(tiny_idefics3: Path, tmp_path: Path, scheme: QuantScheme, dtype: Dtype) -> None:
    made = export(tiny_idefics3, tmp_path / "out", OnnxOptions(scheme=scheme, decoder_dtype=dtype))
    report = verify_artifact(made.path)
    assert [c.name for c in report.failures() if c.question == "lowering"] == []
