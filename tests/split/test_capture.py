"""The generic split reproduces the whole model on families nobody wrote code for, and refuses what it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import load_vlm
from vlmexport.split.capture import REPLAY_LIMIT, split_model
from vlmexport.split.decoder import _is_causal
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role


@pytest.mark.parametrize("family", ["idefics3", "llava", "vipllava"])
def test_the_parts_reproduce_the_model(family: str, request: pytest.FixtureRequest) -> None:
    vlm = load_vlm(str(request.getfixturevalue(f"tiny_{family}")))
    split = split_model(vlm)
    assert split.replay_difference <= REPLAY_LIMIT
    assert set(split.parts) == set(Role)
    assert (split.merge.place, split.merge.mask, split.merge.extras) == ("scatter", "causal", ())
    assert split.merge.image_token_id == vlm.facts.image_token_id


def test_a_tied_head_has_its_own_name(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    head: Any = vlm.model.get_output_embeddings()
    head.weight = vlm.model.get_input_embeddings().weight
    assert list(weight_names(vlm.model, head)) == ["lm_head.weight"]


def test_a_decoder_that_scales_its_embeddings_elsewhere_is_refused(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    table: Any = vlm.model.get_input_embeddings()
    forward = vlm.model.base_model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        kwargs["inputs_embeds"] = None
        hook = table.register_forward_hook(lambda _m, _a, out: out * 2)
        try:
            return forward(*args, **kwargs)
        finally:
            hook.remove()

    vlm.model.base_model.forward = doubled
    with pytest.raises(UnsupportedModelError, match=r"llava: the replayed merged embeddings differ .* by \d"):
        split_model(vlm)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("deepstack_visual_embeds", torch.zeros(1), "the decoder also takes deepstack_visual_embeds"),
        ("position_ids", torch.zeros(3, 1, 40, dtype=torch.int64), "3-D positions"),
        ("position_ids", torch.arange(1, 41)[None], "positions do not count from 0"),
        ("attention_mask", {"full_attention": None}, "its own mask"),
    ],
)
def test_other_merge_strategies_are_refused_by_name(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch, argument: str, value: Any, message: str
) -> None:
    from vlmexport.split import capture

    vlm = load_vlm(str(tiny_llava))
    real = capture.capture_decoder_call

    def altered(model: Any, inputs: Any) -> Any:
        call = real(model, inputs)
        call.kwargs[argument] = value
        return call

    monkeypatch.setattr(capture, "capture_decoder_call", altered)
    with pytest.raises(UnsupportedModelError, match=f"llava.*{message}"):
        split_model(vlm)


def test_a_mask_that_lets_image_tokens_see_each_other_is_refused(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    vlm = load_vlm(str(tiny_llava))
    real = masking_utils.eager_mask

    def open_block(*args: Any, **kwargs: Any) -> Any:
        mask = real(*args, **kwargs)
        mask[..., 2, 4] = 0.0
        return mask

    monkeypatch.setattr(masking_utils, "eager_mask", open_block)
    with pytest.raises(UnsupportedModelError, match="layer 0 uses a mask that is not causal"):
        split_model(vlm)


def test_causal_and_windowed_masks_are_told_from_others() -> None:
    causal = torch.full((1, 1, 4, 4), -1e9).triu(1)
    assert _is_causal(causal, None)
    assert not _is_causal(causal, 2)
    windowed = causal + torch.full((4, 4), -1e9).tril(-2)
    assert _is_causal(windowed, 2)
    opened = causal.clone()
    opened[..., 0, 3] = 0
    assert not _is_causal(opened, None)


@pytest.mark.parametrize("side", ["language_model", "vision_tower"])
def test_a_weight_with_nan_is_named(tiny_llava: Path, side: str) -> None:
    vlm = load_vlm(str(tiny_llava))
    name, weight = next((n, p) for n, p in vlm.model.named_parameters() if side in n and n.endswith("q_proj.weight"))
    weight.data[1, 2] = float("nan")
    with pytest.raises(BadInputError, match=rf"^{name}: the weight holds NaN or infinity; the checkpoint is damaged"):
        split_model(vlm)
