"""A decoder whose layers see chunks of 16 tokens, exported, against the whole PyTorch model with its own cache.

Prompts reach into a third chunk, and steps go over the border to the next one. Layers without rotary positions scale
queries by the number of tokens before them, and experts take rows that are scaled by their router.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.zoo import registry
from tests.zoo.proof import FLOATS, STEPS, Zooed, export, relative
from vlmexport.errors import UnsupportedModelError
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.runtime.decoder_inputs import DecoderInputs, merged_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.split.difference import REPLAY_LIMIT
from vlmexport.split.packed import replaced
from vlmexport.split.parts import Role
from vlmexport.target import load_target

LIMIT, CHUNK = 1e-4, 16
pytestmark = [pytest.mark.slow, pytest.mark.family]


@dataclass(frozen=True)
class Exported:
    """The split, and its FP32 export with the standard form of attention."""

    zooed: Zooed
    runner: OnnxRunner

    @property
    def reference(self) -> TorchRunner:
        """PyTorch by the parts."""
        return TorchRunner(self.zooed.vlm, self.zooed.split)

    def inputs(self, *examples: dict[str, torch.Tensor]) -> tuple[DecoderInputs, Any]:
        """What reaches the decoder for a batch of `examples`, and the mask."""
        items = [ModelInputs(e["input_ids"].numpy(), {"pixel_values": e["pixel_values"].numpy()}) for e in examples]
        return merged_inputs(self.reference, items)

    def whole(self, example: dict[str, torch.Tensor]) -> tuple[np.ndarray, DynamicCache]:
        """Logits of the whole model for `example`, and its cache, which keeps a chunk of its layers with chunks."""
        model: Any = self.zooed.vlm.model
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            return model(**example, past_key_values=cache, use_cache=True).logits.numpy(), cache

    def step(self, token: Any, cache: DynamicCache) -> np.ndarray:
        """Logits of the whole model after `token`, int64 ``[1, 1]``."""
        model: Any = self.zooed.vlm.model
        with torch.no_grad():
            return model(input_ids=torch.from_numpy(token), past_key_values=cache, use_cache=True).logits.numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("llama4")
    vlm, examples = registry.make("llama4", folder / "model")
    zooed = Zooed(vlm, split_model(vlm, examples), examples)
    artifact = export(zooed, dataclasses.replace(FLOATS, attention="standard"), folder / "export")
    return Exported(zooed, OnnxRunner(artifact, threads=1, exact=True))


def test_chunks_and_counting_layers_are_found(exported: Exported) -> None:
    split = exported.zooed.split
    part = split.parts[Role.DECODER].module
    assert (part.chunks, part.counted) == ((CHUNK, 0, CHUNK), (1,))
    assert split.replay_difference <= REPLAY_LIMIT
    assert all(example["input_ids"].shape[1] > 2 * CHUNK for example in exported.zooed.examples)


def test_every_position_and_every_step_is_the_whole_model_s(exported: Exported) -> None:
    for example in exported.zooed.examples[1:]:
        inputs, mask = exported.inputs(example)
        wanted, cache = exported.whole(example)
        logits, past = inputs.prefill(exported.runner, mask, 0)
        assert relative(logits, wanted) <= LIMIT
        for _ in range(STEPS):
            token = wanted[:, -1:].argmax(-1).astype(np.int64)
            wanted = exported.step(token, cache)
            assert relative(exported.runner.decode(exported.reference.embed(token), past), wanted) <= LIMIT


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_ragged_batch_of_two_is_its_rows_alone(exported: Exported, side: str) -> None:
    """The reference runs its rows alone: transformers counts padding among the tokens of a chunk."""
    examples = exported.zooed.examples[:2]
    batch, mask = exported.inputs(*examples)
    embeds, lengths = batch.embeds, mask.sum(axis=1)
    if side == "left":
        shifts = mask.shape[1] - lengths
        embeds = np.stack([np.roll(row, shift, axis=0) for row, shift in zip(embeds, shifts, strict=True)])
        mask = np.stack([np.roll(row, shift) for row, shift in zip(mask, shifts, strict=True)])
    assert len(set(lengths)) == len(lengths)
    rows = [exported.whole(example) for example in examples]
    for runner in (exported.runner, exported.reference):
        logits, past = runner.prefill(embeds, mask, 0)
        for row, (wanted, _) in enumerate(rows):
            assert relative(logits[row, mask[row] == 1], wanted[0]) <= LIMIT
    logits, past = exported.runner.prefill(embeds, mask, 1)
    known, other = exported.reference.prefill(embeds, mask, 1)
    caches = [cache for _, cache in rows]
    for _ in range(STEPS):
        tokens = known[:, -1:].argmax(-1).astype(np.int64)
        new = exported.reference.embed(tokens)
        logits, known = exported.runner.decode(new, past), exported.reference.decode(new, other)
        wanted = np.concatenate([exported.step(t[None], c) for t, c in zip(tokens, caches, strict=True)])
        assert relative(logits, wanted) <= LIMIT
        assert relative(known, wanted) <= LIMIT


def test_another_chunk_or_another_scale_is_seen(exported: Exported) -> None:
    """What the proof would say of an export with a wrong number."""
    example = exported.zooed.examples[1]
    inputs, mask = exported.inputs(example)
    logits, _ = inputs.prefill(exported.runner, mask, 0)
    config = exported.zooed.vlm.model.config.get_text_config()
    counting: Any = exported.zooed.split.parts[Role.DECODER].module.decoder.layers[1].self_attn
    for owner, name, value in ((config, "attention_chunk_size", CHUNK + 1), (counting, "floor_scale", 9.0)):
        with replaced(owner, name, value):
            wanted, _ = exported.whole(example)
        assert relative(logits, wanted) > 10 * LIMIT
    assert relative(logits, exported.whole(example)[0]) <= LIMIT


def test_the_other_form_of_attention_is_refused_before_any_work(exported: Exported) -> None:
    zooed, options = exported.zooed, OnnxOptions()
    with pytest.raises(UnsupportedModelError, match=r"llama4: layers .* see chunks of 16 tokens.*--attention standard"):
        plan_export(zooed.vlm, zooed.split, load_target(options.target), options)


def test_features_are_behind_the_projector_that_the_model_applies_itself(exported: Exported) -> None:
    zooed = exported.zooed
    assert zooed.split.parts[Role.PROJECTOR].prefix == "multi_modal_projector."
    pixels = {"pixel_values": zooed.examples[-1]["pixel_values"].numpy()}
    assert relative(exported.runner.image_features(pixels), exported.reference.image_features(pixels)) <= LIMIT
