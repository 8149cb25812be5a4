"""Sensitivity: every quantizable module once, the right one on top, and refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from vlmexport import api
from vlmexport.calibrate.heatmap import Scale, page, short_number, write_report
from vlmexport.calibrate.judge import Divergence
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.sensitivity import ModuleEffect, Sensitivity, held_out_batches, measure_sensitivity
from vlmexport.errors import BadInputError
from vlmexport.model.importers.packed import CodeFormat, QuantizedCheckpoint
from vlmexport.model.load import VLM, load_vlm
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import make_scheme
from vlmexport.split.capture import split_model

FEW = CalibrationOptions(samples=8)


@pytest.fixture(scope="module")
def demo() -> VLM:
    return load_vlm("demo")


def test_every_module_is_measured_and_the_damaged_one_stands_out() -> None:
    demo = load_vlm("demo")
    name = "model.text_model.layers.2.mlp.up_proj.weight"
    # One huge value in every group leaves no levels for the others.
    with torch.no_grad():
        demo.model.get_parameter(name)[:, ::32] *= 100.0
    found = measure_sensitivity(demo, split_model(demo), make_scheme("rtn", 4), FEW, SilentProgress())
    assert len(found.effects) == 4 * 7 + 1
    assert found.layers == [0, 1, 2, 3]
    assert found.kinds[0] == "self_attn.q_proj"
    assert [e.kind for e in found.outside] == ["lm_head"]
    assert max(found.effects, key=lambda e: e.kl).name == name
    cell = found.cell(2, "mlp.up_proj")
    assert cell is not None
    assert cell.upper >= cell.kl > 0
    assert found.together.kl > 0.2 * cell.kl
    data = json.loads(json.dumps(found.to_dict()))
    assert {m["name"] for m in data["modules"]} == {e.name for e in found.effects}


def test_eight_bits_hurt_far_less(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    split = split_model(vlm)
    four, eight = (measure_sensitivity(vlm, split, make_scheme("rtn", b), FEW, SilentProgress()) for b in (4, 8))
    for coarse, fine in zip(four.effects, eight.effects, strict=True):
        assert coarse.name == fine.name
        assert fine.kl < coarse.kl / 50


def test_refusals(demo: VLM) -> None:
    split = split_model(demo)
    with pytest.raises(BadInputError, match=r"without calibration; awq\+gptq needs it"):
        measure_sensitivity(demo, split, make_scheme("awq+gptq"), FEW, SilentProgress())


def test_held_out_samples_follow_those_that_calibrate(demo: VLM, tmp_path: Path) -> None:
    first, notes = held_out_batches(demo, CalibrationOptions(), 4, 6)
    longer, _ = held_out_batches(demo, CalibrationOptions(), 0, 10)
    found = [row[valid] for b in first for row, valid in zip(b.input_ids, b.valid, strict=True)]
    wanted = [row[valid] for b in longer for row, valid in zip(b.input_ids, b.valid, strict=True)][4:]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert notes == []
    for index in range(5):
        Image.new("RGB", (64, 64), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
    shared, notes = held_out_batches(demo, CalibrationOptions(str(tmp_path)), 3, 4)
    assert sum(b.valid.shape[0] for b in shared) == 4
    assert notes == ["2 of 4 held-out samples were calibrated on too: there are no others"]


def drawn(*kls: float) -> Sensitivity:
    effects = tuple(ModuleEffect(f"layers.{i}.q.weight", i, "self_attn.q", 4, kl, 2 * kl) for i, kl in enumerate(kls))
    head = ModuleEffect("lm_head.weight", None, "lm_head", 4, kls[0], kls[0])
    return Sensitivity("me/<model>", make_scheme("rtn"), (*effects, head), Divergence(0.1, 0.2, 0.05, 3, 9), ("a & b",))


def test_the_scale_covers_the_values_in_whole_decades() -> None:
    scale = Scale.of(drawn(3e-5, 4e-3).effects)
    assert (scale.low, scale.high) == (pytest.approx(1e-5), pytest.approx(1e-2))
    assert scale.ticks() == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])
    assert (scale.position(0.0), scale.position(1.0)) == (0.0, 1.0)
    assert scale.position(1e-3) == pytest.approx(2 / 3)
    assert sum(scale.colour(1e-2)) < sum(scale.colour(1e-4)) < sum(scale.colour(1e-5))
    wide = Scale.of(drawn(1e-12, 1e-1).effects)
    assert wide.high / wide.low == pytest.approx(1e5)
    assert Scale.of(drawn(0.0, 0.0).effects).high == 1.0


def test_numbers_are_short() -> None:
    assert [short_number(v) for v in (0.0, 1.234e-4, 0.5, 2.0)] == ["0", "1.2e-4", "5.0e-1", "2.0e0"]


def test_the_report_is_a_picture_a_page_and_numbers(tmp_path: Path) -> None:
    found = drawn(1e-6, 1e-3)
    write_report(found, tmp_path / "out")
    image = Image.open(tmp_path / "out" / "heatmap.png")
    assert image.mode == "RGB"
    colours = {colour for _, colour in image.getcolors(1 << 20) or []}
    assert Scale.of(found.effects).colour(1e-3) in colours
    html = (tmp_path / "out" / "heatmap.html").read_text()
    assert "me/&lt;model&gt;" in html
    assert "a &amp; b" in html
    assert "layers.1.q.weight: 1.00e-03, 95 % limit 2.00e-03" in html
    assert "<script" not in page(found)
    assert json.loads((tmp_path / "out" / "sensitivity.json").read_text()) == found.to_dict()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="is a file; give a folder"):
        write_report(found, tmp_path / "file")


def test_a_folder_that_cannot_be_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInputError, match=r"file is a file; give a folder"):
            api.measure_sensitivity("no-such-model", make_scheme("rtn", 4), out=out)


def test_a_quantized_model_is_refused(demo: VLM) -> None:
    kept = QuantizedCheckpoint("gptq", {"w": CodeFormat(4, 32, True, "", 64, 0, False)}, {})
    quantized = dataclasses.replace(demo, quantized=kept)
    with pytest.raises(BadInputError, match=r"demo is quantized already .gptq 4-bit g32 sym.*original weights"):
        measure_sensitivity(quantized, split_model(demo), make_scheme("rtn", 4), FEW, SilentProgress())
