"""Tiny random checkpoints of the families that a user brings, made from their configs alone, with inputs made by hand.

No processor takes part, so families whose processors need torchvision are here too. Each family has three examples, as
the split wants them: one image, one of another shape (where the family lets shapes vary), and two images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from vlmexport.split.features import feature_rows, find_feature_call

IMAGE = "<image>"
HIDDEN, VOCAB = 128, 320
_SPECIAL = ("<|endoftext|>", "<|im_end|>", IMAGE)
Pixels = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Zoo:
    """One family: `model` builds it from the image token's id, `pixels` makes its image inputs, by example."""

    model: Callable[[int], Any]
    pixels: Callable[[], tuple[Pixels, ...]]


def make_zoo(family: str, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint of `family` to `folder`, without a processor."""
    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
    model = ZOO[family].model(tokenizer.convert_tokens_to_ids(IMAGE))
    return save_tiny(model, tokenizer, dict(STATISTICS), folder, "", seed)


def zoo_examples(family: str, model: Any, image_token: int) -> tuple[dict[str, torch.Tensor], ...]:
    """Keyword inputs of the whole model: text, the image tokens that its features need, text."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for pixels in ZOO[family].pixels():
        rows = count_rows(model, image_token, pixels)
        before, after = (torch.randint(10, VOCAB - 60, (1, n), generator=generator) for n in (3, 5))
        ids = torch.cat([before, torch.full((1, rows), image_token), after], dim=1)
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels})
    return tuple(examples)


@torch.no_grad()
def count_rows(model: Any, image_token: int, pixels: Mapping[str, torch.Tensor]) -> int:
    """How many image tokens `pixels` stand for."""
    out = find_feature_call(model, image_token, pixels)(pixels)
    return len(feature_rows(out, 0))


def _text(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": HIDDEN,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": VOCAB,
        "max_position_embeddings": 1024,
        **more,
    }


def _vision(kind: str = "", **more: Any) -> dict[str, Any]:
    named = {"model_type": kind} if kind else {}
    return {
        **named,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        **more,
    }


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _pictures(*counts: int, side: int = 32) -> Callable[[], tuple[Pixels, ...]]:
    """Examples of pictures of one size, `counts` of them each."""
    return lambda: tuple({"pixel_values": _noise(n, 3, side, side, seed=i)} for i, n in enumerate(counts))


def _build(name: str, **config: Any) -> Any:
    import transformers

    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    return cls(getattr(transformers, f"{name}Config")(**config, tie_word_embeddings=False))


def _llava(token: int) -> Any:
    return _build(
        "Llava", text_config=_text("llama"), vision_config=_vision("clip_vision_model"), image_token_index=token
    )


def _vipllava(token: int) -> Any:
    return _build(
        "VipLlava", text_config=_text("llama"), vision_config=_vision("clip_vision_model"), image_token_index=token,
        vision_feature_layers=[-1, -2, 1],
    )  # fmt: skip


