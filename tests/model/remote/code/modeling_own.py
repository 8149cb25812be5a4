"""A vision-language model that ships with its checkpoint and follows transformers' accessors."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_own import OwnConfig

# Tests look whether this module was imported.
if witness := os.environ.get("VLMEXPORT_TEST_WITNESS"):
    Path(witness).write_text("imported")


class Tower(nn.Module):
    """Patches of 8 x 8 pixels, which see each other's mean: ``[N, 3, H, W]`` to ``[N, patches, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.norm = nn.LayerNorm(width)
        self.own, self.mean = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.patches(pixel_values).flatten(2).transpose(1, 2))
        return x + nn.functional.gelu(self.own(x) + self.mean(x.mean(dim=1, keepdim=True)))


class Projector(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(width, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.gelu(self.up(x)))


class OwnPreTrainedModel(PreTrainedModel):
    """The base of the classes here."""

    config_class = OwnConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True
    main_input_name = "input_ids"


class OwnForConditionalGeneration(OwnPreTrainedModel, GenerationMixin):
    """The whole model: features replace the embeddings of image tokens."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.tower = Tower(config.vision)
        self.projector = Projector(config.vision, config.text_config.hidden_size)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.projector(self.tower(pixel_values))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.get_image_features(pixel_values).flatten(0, 1)
            places = (input_ids == self.config.image_token_id)[..., None].expand_as(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(places, features.to(inputs_embeds.dtype))
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
