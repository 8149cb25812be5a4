"""Tiny checkpoints whose layers get inputs of their own for each token, and whose last layers read others' keys.

Windows are shorter than the prompts; kinds of layers differ in how wide heads are. Inputs are made by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.zoo.entry import Entry, Example

HIDDEN, VOCAB, WINDOW = 128, 320, 5
_SPECIAL = ("<|endoftext|>", "<|im_end|>", "<image>", "<video>", "<audio>")
_S, _F = "sliding_attention", "full_attention"
# Two that are alike, one of each kind whose keys the last ones read, and those, of which two are alike.
LAYERS = (_S, _S, _S, _F, _S, _S, _F)
SHARED = 3
PATCH, PATCHES, POOL = 4, 64, 2  # pixels, rows that a picture is padded to, patches on a side of one token
# Columns and rows of patches of each picture, by example.
SIZES = (((4, 6),), ((8, 2),), ((6, 4), (2, 6)))


def gemma4(folder: Path, **text: Any) -> Path:
    """Gemma 4 as its small models are; `text` changes the text model's settings."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
    image, video, audio = (tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL[2:])
    config = Gemma4Config(
        text_config=_TEXT | text,
        vision_config=_VISION,
        audio_config=None,
        image_token_id=image,
        video_token_id=video,
        audio_token_id=audio,
        boi_token_id=5,
        eoi_token_id=6,
        boa_token_id=7,
        eoa_token_index=8,
    )
    model = Gemma4ForConditionalGeneration(config)
    _fill_buffers(model)
    return save_tiny(model, tokenizer, dict(STATISTICS), folder, "", 0)


def gemma4_large(folder: Path) -> Path:
    """Gemma 4 as its large models are: image blocks within windows, keys that are values, no inputs by layer."""
    large = {"use_bidirectional_attention": "vision", "attention_k_eq_v": True, "num_global_key_value_heads": 1}
    layers = {"layer_types": list(LAYERS[1:4]), "num_hidden_layers": 3, "num_kv_shared_layers": 0}
    return gemma4(folder, **large, **layers, hidden_size_per_layer_input=0, use_double_wide_mlp=False)


def gemma4_examples(image_token: int, sizes: Sequence[Sequence[tuple[int, int]]] = SIZES) -> tuple[Example, ...]:
    """Text, pictures as patches that are padded to one length, text; as the processor makes them."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for index, pictures in enumerate(sizes):
        pieces = [torch.randint(10, VOCAB - 60, (3 + index,), generator=generator)]
        pixels = torch.zeros(len(pictures), PATCHES, 3 * PATCH**2)
        places = torch.full((len(pictures), PATCHES, 2), -1)
        for row, (wide, high) in enumerate(pictures):
            count = wide * high
            pixels[row, :count] = torch.rand(count, 3 * PATCH**2, generator=generator)
            places[row, :count] = torch.cartesian_prod(torch.arange(high), torch.arange(wide)).flip(1)
            pieces += [torch.full((count // POOL**2,), image_token)]
            pieces += [torch.randint(10, VOCAB - 60, (4 + row,), generator=generator)]
        ids = torch.cat(pieces)[None]
        kinds = (ids == image_token).long()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
        made.append({**inputs, "pixel_values": pixels, "image_position_ids": places})
    return tuple(made)


_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 192,
    "num_hidden_layers": len(LAYERS),
    "layer_types": list(LAYERS),
    "num_kv_shared_layers": SHARED,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 32,
    "use_double_wide_mlp": True,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 3.0,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
_VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "patch_size": PATCH,
    "pooling_kernel_size": POOL,
    "position_embedding_size": 64,
    "use_clipped_linears": True,
    "standardize": True,
}


def _fill_buffers(model: nn.Module) -> None:
    """Numbers of the checkpoint that are no parameters: limits of the encoder's linears, scales of layers."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            noise = torch.rand(buffer.shape, generator=generator)
            if name.endswith(("layer_scalar", "std_scale")):
                buffer.copy_(0.8 + 0.4 * noise)
            elif name.endswith("std_bias"):
                buffer.copy_(noise - 0.5)
            elif name.endswith(("_min", "_max")):
                buffer.copy_((1.5 + noise) * (-1 if name.endswith("_min") else 1))


ENTRIES = {
    "gemma4": Entry(make=gemma4, examples=lambda vlm: gemma4_examples(vlm.facts.image_token_id)),
}
