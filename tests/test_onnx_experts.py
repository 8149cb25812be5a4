"""`vlmexport onnx` on a mixture of experts, gate included: bfloat16 weights, codes by expert, and what turns it red."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest

from tests.test_quantize_experts import make_source
from vlmexport import api
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.manifest import Artifact
from vlmexport.model.load import VLM, load_vlm
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.quantize.scheme import make_scheme
from vlmexport.split import expert_forms
from vlmexport.split.capture import split_model
from vlmexport.split.parts import Split
from vlmexport.target import load_target
from vlmexport.verify.codes import account, read_codes
from vlmexport.verify.reference import load_reference
from vlmexport.verify.result import ParityReport

EIGHT_BITS = make_scheme("rtn", bits=8, group_size=32)
EXPERTS = "model.language_model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source("qwen3_moe", tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def taken(source: Path) -> tuple[VLM, Split]:
    vlm = load_vlm(str(source))
    return vlm, split_model(vlm)


@pytest.fixture(scope="module")
def export(source: Path, tmp_path_factory: pytest.TempPathFactory) -> api.ExportResult:
    out = tmp_path_factory.mktemp("export") / "out"
    return api.export_onnx(str(source), out, OnnxOptions(scheme=EIGHT_BITS))


def lowering(report: ParityReport | None) -> dict[str, str]:
    assert report is not None
    return {c.name: c.status for c in report.checks if c.question == "lowering"}


def test_experts_are_planned_one_scheme_for_each_parameter(taken: tuple[VLM, Split]) -> None:
    plan = plan_export(*taken, load_target("cpu"), OnnxOptions(decoder_dtype="fp16"))
    packed = plan.weight(f"{EXPERTS}.gate_up_proj")
    assert (packed.action, packed.reason, packed.shape[0]) == ("quantize", "packed experts", 3)
    assert plan.weight(f"{EXPERTS}.gate_up_proj.2") is packed
    router = plan.weight(f"{EXPERTS.rpartition('.')[0]}.gate.weight")
    assert (router.action, router.dtype, router.reason) == ("keep", "float32", "router: it chooses among the experts")


def test_what_experts_do_not_go_with_is_refused(taken: tuple[VLM, Split]) -> None:
    static = OnnxOptions(target="tensorrt", layout="tensorrt", attention="static", cache_length=64, scheme=None)
    with pytest.raises(UnsupportedModelError, match="llava: mixture-of-experts layers have no form in the tensorrt"):
        plan_export(*taken, load_target("tensorrt"), static)
    with pytest.raises(BadInputError, match="--prefill int8 has no form for mixture-of-experts layers"):
        plan_export(*taken, load_target("cpu"), OnnxOptions(prefill="int8"))
    turned = frozenset({f"{EXPERTS}.down_proj"})
    with (
        mock.patch.object(expert_forms, "transposed_parameters", return_value=turned),
        pytest.raises(
            BadInputError, match=r"--quant gptq calibrates no experts that are stored as \[inputs, outputs\]"
        ),
    ):
        plan_export(*taken, load_target("cpu"), OnnxOptions(scheme=make_scheme("gptq")))


@pytest.mark.slow
def test_the_gate_reads_every_experts_codes(export: api.ExportResult, source: Path) -> None:
    assert set(lowering(export.report).values()) == {"passed"}
    records = {m.name for record in export.artifact.manifest.quantized for m in record.members}
    assert {f"{EXPERTS}.{name}.{e}" for name in ("gate_up_proj", "down_proj") for e in range(3)} <= records
    assert not any(kept.name.startswith(f"{EXPERTS}.") for kept in export.artifact.manifest.unquantized)
    parameters = load_reference(str(source)).decoder_parameters()
    assert account(export.artifact, parameters) == []
    first, *rest = export.artifact.manifest.quantized
    less = dataclasses.replace(
        export.artifact.manifest, quantized=tuple(r for r in (first, *rest) if "down_proj.1" not in r.initializer)
    )
    assert account(Artifact(export.artifact.path, less), parameters) == [
        f"{EXPERTS}.down_proj is in neither quantized nor unquantized"
    ]


@pytest.mark.slow
def test_a_changed_scale_of_one_expert_is_seen(export: api.ExportResult) -> None:
    assert read_codes(export.artifact)[1] == []
    name = f"{EXPERTS}.gate_up_proj.1"
    file = export.artifact.part_path("decoder")
    before = file.read_bytes(), file.with_name("decoder.onnx_data").read_bytes()
    model = onnx.load(file)
    scale = next(i for i in model.graph.initializer if i.name == f"{name}.scale")
    array = onnx.numpy_helper.to_array(scale).copy()
    array.flat[0] *= np.float32(1.5)
    scale.CopyFrom(onnx.numpy_helper.from_array(array, scale.name))
    file.with_name("decoder.onnx_data").unlink()
    try:
        onnx.save(model, file, save_as_external_data=True, location="decoder.onnx_data")
        assert [fault.weight for fault in read_codes(export.artifact)[1]] == [name]
    finally:
        file.write_bytes(before[0])
        file.with_name("decoder.onnx_data").write_bytes(before[1])


@pytest.mark.slow
def test_float16_decoders_route_in_float32(source: Path, tmp_path: Path) -> None:
    result = api.export_onnx(str(source), tmp_path / "out", OnnxOptions(scheme=EIGHT_BITS, decoder_dtype="fp16"))
    assert set(lowering(result.report).values()) == {"passed"}


@pytest.mark.slow
def test_calibrated_experts_have_codes_of_their_own(source: Path, tmp_path: Path) -> None:
    options = OnnxOptions(scheme=make_scheme("awq+gptq", bits=8, group_size=32))
    result = api.export_onnx(str(source), tmp_path / "out", options, calibration=CalibrationOptions(samples=4, seed=1))
    assert set(lowering(result.report).values()) == {"passed"}
    calibration = result.artifact.manifest.calibration or {}
    weights = {name for layer in calibration["layers"] for name in layer["weights"]}
    assert any(name.endswith("experts.down_proj.0") for name in weights)
