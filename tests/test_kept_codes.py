"""Plans, inspection and exports of a checkpoint that came quantized."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.model.importers.encoders import make_awq, make_gptq
from tests.model.test_load import edit_weights
from vlmexport import api
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.stage import decoder_weights
from vlmexport.checkpoint_plan import CheckpointOptions
from vlmexport.errors import BadInputError
from vlmexport.gguf_pipeline import gguf_vocabulary
from vlmexport.inspection import inspect_vlm
from vlmexport.kept_codes import check_kept, kept_scheme
from vlmexport.model.importers.packed import CodeFormat
from vlmexport.model.load import VLM, load_vlm
from vlmexport.pipeline import export_onnx
from vlmexport.plan import ExportPlan, OnnxOptions, plan_export
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.quantize.weights import quantize_data_free
from vlmexport.split.capture import split_model
from vlmexport.target import load_target

Q_PROJ = "model.text_model.layers.0.self_attn.q_proj.weight"
FORMAT = CodeFormat(4, 64, True, "", 128, 0, False)


@pytest.fixture(scope="module")
def gptq(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_vlm(str(make_gptq(tiny_idefics3, tmp_path_factory.mktemp("kept") / "gptq")[0]))


def plan(vlm: VLM, **options: object) -> ExportPlan:
    return plan_export(vlm, split_model(vlm), load_target("cpu"), OnnxOptions(**options))  # type: ignore[arg-type]


def test_the_default_keeps_every_code_and_every_float(gptq: VLM) -> None:
    assert gptq.quantized is not None
    made = plan(gptq)
    assert set(made.schemes) == set(gptq.quantized.formats)
    weight = made.weight(Q_PROJ)
    assert weight.scheme == QuantScheme(bits=4, group_size=32, symmetric=True, algorithm="imported")
    assert weight.reason == "codes kept from the gptq checkpoint"
    assert weight.bytes_before == gptq.quantized.formats[Q_PROJ].stored
    assert made.weight("lm_head.weight").reason == "unquantized in the gptq checkpoint"


def test_the_stage_hands_on_the_checkpoints_own_codes(gptq: VLM, tmp_path: Path) -> None:
    assert gptq.quantized is not None
    split, made = split_model(gptq), plan(gptq)
    weights, report = decoder_weights(
        gptq, split, made.schemes, CalibrationOptions(), tmp_path / "work", SilentProgress()
    )
    assert report is None
    for name, codes in gptq.quantized.codes.items():
        assert weights.quantized(name).digest() == codes.digest()


def test_quant_none_gives_the_floats(gptq: VLM) -> None:
    assert not plan(gptq, scheme=None).schemes


def test_another_method_is_refused_in_one_line(gptq: VLM) -> None:
    for options in ({"scheme": make_scheme("rtn")}, {"scheme_named": True}):
        with pytest.raises(
            BadInputError, match=r"already quantized .gptq 4-bit g32 sym. and keeps its codes"
        ) as caught:
            plan(gptq, **options)
        assert "\n" not in str(caught.value)


def test_kept_codes_of_a_float_model_are_refused() -> None:
    with pytest.raises(BadInputError, match="the model is not quantized"):
        check_kept(None, QuantScheme(algorithm="imported"), named=False)
    check_kept(None, make_scheme(), named=True)


def test_imported_codes_are_never_made(gptq: VLM) -> None:
    weight = gptq.parameters_by_name()[Q_PROJ]
    with pytest.raises(ValueError, match="come from the quantized checkpoint, and none were given"):
        quantize_data_free(weight, QuantScheme(algorithm="imported"), Q_PROJ)


def test_imported_is_no_choice() -> None:
    with pytest.raises(BadInputError, match="unknown; choose one of") as caught:
        make_scheme("frobnicate")
    assert "imported" not in str(caught.value)


def test_bits_that_the_target_does_not_hold_are_refused(tiny_idefics3: Path, tmp_path: Path) -> None:
    vlm = load_vlm(str(make_gptq(tiny_idefics3, tmp_path / "q", bits=3)[0]))
    with pytest.raises(BadInputError, match=r"gptq checkpoint cannot be kept: target cpu refuses 3-bit .*--quant none"):
        plan(vlm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 512, "in_features": 2048}, r"group size is 512.*or --quant none for floats"),
        ({"group_size": 8}, "group size is 8"),
        ({"bits": 5}, "bits is 5"),
        ({"wide_scales": True}, "scales do not fit float16; choose --decoder-dtype fp32"),
    ],
)
def test_what_no_scheme_describes_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadInputError, match=rf"w.*{message}"):
        kept_scheme("w", dataclasses.replace(FORMAT, **change), "fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "algorithm", "group"),
    [
        ({}, "imported", 64),
        ({"group_size": 2048, "in_features": 2048}, "imported", -1),
        ({"group_size": 128}, "imported", 128),
        ({"codebook": "nf4"}, "nf4", 64),
        ({"codebook": "fp8", "bits": 8, "group_size": 128, "wide_scales": True}, "fp8", -1),
    ],
)
def test_schemes_that_describe_codes(change: dict[str, object], algorithm: str, group: int) -> None:
    scheme = kept_scheme("w", dataclasses.replace(FORMAT, **change), "fp16")  # type: ignore[arg-type]
    assert (scheme.algorithm, scheme.group_size) == (algorithm, group)


def test_inspect_says_what_it_is(gptq: VLM) -> None:
    report = inspect_vlm(gptq, gguf_vocabulary)
    assert report.quantized == "gptq 4-bit g32 sym"
    assert report.recipe.command == f"vlmexport onnx --model {gptq.source} --out OUT"
    assert (report.recipe.bits, report.recipe.group_size, report.recipe.symmetric) == (4, 32, True)


@pytest.mark.parametrize("quant", ["rtn", "fp8"])
def test_inspect_recommends_what_works(tiny_idefics3: Path, tmp_path: Path, quant: str) -> None:
    if quant == "fp8":
        options = CheckpointOptions("compressed-tensors", make_scheme("fp8"))
        folder = api.quantize_checkpoint(str(tiny_idefics3), tmp_path / "q", options, verify=False).path
    else:
        folder = make_gptq(tiny_idefics3, tmp_path / "q", bits=3)[0]
    report = inspect_vlm(load_vlm(str(folder)), gguf_vocabulary)
    assert not any(target.can_export for target in report.targets if target.name != "llamacpp")
    assert report.recipe.command == f"vlmexport quantize --model {folder} --out OUT --format compressed-tensors"
    assert "no target takes these codes" in report.recipe.reason
    assert "original weights, or --quant none for floats" in report.recipe.reason


@pytest.mark.slow
def test_an_export_of_a_quantized_checkpoint_has_its_codes(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, _ = make_awq(tiny_idefics3, tmp_path / "awq")
    result = export_onnx(
        str(folder), tmp_path / "onnx", OnnxOptions(), force=False, verify=False, progress=SilentProgress()
    )
    manifest = result.artifact.manifest
    digests = {member.name: member.digest for record in manifest.quantized for member in record.members}
    kept = load_vlm(str(folder)).quantized
    assert kept is not None
    assert digests == {name: codes.digest() for name, codes in kept.codes.items()}
    assert manifest.source["quantization"]["summary"] == "awq 4-bit g32 asym"
    assert "quantization_config" not in json.loads((result.artifact.path / "config.json").read_text())


def test_a_changed_code_is_another_digest(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, _ = make_awq(tiny_idefics3, tmp_path / "awq")
    before = load_vlm(str(folder)).quantized
    name = Q_PROJ.removesuffix("weight") + "qweight"
    edit_weights(folder, lambda tensors: tensors[name][0, 0].bitwise_xor_(1))
    after = load_vlm(str(folder)).quantized
    assert before is not None
    assert after is not None
    assert before.codes[Q_PROJ].digest() != after.codes[Q_PROJ].digest()
