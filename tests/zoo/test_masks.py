"""Exports of decoders whose prompts hold blocks of tokens that see each other, against the whole PyTorch model.

Every position counts, not the last one alone, and decoding goes on with PyTorch's own cache.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.zoo.gemma import Example, gemma_examples, make_gemma
from tests.zoo.proof import FLOATS, STEPS, Zooed, export, relative
from vlmexport.model.load import load_vlm
from vlmexport.runtime.decoder_inputs import DecoderInputs, merged_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model

LIMIT = 1e-4
_FAMILY = [pytest.mark.slow, pytest.mark.family]
FORMS = [
    pytest.param(("gemma3", "gqa"), marks=pytest.mark.slow),
    pytest.param(("gemma3", "standard"), marks=_FAMILY),
    pytest.param(("paligemma", "gqa"), marks=_FAMILY),
    pytest.param(("paligemma", "standard"), marks=_FAMILY),
    pytest.param(("paligemma2", "gqa"), marks=_FAMILY),
    pytest.param(("paligemma2", "standard"), marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Exported:
    """A family's split, and its export in ONNX Runtime."""

    zooed: Zooed
    runner: OnnxRunner

    @property
    def reference(self) -> TorchRunner:
        """PyTorch by the parts; its embeddings are not rounded to the table's float16."""
        return TorchRunner(self.zooed.vlm, self.zooed.split)

    def inputs(self, *examples: Example) -> tuple[DecoderInputs, Any]:
        """What reaches the decoder for a batch of `examples`, and the mask."""
        return merged_inputs(self.reference, [_model_inputs(example) for example in examples])

    def step(self, tokens: Any, cache: Any) -> Any:
        """Logits after `tokens` ``[batch, 1]``."""
        return self.runner.decode(self.reference.embed(tokens), cache)


@pytest.fixture(scope="module", params=FORMS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    family, attention = request.param
    folder = tmp_path_factory.mktemp(family)
    vlm = load_vlm(str(make_gemma(family, folder / "model")))
    examples = gemma_examples(family, vlm.facts.image_token_id)
    zooed = Zooed(vlm, split_model(vlm, examples), examples)
    artifact = export(zooed, dataclasses.replace(FLOATS, attention=attention), folder / "export")
    return Exported(zooed, OnnxRunner(artifact, threads=1))


def test_every_position_and_every_step_is_the_whole_model_s(exported: Exported) -> None:
    for example in exported.zooed.examples:
        inputs, mask = exported.inputs(example)
        reference = _Whole(exported.zooed, example)
        logits, cache = inputs.prefill(exported.runner, mask, 0)
        assert relative(logits, reference.logits) <= LIMIT
        for _ in range(STEPS):
            token = reference.next_token()
            logits = exported.step(token, cache)
            assert relative(logits, reference.step(token)) <= LIMIT


def test_a_ragged_batch_is_its_rows_alone(exported: Exported) -> None:
    examples = exported.zooed.examples
    batch, mask = exported.inputs(*examples)
    logits, cache = batch.prefill(exported.runner, mask, 0)
    references = [_Whole(exported.zooed, example) for example in examples]
    for row, reference in enumerate(references):
        assert relative(logits[row, : reference.tokens], reference.logits[0]) <= LIMIT
    for _ in range(3):
        tokens = np.concatenate([reference.next_token() for reference in references])
        logits = exported.step(tokens, cache)
        for row, reference in enumerate(references):
            assert relative(logits[row], reference.step(tokens[row : row + 1])[0]) <= LIMIT


def test_the_runners_agree_on_prompts_with_and_without_blocks(exported: Exported) -> None:
    inputs, mask = exported.inputs(exported.zooed.examples[1])
    wanted = inputs.prefill(exported.reference, mask, 0)[0]
    assert relative(inputs.prefill(exported.runner, mask, 0)[0], wanted) <= LIMIT
    text = DecoderInputs(inputs.embeds)
    causal = text.prefill(exported.reference, mask, 0)[0]
    assert relative(text.prefill(exported.runner, mask, 0)[0], causal) <= LIMIT
    assert relative(causal, wanted) > 0.1


def test_a_block_that_goes_on_in_a_later_call_is_cut_alike(exported: Exported) -> None:
    inputs, mask = exported.inputs(exported.zooed.examples[1])
    found = []
    for runner in (exported.runner, exported.reference):
        _, cache = inputs.tokens(0, 9).prefill(runner, mask[:, :9], 0)
        found.append(inputs.tokens(9).decode(runner, cache, 0))
    assert relative(*found) <= LIMIT


def _model_inputs(example: Example) -> ModelInputs:
    pixels = {n: t.numpy() for n, t in example.items() if n == "pixel_values"}
    return ModelInputs(example["input_ids"].numpy(), pixels)


class _Whole:
    """The whole PyTorch model on one prompt, with a cache of its own."""

    def __init__(self, zooed: Zooed, example: Example) -> None:
        self.model: Any = zooed.vlm.model
        self.start = zooed.split.merge.position_start
        self.cache = DynamicCache()
        self.tokens = example["input_ids"].shape[1]
        self.logits = self._run(**example)

    def next_token(self) -> Any:
        """The best next token, int64 ``[1, 1]``."""
        return self.logits[:, -1:].argmax(-1).astype(np.int64)

    def step(self, token: Any) -> Any:
        """Logits after `token`."""
        position = torch.tensor([[self.tokens + self.start]])
        self.tokens += 1
        mask = torch.ones(1, self.tokens, dtype=torch.int64)
        self.logits = self._run(input_ids=torch.from_numpy(token), attention_mask=mask, position_ids=position)
        return self.logits

    @torch.no_grad()
    def _run(self, **inputs: Any) -> Any:
        return self.model(**inputs, past_key_values=self.cache, use_cache=True).logits.numpy()
