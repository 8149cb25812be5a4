"""What the page shows beside the gate: answers with pictures, speed and memory, sizes, sensitivity."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.verify.synthetic import green_report
from vlmexport.calibrate.judge import Divergence
from vlmexport.calibrate.sensitivity import ModuleEffect, Sensitivity
from vlmexport.cli.main import run
from vlmexport.errors import BadInputError
from vlmexport.manifest import FileRecord, Manifest, PartFile
from vlmexport.quantize.scheme import make_scheme
from vlmexport.verify.report import html
from vlmexport.verify.report.sections import (
    THUMBNAIL_SIDE,
    Beside,
    answered_questions,
    chosen_answers,
    heat_map,
    read_beside,
    size_breakdown,
    speed_and_memory,
)
from vlmexport.verify.result import AnsweredQuestion

BENCH: dict[str, Any] = {
    "runtime": "ONNX Runtime on the CPU",
    "artifact": {"ttft_ms": 80.0, "decode_tok_s": 187.0, "size_bytes": 5_777_000},
    "references": {"pytorch_fp32": {"ttft_ms": 104.0, "decode_tok_s": 80.0, "size_bytes": 8_505_000}},
    "settings": {"threads": 2, "rounds": 3, "prompt_tokens": 51},
}
MAP = Sensitivity(
    "demo",
    make_scheme("rtn", 4),
    (
        ModuleEffect("a.0.q", 0, "self_attn.q_proj", 64, 1e-3, 2e-3),
        ModuleEffect("head", None, "lm_head", 64, 1e-4, 1e-3),
    ),
    Divergence(1e-2, 2e-2, 1e-2, 8, 100),
    (),
)


def answered(number: int, task: str = "colour", answer: str = "red", images: tuple[str, ...] = ()) -> AnsweredQuestion:
    right = answer == "red"
    return AnsweredQuestion(task, f"Question {number}?", images, ("red",), answer, "red", right, True)


def manifest() -> Manifest:
    weights = [
        {"name": "a", "part": "decoder", "bytes_before": 4_000_000, "bytes_after": 1_000_000},
        {"name": "b", "part": "projector", "bytes_before": 500_000, "bytes_after": 500_000},
    ]
    files = {
        name: FileRecord("", size) for name, size in (("d.onnx", 10), ("d.onnx_data", 1_500_000), ("x.json", 7_000))
    }
    parts = {"decoder": PartFile("d.onnx", (), ())}
    return Manifest("split", "cpu", {}, {}, {}, {"weights": weights}, parts, (), (), files)


def test_answers_that_differ_come_first_then_one_of_each_task() -> None:
    answers = [*(answered(n) for n in range(9)), answered(9, "shape"), answered(10, answer="blue")]
    chosen = chosen_answers(answers)
    assert [a.question for a in chosen[:3]] == ["Question 10?", "Question 0?", "Question 9?"]
    assert len(chosen) == len(set(chosen)) == 8


def test_a_card_has_the_picture_and_both_answers(tmp_path: Path) -> None:
    Image.new("RGB", (900, 300), (200, 10, 10)).save(tmp_path / "p.png")
    section = answered_questions([answered(1, answer="<blue>", images=(str(tmp_path / "p.png"),))])
    assert '<dd class="failed">&lt;blue&gt;</dd>' in section
    assert '<dd class="passed">red</dd>' in section
    data = re.search(r'src="data:image/png;base64,([^"]+)"', section)
    assert data is not None
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as picture:
        assert max(picture.size) == THUMBNAIL_SIDE
    gone = answered_questions([answered(1, images=(str(tmp_path / "gone.png"),))])
    assert "gone.png" in gone
    assert "<img" not in gone


def test_the_bars_are_those_of_the_measurement() -> None:
    section = speed_and_memory(BENCH)
    assert section.count("<svg") == 3
    widths = [float(w) for w in re.findall(r'class="bar \w+" x="\d+" y="[\d.]+" width="([\d.]+)"', section)]
    assert widths[0] / widths[1] == pytest.approx(80 / 104, rel=1e-2)
    assert widths[2] / widths[3] == pytest.approx(187 / 80, rel=1e-2)
    alone = speed_and_memory({**BENCH, "references": {}, "settings": {"references": "not measured: gone"}})
    assert "PyTorch not measured: gone" in alone


def test_sizes_are_those_of_parts_and_the_rest_of_the_folder() -> None:
    section = size_breakdown(manifest())
    assert "takes 1.5 MB; its weights took 4.5 MB" in section
    assert {"decoder checkpoint: 4 MB", "decoder export: 1 MB", "other files export: 0.007 MB"} <= set(
        re.findall(r"<title>([^<]+)</title>", section)
    )


def test_the_heat_map_reads_back_what_sensitivity_writes(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.json"
    file.write_text(json.dumps(MAP.to_dict()))
    beside = read_beside(tmp_path / "no-folder", None, file)
    assert beside.sensitivity == MAP
    assert "1.0e-3" in heat_map(MAP)
    file.write_text(json.dumps({**MAP.to_dict(), "version": 99}))
    with pytest.raises(BadInputError, match="version 99"):
        read_beside(tmp_path / "no-folder", None, file)


@pytest.mark.parametrize("text", ["{", "[]", '{"runtime": 1}'])
def test_a_file_that_is_something_else_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(BadInputError, match="is not what `vlmexport bench --json` writes"):
        read_beside(tmp_path / "no-folder", file, None)


def test_the_page_has_every_section_and_loads_nothing() -> None:
    page = html.page(green_report(), Beside(manifest(), BENCH, MAP))
    for title in ("Error per part", "Speed and memory", "Size", "Sensitivity per layer", "All checks"):
        assert f"<h2>{title}</h2>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<script" not in page


def test_files_for_the_page_need_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(tmp_path), "--bench", str(tmp_path / "b.json")]) == 2
    assert "--bench is for the page; give --html FILE, too" in capsys.readouterr().err
