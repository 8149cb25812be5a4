"""The image processor's settings: those that transformers reads, with its defaults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoImageProcessor

from vlmexport import gguf_processor
from vlmexport.demo import model_dir
from vlmexport.errors import BadInputError
from vlmexport.gguf_options import gguf_options
from vlmexport.gguf_plan import plan_gguf
from vlmexport.gguf_processor import preprocessor_config
from vlmexport.model.load import VLM, load_vlm

PROCESSOR, PREPROCESSOR = "processor_config.json", "preprocessor_config.json"
TILES = {"image_processor_type": "Idefics3ImageProcessor", "max_image_size": {"longest_edge": 32}}


@pytest.fixture
def vlm(tmp_path: Path) -> VLM:
    """The bundled model without settings of its image processor."""
    for file in model_dir().iterdir():
        if file.name != PROCESSOR:
            shutil.copy(file, tmp_path)
    return load_vlm(str(tmp_path))


def write(vlm: VLM, name: str, content: Any) -> None:
    (vlm.path / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_absent_settings_are_the_classes_own(vlm: VLM) -> None:
    write(vlm, PREPROCESSOR, TILES)
    own = AutoImageProcessor.from_pretrained(vlm.path).to_dict()
    assert own["size"] == {"longest_edge": 1456}
    keys = plan_gguf(vlm, gguf_options()).metadata["mmproj"]
    assert keys["clip.vision.preproc_image_size"] == 1456
    assert keys["clip.vision.image_mean"] == keys["clip.vision.image_std"] == [0.5, 0.5, 0.5]


def test_the_nested_settings_come_first_as_in_transformers(vlm: VLM) -> None:
    write(vlm, PROCESSOR, {"image_processor": {**TILES, "size": {"longest_edge": 96}}, "image_seq_len": 4})
    write(vlm, PREPROCESSOR, {**TILES, "size": {"longest_edge": 64}})
    assert AutoImageProcessor.from_pretrained(vlm.path).size == {"longest_edge": 96}
    assert preprocessor_config(vlm)["size"] == {"longest_edge": 96}
    write(vlm, PROCESSOR, {"image_seq_len": 4})
    assert AutoImageProcessor.from_pretrained(vlm.path).size == {"longest_edge": 64}
    assert preprocessor_config(vlm)["size"] == {"longest_edge": 64}


def test_a_class_that_cannot_be_loaded_leaves_the_file_as_it_is(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        assert kwargs == {"trust_remote_code": False}
        raise ImportError("Lfm2VlImageProcessor requires the Torchvision library")

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", refuse)
    write(vlm, PREPROCESSOR, TILES)
    found = preprocessor_config(vlm)
    assert "<image>" in found.pop("added_tokens")
    assert found == TILES


def test_what_the_class_leaves_open_is_not_added(vlm: VLM) -> None:
    write(vlm, PREPROCESSOR, {**TILES, "do_convert_rgb": None})
    found = preprocessor_config(vlm)
    assert [key for key, value in found.items() if value is None] == ["do_convert_rgb"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("other.json", {}, "no preprocessor_config.json and no image_processor"),
        (PROCESSOR, {"image_seq_len": 4}, "no preprocessor_config.json and no image_processor"),
        (PREPROCESSOR, "{", "preprocessor_config.json is not valid JSON"),
        (PROCESSOR, "{", "processor_config.json is not valid JSON"),
        (PREPROCESSOR, [1], "not a JSON object"),
        (PROCESSOR, {"image_processor": 3}, "image_processor is 3"),
    ],
)
def test_settings_that_are_absent_or_broken(vlm: VLM, name: str, content: Any, words: str) -> None:
    write(vlm, name, content)
    with pytest.raises(BadInputError, match=words):
        preprocessor_config(vlm)


@pytest.mark.parametrize("tokens", ['[{"content": "<image>"}]', "[3]", "3"])
def test_damaged_added_tokens(vlm: VLM, tokens: str) -> None:
    write(vlm, PREPROCESSOR, TILES)
    write(vlm, "tokenizer.json", f'{{"added_tokens": {tokens}}}')
    with pytest.raises(BadInputError, match="added_tokens are damaged"):
        gguf_processor.preprocessor_config(vlm)
