"""The choices of template, tiles and tokenizer by which llama.cpp and transformers agree."""

from __future__ import annotations

import pytest

pytest.importorskip("xllamacpp")

from tests.demo.conftest import some_questions
from tools.train_fixture.llamacpp import SIZES, LlamaServer, TransformersSide, differences, same_answer
from vlmexport.calibrate.synthetic import TEST_SEEDS, scene
from vlmexport.demo import model_dir


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> LlamaServer:
    return LlamaServer(model_dir(), tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def reference() -> TransformersSide:
    return TransformersSide(model_dir())


def test_two_newlines_are_one_token(server: LlamaServer) -> None:
    assert len(server.token_ids("\n\n")) == 1


@pytest.mark.parametrize("size", SIZES)
def test_one_picture_of_any_size(server: LlamaServer, reference: TransformersSide, size: tuple[int, int]) -> None:
    picture = scene(TEST_SEEDS[0]).image.resize(size)
    assert differences(server, reference, [picture], "Describe the image.") == []


def test_two_pictures(server: LlamaServer, reference: TransformersSide) -> None:
    pictures = [scene(seed).image for seed in TEST_SEEDS[:2]]
    assert differences(server, reference, pictures, "Second image: Describe the image.") == []


def test_text_alone(server: LlamaServer, reference: TransformersSide) -> None:
    assert differences(server, reference, [], "Is 42 + 17 = 59?\n\nTabs\tand  spaces, ü.") == []


def test_several_turns_render_alike(server: LlamaServer, reference: TransformersSide) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is in the image?"},
        {"role": "assistant", "content": "a red star at the left"},
        {"role": "user", "content": "What colour is the star?"},
    ]
    theirs = server.post("/apply-template", {"messages": turns})["prompt"]
    assert theirs == reference.processor.apply_chat_template(turns, add_generation_prompt=True)


def test_greedy_answers(server: LlamaServer, reference: TransformersSide) -> None:
    questions = some_questions(1)
    same = [same_answer(server, reference, question) for question in questions]
    assert sum(same) >= len(questions) - 1
