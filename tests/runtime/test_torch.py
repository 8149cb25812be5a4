"""The PyTorch runner against the whole model, and weight substitution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vlmexport.errors import BadInputError
from vlmexport.model.load import VLM, load_vlm
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.generate import generate_ids
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.sampling import Sampling
from vlmexport.runtime.torch import TorchRunner


@pytest.fixture(scope="module")
def prompts(vlm: VLM, pictures: list[Path]) -> list[ModelInputs]:
    builder = PromptBuilder(vlm.path)
    return [
        builder.build(pictures[:1], "what is in the picture?"),
        builder.build(pictures, "read the word."),
        builder.build([], "how many?"),
    ]


def whole_model(vlm: VLM, item: ModelInputs) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.from_numpy(item.input_ids)} | {k: torch.tensor(v) for k, v in item.pixel_inputs.items()}


def test_prefill_equals_the_whole_model(vlm: VLM, torch_runner: TorchRunner, prompts: list[ModelInputs]) -> None:
    for item in prompts:
        with torch.no_grad():
            expected = vlm.model(**whole_model(vlm, item)).logits.numpy()
        inputs, mask = merged_inputs(torch_runner, [item])
        logits, _ = inputs.prefill(torch_runner, mask, 0)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_padded_batch_generates_what_single_prompts_do(
    vlm: VLM, torch_runner: TorchRunner, prompts: list[ModelInputs]
) -> None:
    sampling = Sampling(max_new_tokens=6)
    batch = generate_ids(torch_runner, prompts, sampling).tokens
    assert [generate_ids(torch_runner, [p], sampling).tokens[0] for p in prompts] == list(batch)
    for item, tokens in zip(prompts, batch, strict=True):
        with torch.no_grad():
            out = vlm.model.generate(**whole_model(vlm, item), max_new_tokens=6, do_sample=False)
        generated = out[0, item.input_ids.shape[1] :].tolist()
        assert generated[: len(tokens)] == list(tokens)


def test_substitute_replaces_and_restores(vlm: VLM, torch_runner: TorchRunner, prompts: list[ModelInputs]) -> None:
    inputs, mask = merged_inputs(torch_runner, prompts[:1])
    before, _ = inputs.prefill(torch_runner, mask)
    name = "lm_head.weight"
    with torch_runner.substituted({name: torch.zeros_like(vlm.model.lm_head.weight)}):
        assert not inputs.prefill(torch_runner, mask)[0].any()
    np.testing.assert_array_equal(inputs.prefill(torch_runner, mask)[0], before)


def test_a_tied_head_is_replaced_alone(vlm: VLM, tiny_idefics3: Path) -> None:
    model = load_vlm(str(tiny_idefics3))
    table, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
    head.weight = table.weight
    runner = TorchRunner(model)
    with runner.substituted({"lm_head.weight": torch.zeros_like(head.weight)}):
        assert table.weight.any()
        assert not head.weight.any()
    assert head.weight is table.weight


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [("lm_head.weight", (2, 3), "has shape"), ("nowhere.weight", (1,), "is not a weight"), ("x", (1,), "not a weight")],
)
def test_substitute_refuses(torch_runner: TorchRunner, name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        torch_runner.substitute({name: torch.zeros(shape)})


def test_vision_without_a_split_is_refused(torch_runner: TorchRunner) -> None:
    with pytest.raises(BadInputError, match="without a split"):
        torch_runner.vision({})