def _pixtral(token: int) -> Any:
    vision = _vision("pixtral", image_size=64, head_dim=32)
    return _build(
        "Llava", text_config=_text("mistral", sliding_window=None), vision_config=vision, image_token_index=token,
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip


def _mistral3(token: int) -> Any:
    return _build(
        "Mistral3", text_config=_text("mistral", sliding_window=None), image_token_index=token, spatial_merge_size=2,
        vision_config=_vision("pixtral", image_size=64, head_dim=32), vision_feature_layer=-1,
    )  # fmt: skip


def _sized(*sizes: tuple[tuple[int, int], ...], side: int = 64) -> Callable[[], tuple[Pixels, ...]]:
    """Examples of pictures padded to one size, with their true ones in ``image_sizes`` (height, width)."""

    def make() -> tuple[Pixels, ...]:
        examples = []
        for index, pictures in enumerate(sizes):
            height, width = (max(s[axis] for s in pictures) for axis in (0, 1))
            pixels = torch.zeros(len(pictures), 3, height, width)
            for place, (h, w) in enumerate(pictures):
                pixels[place, :, :h, :w] = _noise(3, h, w, seed=10 * index + place)
            examples.append({"pixel_values": pixels, "image_sizes": torch.tensor(pictures)})
        return tuple(examples)

    return make


def _llava_next(token: int) -> Any:
    return _build(
        "LlavaNext", text_config=_text("llama"), vision_config=_vision("clip_vision_model"), image_token_index=token,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )  # fmt: skip


def _llava_onevision(token: int) -> Any:
    return _build(
        "LlavaOnevision", text_config=_text("qwen2"), vision_config=_vision("siglip_vision_model"),
        image_token_index=token, video_token_index=token + 1, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
    )  # fmt: skip


def _tiles(*examples: tuple[tuple[tuple[int, int], int], ...]) -> Callable[[], tuple[Pixels, ...]]:
    """Examples of any-resolution pictures: for each its true size and its number of tiles (32 x 32)."""

    def make() -> tuple[Pixels, ...]:
        made = []
        for index, pictures in enumerate(examples):
            most = max(count for _, count in pictures)
            pixels = torch.zeros(len(pictures), most, 3, 32, 32)
            for place, (_, count) in enumerate(pictures):
                pixels[place, :count] = _noise(count, 3, 32, 32, seed=10 * index + place)
            made.append({"pixel_values": pixels, "image_sizes": torch.tensor([size for size, _ in pictures])})
        return tuple(made)

    return make


def _video_llava(token: int) -> Any:
    return _build(
        "VideoLlava", text_config=_text("llama"), vision_config=_vision("clip_vision_model"), image_token_index=token,
        video_token_index=token + 1, image_seq_length=16, video_seq_length=128,
    )  # fmt: skip


def _video_llava_pixels() -> tuple[Pixels, ...]:
    return tuple({"pixel_values_images": _noise(n, 3, 32, 32, seed=n)} for n in (2, 1, 3))


def _idefics(name: str, token: int, **more: Any) -> Any:
    return _build(name, text_config=_text("llama"), vision_config=_vision(), image_token_id=token, **more)


def _idefics2(token: int) -> Any:
    perceiver = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 32,
                 "num_key_value_heads": 2, "hidden_size": HIDDEN}  # fmt: skip
    return _idefics("Idefics2", token, perceiver_config=perceiver)


def _idefics_pixels() -> tuple[Pixels, ...]:
    made = []
    for index, count in enumerate((3, 5, 6)):
        mask = torch.ones(1, count, 32, 32, dtype=torch.int64)
        made.append({"pixel_values": _noise(1, count, 3, 32, 32, seed=index), "pixel_attention_mask": mask})
    return tuple(made)


def _internvl(token: int) -> Any:
    vision = _vision("internvl_vision", image_size=[32, 32], patch_size=[8, 8])
    return _build("InternVL", text_config=_text("qwen2"), vision_config=vision, image_token_id=token)


# Layers that see everything have no rotary embedding.
_COHERE_TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
_COHERE: dict[str, Any] = {"sliding_window": 16, "logit_scale": 1.0, "layer_types": _COHERE_TYPES}


def _aya_vision(token: int) -> Any:
    return _build(
        "AyaVision", text_config=_text("cohere2", **_COHERE), image_token_index=token,
        vision_config=_vision("siglip_vision_model"), downsample_factor=2, alignment_intermediate_size=128,
        vision_feature_layer=-1,
    )  # fmt: skip


def _cohere2_vision(token: int) -> Any:
    return _build(
        "Cohere2Vision", text_config=_text("cohere2", **_COHERE), image_token_id=token,
        vision_config=_vision("siglip_vision_model"), downsample_factor=2, alignment_intermediate_size=128,
    )  # fmt: skip


def _deepseek_vl(token: int) -> Any:
    return _build(
        "DeepseekVL", text_config=_text("llama"), vision_config=_vision("siglip_vision_model"), image_token_id=token
    )


def _janus(token: int) -> Any:
    vision = _vision("janus_vision_model", projection_dim=HIDDEN, mlp_ratio=2.0)
    return _build("Janus", text_config=_text("llama"), vision_config=vision, image_token_id=token)


def _lfm2_vl(token: int) -> Any:
    text = _text(
        "lfm2", full_attn_idxs=[1], layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    )
    vision = _vision("siglip2_vision_model", num_patches=16, vision_use_head=False)
    return _build(
        "Lfm2Vl", text_config=text, vision_config=vision, image_token_id=token, downsample_factor=2,
        projector_hidden_size=96,
    )  # fmt: skip


