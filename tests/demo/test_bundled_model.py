from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from tests.demo.conftest import some_questions
from tools.train_fixture.evaluate import generated, score
from vlmexport import demo
from vlmexport.errors import BadInputError

Bundled = tuple[PreTrainedModel, ProcessorMixin]


def test_weights_match_their_pin_and_size_limit() -> None:
    demo.check_model()
    assert sum(file.stat().st_size for file in demo.model_dir().iterdir()) <= 12_000_000


def test_a_wrong_pin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MODEL_SHA256", "1" * 64)
    with pytest.raises(BadInputError, match="sha256"):
        demo.check_model()


def test_model_card_states_the_pin() -> None:
    assert demo.MODEL_SHA256 in (demo.model_dir() / "README.md").read_text(encoding="utf-8")


def test_loads_through_auto_classes_without_torchvision(bundled: Bundled) -> None:
    model, processor = bundled
    assert type(model).__name__ == "Idefics3ForConditionalGeneration"
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 6e6
    assert find_spec("torchvision") is not None or type(processor.image_processor).__name__.endswith("Pil")


def test_config_suits_quantizers_and_llama_cpp() -> None:
    text = json.loads((demo.model_dir() / "config.json").read_text())["text_config"]
    assert text["architectures"] == ["LlamaForCausalLM"]
    assert text["hidden_size"] % 256 == text["intermediate_size"] % 256 == text["vocab_size"] % 256 == 0
    assert text["head_dim"] == 64


@pytest.mark.parametrize(
    ("size", "tiles", "tokens"), [((64, 64), 5, 20), ((96, 64), 5, 20), ((64, 32), 3, 12), ((32, 64), 3, 12)]
)
def test_tiles_by_picture_size(bundled: Bundled, size: tuple[int, int], tiles: int, tokens: int) -> None:
    _, processor = bundled
    inputs = processor(text="<image>", images=[Image.new("RGB", size)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, tiles, 3, 32, 32)
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == tokens


def test_two_pictures_in_one_prompt(bundled: Bundled) -> None:
    model, processor = bundled
    picture = next(question for question in some_questions(1) if question.task == "colour").image
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Second image: Describe the image."}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    with Image.open(picture) as image:
        inputs = processor(text=prompt, images=[image.convert("RGB"), Image.new("RGB", (96, 64))], return_tensors="pt")
    assert inputs["pixel_values"].shape[1] == 10
    with torch.no_grad():
        assert bool(model(**inputs).logits.isfinite().all())


def test_answers_through_the_normal_path(bundled: Bundled) -> None:
    questions = some_questions(3)
    result = score(questions, generated(*bundled, questions))
    assert sum(right for right, _ in result.values()) >= 0.8 * len(questions)


@pytest.mark.slow
def test_every_task_reaches_the_bar(bundled: Bundled) -> None:
    questions = some_questions(10**6)
    result = score(questions, generated(*bundled, questions))
    low = {task: found for task, found in result.items() if found[0] < 0.9 * found[1]}
    assert not low
