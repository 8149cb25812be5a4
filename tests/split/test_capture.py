"""The generic split reproduces the whole model on families nobody wrote code for, and refuses what it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import load_vlm
from vlmexport.split.capture import split_model
from vlmexport.split.difference import REPLAY_LIMIT
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role


@pytest.mark.parametrize("family", ["idefics3", "llava", "vipllava"])
def test_the_parts_reproduce_the_model(family: str, request: pytest.FixtureRequest) -> None:
    vlm = load_vlm(str(request.getfixturevalue(f"tiny_{family}")))
    split = split_model(vlm)
    assert split.replay_difference <= REPLAY_LIMIT
    assert set(split.parts) == set(Role) - {Role.ENCODER}  # no encoder of text
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
    with pytest.raises(
        UnsupportedModelError, match=r"llava: the embeddings of tokens .* are replaced in prompts with images"
    ):
        split_model(vlm)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("deepstack_visual_embeds", torch.zeros(1), "the decoder also takes deepstack_visual_embeds"),
        ("position_ids", torch.zeros(3, 1, 40, dtype=torch.int64), "its inputs have no image_grid_thw"),
        ("position_ids", torch.arange(0, 80, 2)[None], "positions do not count up from 0"),
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


@pytest.mark.parametrize("side", ["language_model", "vision_tower"])
def test_a_weight_with_nan_is_named(tiny_llava: Path, side: str) -> None:
    vlm = load_vlm(str(tiny_llava))
    name, weight = next((n, p) for n, p in vlm.model.named_parameters() if side in n and n.endswith("q_proj.weight"))
    weight.data[1, 2] = float("nan")
    with pytest.raises(BadInputError, match=rf"^{name}: the weight holds NaN or infinity; the checkpoint is damaged"):
        split_model(vlm)
