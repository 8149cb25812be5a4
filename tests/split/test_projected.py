"""Features that a model makes of what its ``get_image_features`` gives are taken from the model's own run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vlmexport.split.features import find_feature_call

WIDTH = 6
PIXELS = {"pixel_values": torch.arange(8.0).reshape(2, 4)}


class Model(nn.Module):
    """Projects hidden states behind its function, and scales what comes of it before it is merged."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        text = SimpleNamespace(hidden_size=WIDTH)
        self.config = SimpleNamespace(model_type="odd", get_text_config=lambda: text)
        self.words = nn.Embedding(3, WIDTH)
        self.other = nn.Linear(4, 4)
        self.projector = nn.Sequential(nn.Linear(4, width))

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=pixel_values * 2, pooler_output=None)

    def forward(self, input_ids: Any, attention_mask: Any, pixel_values: torch.Tensor, use_cache: bool) -> Any:
        words = self.words(input_ids)
        hidden = self.get_image_features(pixel_values).last_hidden_state
        features = self.projector(self.other(hidden).view(-1, 4))
        return words + features.to(words.dtype).sum()


class Inside(Model):
    """Gives features as others do."""

    def get_image_features(self, pixel_values: torch.Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=pixel_values, pooler_output=self.projector(pixel_values))


@torch.no_grad()
def test_the_first_module_of_the_text_s_width_makes_the_features() -> None:
    model = Model()
    got = find_feature_call(model, 1, PIXELS)(PIXELS)
    assert torch.equal(got, model.projector(model.other(PIXELS["pixel_values"] * 2)))
    assert "get_image_features" not in model.__dict__
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_features_that_are_there_are_left_alone() -> None:
    model = Inside()
    got = find_feature_call(model, 1, PIXELS)(PIXELS)
    assert torch.equal(got.pooler_output, model.projector(PIXELS["pixel_values"]))


@torch.no_grad()
@pytest.mark.parametrize("width", [4, 5])
def test_hidden_states_that_nothing_projects_stay_hidden_states(width: int) -> None:
    """So that whoever asks for features refuses them, as before."""
    model = Model(width)
    got = find_feature_call(model, 1, PIXELS)(PIXELS)
    assert got.pooler_output is None
