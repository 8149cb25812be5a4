"""Families whose processors need torchvision, with their own processors, through the command and its gate.

Run by ``make test-torchvision``, in an environment of its own: torchvision has no CPU build that pip finds, so torch's
CUDA build comes with it (it runs on a CPU). Elsewhere these tests are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", reason="torchvision is not installed; `make test-torchvision` has it")

from tests.families.tiny_gguf import make_checkpoint
from tests.families.tiny_qwen import make_tiny_qwen
from tests.torchvision.processors import OTHERS, ZOO, make_zoo
from vlmexport.cli.main import run
from vlmexport.manifest import open_artifact
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.verify.inputs import standard_probes

pytestmark = [pytest.mark.slow, pytest.mark.torchvision]


def _qwen(family: str) -> Callable[[Path], Path]:
    return lambda folder: make_tiny_qwen(family, folder)


def _with_processor(family: str, change: Callable[[Any, dict[str, Any]], Any]) -> Callable[[Path], Path]:
    """A checkpoint of the GGUF tests, with a processor of the real class in place of settings written by hand."""

    def make(folder: Path) -> Path:
        from transformers import AutoTokenizer

        make_checkpoint(family, folder)
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        change(AutoTokenizer.from_pretrained(folder), settings).save_pretrained(folder)
        return folder

    return make


def _pixtral(tokenizer: Any, settings: dict[str, Any]) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    images = PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    words = {
        "image_token": "<image>",
        "image_break_token": "<|im_start|>",
        "image_end_token": "<fake_token_around_image>",
    }
    return PixtralProcessor(images, tokenizer, patch_size=8, chat_template=tokenizer.chat_template, **words)


def _zoo(family: str) -> Callable[[Path], Path]:
    return lambda folder: make_zoo(family, folder)


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": _qwen("qwen2_vl"),
    "qwen2_5_vl": _qwen("qwen2_5_vl"),
    "qwen3_vl": _qwen("qwen3_vl"),
    "qwen3_vl_moe": _qwen("qwen3_vl_moe"),
    "pixtral": _with_processor("pixtral", _pixtral),
    **{family: _zoo(family) for family in ZOO},
    **OTHERS,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_the_command_with_its_own_processor(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    builder = PromptBuilder(folder)
    assert "Pil" not in type(builder.processor.image_processor).__name__
    made = builder.build(list(standard_probes()[0].images), "What is it?")
    assert made.pixel_inputs
    out = tmp_path / "out"
    # A random model tells nothing of the loss of a quantization: floats, where the gate leaves rounding alone.
    arguments = ["onnx", "--model", str(folder), "--out", str(out), "--quant", "none", "--encoder-dtype", "fp32"]
    assert run([*arguments, "--decoder-dtype", "fp32", "--json", str(tmp_path / "report.json")]) == 0
    report = open_artifact(out).manifest.results["verify"]
    assert report["status"] == "passed"
    ran = {check["name"] for check in report["checks"] if check["status"] == "passed"}
    assert {"processor/prompt_ids", "processor/pixels"} <= ran
    assert any(name.startswith("vision_encoder/features") for name in ran)
