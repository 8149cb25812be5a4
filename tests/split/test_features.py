"""What a model gives ``get_image_features`` is seen in a call of the model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.features import find_feature_call

PIXELS = {"pixel_values_images": torch.ones(1, 3)}


class Model(nn.Module):
    """Gives its only picture under another name."""

    config = SimpleNamespace(model_type="odd")

    def get_image_features(self, pixel_values: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        return pixel_values * 2

    def given(self, pixels: torch.Tensor) -> Any:
        return self.get_image_features(pixels, layer=3)

    def forward(self, input_ids: Any, attention_mask: Any, pixel_values_images: torch.Tensor, use_cache: bool) -> Any:
        return self.given(pixel_values_images)


class Changing(Model):
    """Computes with its inputs before it asks for features."""

    def given(self, pixels: torch.Tensor) -> Any:
        return self.get_image_features(pixels + 1)


class Silent(Model):
    """Never asks for features."""

    def given(self, pixels: torch.Tensor) -> Any:
        return pixels


class Blind(nn.Module):
    """Has no features."""

    config = SimpleNamespace(model_type="odd")


def test_the_argument_of_an_input_is_found_and_the_model_left_as_it_was() -> None:
    model = Model()
    ask = find_feature_call(model, 1, PIXELS)
    assert ask.arguments == {"pixel_values_images": "pixel_values"}
    assert torch.equal(ask(PIXELS), PIXELS["pixel_values_images"] * 2)
    assert "get_image_features" not in model.__dict__


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Changing(), "gets pixel_values, which is none of the inputs"),
        (Silent(), "does not call get_image_features"),
        (Blind(), "has no get_image_features"),
    ],
)
def test_what_cannot_be_seen_is_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"odd: .*{reason}"):
        find_feature_call(model, 1, PIXELS)