def _lfm2_pixels() -> tuple[Pixels, ...]:
    made = []
    for index, grids in enumerate((((4, 4),), ((2, 6),), ((4, 4), (2, 6)))):
        pixels = torch.zeros(len(grids), 16, 192)
        mask = torch.zeros(len(grids), 16, dtype=torch.int64)
        for place, (h, w) in enumerate(grids):
            pixels[place, : h * w] = _noise(h * w, 192, seed=10 * index + place)
            mask[place, : h * w] = 1
        made.append({"pixel_values": pixels, "spatial_shapes": torch.tensor(grids), "pixel_attention_mask": mask})
    return tuple(made)


def _blip2(token: int) -> Any:
    return _build(
        "Blip2", text_config=_opt(), vision_config=_vision("blip_2_vision_model"), image_token_index=token,
        num_query_tokens=4, qformer_config=_qformer(),
    )  # fmt: skip


def _instructblip(token: int) -> Any:
    return _build(
        "InstructBlip", text_config=_opt(), vision_config=_vision("instructblip_vision_model"),
        image_token_index=token, num_query_tokens=4, qformer_config=_qformer(),
    )  # fmt: skip


def _opt() -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": HIDDEN, "ffn_dim": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "word_embed_proj_dim": HIDDEN,
    }  # fmt: skip


def _qformer() -> dict[str, Any]:
    return {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96,
        "vocab_size": VOCAB, "encoder_hidden_size": 64, "max_position_embeddings": 64,
    }  # fmt: skip


def _instruct_pixels() -> tuple[Pixels, ...]:
    made = []
    for index, count in enumerate((2, 1, 3)):
        ids = torch.randint(10, 60, (count, 5), generator=torch.Generator().manual_seed(index))
        pixels = _noise(count, 3, 32, 32, seed=index)
        made.append({"pixel_values": pixels, "qformer_input_ids": ids, "qformer_attention_mask": torch.ones_like(ids)})
    return tuple(made)


def _got_ocr2(token: int) -> Any:
    vision = {
        "hidden_size": 64, "output_channels": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 128,
        "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 96,
    }  # fmt: skip
    return _build("GotOcr2", text_config=_text("qwen2"), vision_config=vision, image_token_index=token)


ZOO: dict[str, Zoo] = {
    "llava": Zoo(_llava, _pictures(2, 1, 3)),
    "vipllava": Zoo(_vipllava, _pictures(2, 1, 3)),
    "pixtral": Zoo(_pixtral, _sized(((32, 48),), ((48, 32),), ((32, 48), (64, 32)))),
    "mistral3": Zoo(_mistral3, _sized(((32, 48),), ((48, 32),), ((32, 48), (64, 32)))),
    "llava_next": Zoo(_llava_next, _tiles((((40, 80), 3),), (((80, 40), 3),), (((60, 60), 5), ((40, 80), 3)))),
    "llava_onevision": Zoo(
        _llava_onevision, _tiles((((40, 80), 3),), (((80, 40), 3),), (((60, 60), 5), ((40, 80), 3)))
    ),
    "video_llava": Zoo(_video_llava, _video_llava_pixels),
    "idefics2": Zoo(_idefics2, _idefics_pixels),
    "idefics3": Zoo(lambda token: _idefics("Idefics3", token, scale_factor=2), _idefics_pixels),
    "smolvlm": Zoo(lambda token: _idefics("SmolVLM", token, scale_factor=2), _idefics_pixels),
    "internvl": Zoo(_internvl, _pictures(2, 1, 3)),
    "aya_vision": Zoo(_aya_vision, _pictures(2, 1, 3)),
    "cohere2_vision": Zoo(_cohere2_vision, _pictures(2, 1, 3)),
    "deepseek_vl": Zoo(_deepseek_vl, _pictures(2, 1, 3)),
    "janus": Zoo(_janus, _pictures(2, 1, 3)),
    "lfm2_vl": Zoo(_lfm2_vl, _lfm2_pixels),
    "blip2": Zoo(_blip2, _pictures(2, 1, 3)),
    "instructblip": Zoo(_instructblip, _instruct_pixels),
    "got_ocr2": Zoo(_got_ocr2, _pictures(2, 1, 3, side=128)),
}
