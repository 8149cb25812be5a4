"""Masks that reach the layers are found by looking, rebuilt from the prompt's ids, and anything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.zoo.gemma import FAMILIES, WINDOW, gemma_examples, make_gemma
from vlmexport.errors import UnsupportedModelError
from vlmexport.model.load import VLM, load_vlm
from vlmexport.split import capture
from vlmexport.split.capture import split_model
from vlmexport.split.difference import REPLAY_LIMIT
from vlmexport.split.masks import BlockMasks, _is_causal, visible
from vlmexport.split.parts import Role, Split

CUT = {"gemma3": True, "paligemma2": False}


@pytest.fixture(scope="module", params=FAMILIES)
def taken_apart(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, Split, Any]:
    vlm = load_vlm(str(make_gemma(request.param, tmp_path_factory.mktemp(request.param))))
    examples = gemma_examples(request.param, vlm.facts.image_token_id)
    return vlm, split_model(vlm, examples), examples


def test_the_decoder_part_is_the_whole_model_with_its_own_masks(taken_apart: tuple[VLM, Split, Any]) -> None:
    vlm, split, examples = taken_apart
    part = split.parts[Role.DECODER]
    assert split.replay_difference <= REPLAY_LIMIT
    assert split.merge.extras == ("block_ids",)
    for example, inputs in zip(examples, part.examples, strict=True):
        with torch.no_grad():
            wanted, got = vlm.model(**example).logits, part.module(**inputs)
        assert (got - wanted).abs().max() <= REPLAY_LIMIT * wanted.abs().max()


def test_masks_windows_and_logit_caps_are_found(taken_apart: tuple[VLM, Split, Any]) -> None:
    vlm, split, _ = taken_apart
    family, module = vlm.facts.model_type, split.parts[Role.DECODER].module
    capped = any(window for _, window in module.blocks.windows) and family == "paligemma"
    assert split.merge.mask == ("image_blocks" if family == "gemma3" else "prefix")
    assert split.merge.position_start == (0 if family == "gemma3" else 1)
    assert module.logit_cap == (3.0 if capped else 0.0)
    if len(module.blocks.windows) > 1:
        assert dict(module.blocks.windows) == {"sliding_attention": WINDOW, "full_attention": None}
        assert module.blocks.cut == CUT["gemma3" if family == "gemma3" else "paligemma2"]


def test_without_blocks_the_decoder_is_another_one(taken_apart: tuple[VLM, Split, Any]) -> None:
    _, split, _ = taken_apart
    part = split.parts[Role.DECODER]
    inputs = dict(part.examples[0])
    with torch.no_grad():
        wanted = part.module(**inputs)
        causal = part.module(**{**inputs, "block_ids": torch.zeros_like(inputs["block_ids"])})
        del inputs["block_ids"]
        text = part.module(**inputs)
    assert (causal - wanted).abs().max() > 0.1 * wanted.abs().max()
    assert torch.equal(text, causal)


def test_what_a_window_hides_of_a_block_matters_where_there_are_windows(taken_apart: tuple[VLM, Split, Any]) -> None:
    _, split, _ = taken_apart
    part = split.parts[Role.DECODER]
    blocks = part.module.blocks
    windows = len(blocks.windows) > 1
    with torch.no_grad():
        wanted = part.module(**part.examples[0])
        part.module.blocks = BlockMasks(blocks.windows, cut=not blocks.cut)
        other = part.module(**part.examples[0])
    part.module.blocks = blocks
    assert bool((other - wanted).abs().max() > 0.1 * wanted.abs().max()) == windows


def test_the_visible_keys_of_a_block_a_window_and_a_past() -> None:
    blocks, valid = torch.tensor([[0, 1, 1, 1]]), torch.ones(1, 6)
    shown = {cut: visible(blocks, valid, 2, cut=cut)[0, 0].int().tolist() for cut in (True, False)}
    assert shown[True] == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]
    assert shown[False] == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    padded = visible(torch.tensor([[1, 1, 1]]), torch.tensor([[1, 1, 0]]), None, cut=True)[0, 0].int().tolist()
    assert padded == [[1, 1, 0]] * 3


def test_a_padded_batch_has_the_logits_of_its_rows(taken_apart: tuple[VLM, Split, Any]) -> None:
    _, split, _ = taken_apart
    part = split.parts[Role.DECODER]
    short, long = part.examples[:2]
    before, total = short["inputs_embeds"].shape[1], long["inputs_embeds"].shape[1]
    batch = {name: torch.cat([long[name], long[name]]) for name in long}
    for name, tensor in short.items():
        batch[name][1, :before] = tensor[0]
    batch["attention_mask"][1, before:] = 0
    with torch.no_grad():
        rows, wanted = part.module(**batch), part.module(**short)
    assert total > before
    assert (rows[1, :before] - wanted[0]).abs().max() <= REPLAY_LIMIT * wanted.abs().max()


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_mask_that_follows_from_no_blocks_is_refused(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load_vlm(str(make_gemma(family, tmp_path)))
    real = capture.capture_decoder_call

    def altered(model: Any, inputs: Any) -> Any:
        call = real(model, inputs)
        given = call.kwargs["attention_mask"]
        masks = given if isinstance(given, dict) else {"": given}
        changed = {name: mask.clone() for name, mask in masks.items()}
        changed[next(iter(changed))][..., -1, 1] = False
        call.kwargs["attention_mask"] = changed.get("", changed)
        return call

    monkeypatch.setattr(capture, "capture_decoder_call", altered)
    what = "every layer" if family == "paligemma" else r"mask '\w+'"
    with pytest.raises(UnsupportedModelError, match=f"{family}: {what} uses a mask that is neither causal"):
        split_model(vlm, gemma_examples(family, vlm.facts.image_token_id))


def test_a_layer_that_makes_a_mask_of_its_own_is_refused(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    vlm = load_vlm(str(tiny_llava))
    real = masking_utils.eager_mask

    def open_block(*args: Any, **kwargs: Any) -> Any:
        mask = real(*args, **kwargs)
        if mask.shape[-1] > 4:  # the look at the cache has fewer tokens
            mask[..., 2, 4] = 0.0
        return mask

    monkeypatch.setattr(masking_utils, "eager_mask", open_block)
    with pytest.raises(UnsupportedModelError, match="llava: layer 0 uses a mask that is neither causal"):
        split_model(vlm)


def test_a_layer_that_sees_everything_without_a_mask_is_refused(tmp_path: Path) -> None:
    vlm = load_vlm(str(make_gemma("paligemma", tmp_path)))
    examples = gemma_examples("paligemma", vlm.facts.image_token_id)
    for example in examples:  # transformers then leaves masks out, and its layers are not causal
        del example["token_type_ids"], example["attention_mask"]
    with pytest.raises(UnsupportedModelError, match="paligemma: layer 0 uses a mask"):
        split_model(vlm, examples)


def test_causal_and_windowed_masks_are_told_from_others() -> None:
    causal = torch.full((1, 1, 4, 4), -1e9).triu(1)
    assert _is_causal(causal, None)
    assert not _is_causal(causal, 2)
    windowed = causal + torch.full((4, 4), -1e9).tril(-2)
    assert _is_causal(windowed, 2)
    opened = causal.clone()
    opened[..., 0, 3] = 0
    assert not _is_causal(opened, None)
