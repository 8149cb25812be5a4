"""What `vlmexport gguf` gets of the calibration stage: no more work than its options ask for, and all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmexport.calibrate.gguf import GgufWeights, gguf_decoder_weights
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_plan import plan_gguf
from vlmexport.model.load import VLM, load_vlm
from vlmexport.progress import SilentProgress
from vlmexport.quantize.ggml.code_types import exact_scheme
from vlmexport.quantize.ggml.imatrix import write_imatrix
from vlmexport.quantize.scheme import QuantScheme

FEW = CalibrationOptions(samples=4)


@pytest.fixture(scope="module")
def vlm(tiny_idefics3: Path) -> VLM:
    return load_vlm(str(tiny_idefics3))


def weights(vlm: VLM, work: Path, calibration: CalibrationOptions = FEW, **options: Any) -> GgufWeights:
    plan = plan_gguf(vlm, GgufOptions(**options))
    return gguf_decoder_weights(vlm, plan, calibration, work, SilentProgress())


def test_nothing_runs_when_nothing_is_asked_for(vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmexport.split.capture.split_model", lambda _: pytest.fail("the model was split"))
    rtn = exact_scheme(QuantScheme())
    asked: list[dict[str, Any]] = [{"imatrix": "none"}, {"quant": "F16"}, {"quant": "Q4_0", "scheme": rtn}]
    for options in asked:
        made = weights(vlm, tmp_path / "work", **options)
        assert (made.importance, made.facts, made.report, made.notes) == ({}, {}, None, ())
        assert not made.weights.folds
        assert "model.text_model.layers.0.mlp.up_proj.weight" in made.weights.tensors
    assert made.weights.quantized("model.text_model.layers.0.mlp.up_proj.weight").scale.dtype.itemsize == 2
    assert not (tmp_path / "work").exists()


def test_the_matrix_is_measured_and_its_file_gives_the_same(vlm: VLM, tmp_path: Path) -> None:
    made = weights(vlm, tmp_path / "work")
    assert made.imatrix is not None
    assert len(made.importance) == 2 * 7
    assert made.report is not None
    assert 0 < made.report["image_share"] < 1
    assert not made.weights.given
    assert not made.weights.folds
    assert made.facts["quantize.imatrix.file"] == "calibrated by vlmexport"
    assert str(made.facts["quantize.imatrix.dataset"]).startswith("vlmexport synthetic, 4 samples, seed 0, ")
    assert made.facts["quantize.imatrix.entries_count"] == 14
    write_imatrix(tmp_path / "made.gguf", made.imatrix)
    read = weights(vlm, tmp_path / "none", imatrix=tmp_path / "made.gguf")
    assert read.report is None
    assert read.facts["quantize.imatrix.file"] == str(tmp_path / "made.gguf")
    assert read.importance.keys() == made.importance.keys()
    assert all(np.array_equal(read.importance[name], entry) for name, entry in made.importance.items())


def test_text_alone_measures_other_things(vlm: VLM, tmp_path: Path) -> None:
    both = weights(vlm, tmp_path / "one").importance
    text = weights(vlm, tmp_path / "two", CalibrationOptions(samples=4, text_only=True)).importance
    assert all((np.abs(text[n] / both[n] - 1) > 0.01).any() for n in both)


@pytest.mark.slow
def test_smoothing_folds_scales_and_moves_the_importance(vlm: VLM, tmp_path: Path) -> None:
    plain, made = weights(vlm, tmp_path / "one"), weights(vlm, tmp_path / "two", smooth="awq")
    assert made.weights.folds
    assert not made.weights.given
    assert not made.weights.schemes
    write_imatrix(tmp_path / "plain.gguf", plain.imatrix)  # type: ignore[arg-type]
    file = weights(vlm, tmp_path / "three", smooth="awq", imatrix=tmp_path / "plain.gguf")
    assert file.report is not None
    for name, entry in made.importance.items():
        assert np.allclose(entry, file.importance[name], rtol=1e-3), name
    assert any(not np.allclose(entry, plain.importance[n], rtol=0.1) for n, entry in made.importance.items())


@pytest.mark.slow
def test_codes_and_the_importance_of_the_rest_come_of_one_pass(vlm: VLM, tmp_path: Path) -> None:
    scheme = exact_scheme(QuantScheme(algorithm="awq+gptq"))
    made = weights(vlm, tmp_path / "work", quant="Q4_0", scheme=scheme)
    assert len(made.weights.given) == 14
    assert made.weights.folds
    assert made.imatrix is None  # nothing is quantized from floats in the layers


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"smooth": "awq", "quant": "Q4_0", "scheme": exact_scheme(QuantScheme())}, "with codes choose --quant awq"),
        ({"smooth": "awq", "quant": "F16"}, "no effect with F16, which quantizes no layer"),
    ],
)
def test_smoothing_is_refused_where_it_does_nothing(
    vlm: VLM, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInputError, match=words):
        weights(vlm, tmp_path / "work", **options)


def test_a_matrix_of_another_model_is_refused_before_any_work(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = weights(vlm, tmp_path / "work").imatrix
    assert made is not None
    powers = {name.replace("blk.1.", "blk.2."): power for name, power in made.powers.items()}
    write_imatrix(tmp_path / "other.gguf", type(made)(powers))
    monkeypatch.setattr("vlmexport.split.capture.split_model", lambda _: pytest.fail("the model was split"))
    with pytest.raises(BadInputError, match=r"another model: this one has no tensor blk\.2\."):
        weights(vlm, tmp_path / "none", smooth="awq", imatrix=tmp_path / "other.gguf")


def test_a_model_that_cannot_be_calibrated_is_told_how_to_do_without(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UnsupportedModelError("tiny: no")

    monkeypatch.setattr("vlmexport.calibrate.loop.capture_batches", refuse)
    with pytest.raises(UnsupportedModelError, match=r"tiny: no; it can be exported without .*: --imatrix none"):
        weights(vlm, tmp_path / "work")
