"""Models that ship with their checkpoint and lack something, each of the interface of one that people use.

Names of methods, attributes and arguments are those of the model that a docstring names; nothing else is.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_own import OwnConfig
from .modeling_own import OwnForConditionalGeneration, OwnPreTrainedModel, Projector, Tower


class PatchedAttention(nn.Module):
    """Softmax written out, as older modelling files have it."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, config.hidden_size // config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
        causal = torch.ones_like(scores[0, 0]).tril(k.shape[2] - q.shape[2])
        weights = scores.masked_fill(causal == 0, torch.finfo(scores.dtype).min).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).flatten(2)), None


class OwnAttentionForCausalLM(OwnForConditionalGeneration):
    """All accessors, and layers `own_layers` whose attention is code of their own."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        for index in getattr(config, "own_layers", (0, 1)):
            self.language_model.model.layers[index].self_attn = PatchedAttention(config.text_config, index)
        self.post_init()


class Phi3VForCausalLM(OwnPreTrainedModel):
    """Phi-3.5-vision: features are put in inside the decoder, at ids below zero; no image token id in the config."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model = LlamaForCausalLM(config.text_config).model
        self.model.vision_embed_tokens = Tower(config.vision)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.model

    def forward(self, input_ids: torch.Tensor, pixel_values: Any = None, image_sizes: Any = None, **_: Any) -> Any:
        raise NotImplementedError


class KimiVLForConditionalGeneration(OwnPreTrainedModel):
    """Kimi-VL: every accessor of the text, features by a method of another name, ``media_placeholder_token_id``."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.vision_tower = Tower(config.vision)
        self.multi_modal_projector = Projector(config.vision, config.text_config.hidden_size)
        self.language_model = LlamaForCausalLM(config.text_config)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def _extract_image_features(self, pixel_values: torch.Tensor, image_grid_hws: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Any = None, pixel_values: Any = None, image_grid_hws: Any = None, **_: Any) -> Any:
        raise NotImplementedError


class DeepseekVLV2ForCausalLM(OwnPreTrainedModel):
    """DeepSeek-VL2: the text model is ``language``, embeddings are made by ``prepare_inputs_embeds``."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.vision = Tower(config.vision)
        self.projector = Projector(config.vision, config.text_config.hidden_size)
        self.language = LlamaForCausalLM(config.text_config)
        self.post_init()

    def prepare_inputs_embeds(self, input_ids: Any, images: Any, images_seq_mask: Any, images_spatial_crop: Any) -> Any:
        raise NotImplementedError

    def forward(self, input_ids: Any = None, images: Any = None, images_seq_mask: Any = None, **_: Any) -> Any:
        raise NotImplementedError


class MiniCPMV(OwnPreTrainedModel):
    """MiniCPM-V: one argument ``data`` with everything in it, the text model is ``llm``, places by ``image_bound``."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.llm = LlamaForCausalLM(config.text_config)
        self.vpm = Tower(config.vision)
        self.resampler = Projector(config.vision, config.text_config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_vllm_embedding(self, data: dict[str, Any]) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, data: dict[str, Any], **_: Any) -> CausalLMOutputWithPast:
        raise NotImplementedError


class _Molmo(nn.Module):
    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        sizes = config.text_config
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(sizes.vocab_size, sizes.hidden_size),
            "ff_out": nn.Linear(sizes.hidden_size, sizes.vocab_size, bias=False),
        })  # fmt: skip
        self.vision_backbone = Tower(config.vision)


class MolmoForCausalLM(OwnPreTrainedModel):
    """Molmo 1: a decoder that is no model of transformers, features added at ``image_input_idx``."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model = _Molmo(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def forward(self, input_ids: Any = None, images: Any = None, image_input_idx: Any = None, **_: Any) -> Any:
        raise NotImplementedError


class HfMoondream(OwnPreTrainedModel):
    """Moondream: a wrapper with ``encode_image`` and ``query``, which has no forward and gives no logits."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.model = nn.ModuleDict({"vision": Tower(config.vision), "text": LlamaForCausalLM(config.text_config)})

    def encode_image(self, image: Any) -> Any:
        raise NotImplementedError

    def query(self, image: Any, question: str) -> Any:
        raise NotImplementedError


class Broken(OwnForConditionalGeneration):
    """Code of another version of transformers: it asks for a function that is no more."""

    def forward(self, input_ids: Any = None, pixel_values: Any = None, past_key_values: Any = None, **_: Any) -> Any:
        return past_key_values.get_usable_length(input_ids.shape[1])
