"""Tiny random checkpoints of families whose decoder attends to states beside its own tokens.

Encoder-decoders (Florence-2 with BART, BLIP-2 with T5) and decoders with layers of cross-attention (Llama 3.2 Vision).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.zoo.entry import Entry, Example
from tests.zoo.models import HIDDEN, IMAGE, VOCAB, _noise, _qformer, _vision, count_rows
from vlmexport.model.load import VLM

_SPECIAL = ("<|endoftext|>", "<|im_end|>", IMAGE)


def _make_florence2(folder: Path) -> Path:
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
    text = {
        "model_type": "bart", "d_model": HIDDEN, "vocab_size": VOCAB, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 192, "decoder_ffn_dim": 192,
        "max_position_embeddings": 512, "scale_embedding": False, "decoder_start_token_id": 1, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": 0, "forced_eos_token_id": None, "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True], "embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4],
        "window_size": 3, "projection_dim": HIDDEN, "max_position_embeddings": 20, "max_temporal_embeddings": 8,
    }  # fmt: skip
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=image)
    return save_tiny(Florence2ForConditionalGeneration(config), tokenizer, dict(STATISTICS), folder, "", 0)


def _prompts(vlm: VLM, pixels: tuple[Example, ...]) -> tuple[Example, ...]:
    """Keyword inputs of the whole model: text, the image tokens that its features need, text of another length."""
    generator = torch.Generator().manual_seed(1)
    token, examples = vlm.facts.image_token_id, []
    for index, inputs in enumerate(pixels):
        rows = count_rows(vlm.model, token, inputs)
        before, after = (torch.randint(10, VOCAB - 60, (1, n), generator=generator) for n in (3, 5 + index))
        ids = torch.cat([before, torch.full((1, rows), token), after], dim=1)
        examples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs})
    return tuple(examples)


def _florence2_examples(vlm: VLM) -> tuple[Example, ...]:
    return _prompts(vlm, tuple({"pixel_values": _noise(n, 3, 64, 64, seed=n)} for n in (2, 1, 3)))


def _make_mllama(folder: Path) -> Path:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
    text = {
        "hidden_size": HIDDEN, "intermediate_size": 192, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "cross_attention_layers": [1, 3], "pad_token_id": 0,
        "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 32, "patch_size": 16, "vision_output_dim": 192, "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 2], "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1], [2, 2]],
    }  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB)
    return save_tiny(MllamaForConditionalGeneration(config), tokenizer, dict(STATISTICS), folder, "", 0)


def _mllama_examples(vlm: VLM) -> tuple[Example, ...]:
    """Pictures of so many tiles; the text before the first sees none, the text behind each all of its tiles."""
    generator, examples, token = torch.Generator().manual_seed(1), [], vlm.facts.image_token_id
    for index, tiles in enumerate(((2, 4), (1,), (3, 1, 2))):
        pieces, ratios = [], torch.tensor([[1, 2, 3, 4][t - 1] for t in tiles])[None]
        pixels, there = torch.zeros(1, len(tiles), 4, 3, 32, 32), torch.zeros(1, len(tiles), 4, dtype=torch.int64)
        for place, count in enumerate(tiles):
            pieces += [torch.randint(10, VOCAB - 60, (3 + index,), generator=generator), torch.tensor([token])]
            pixels[0, place, :count] = _noise(count, 3, 32, 32, seed=10 * index + place)
            there[0, place, :count] = 1
        ids = torch.cat([*pieces, torch.randint(10, VOCAB - 60, (5,), generator=generator)])[None]
        mask = torch.zeros(1, ids.shape[1], len(tiles), 4, dtype=torch.int64)
        for place, start in enumerate((ids[0] == token).nonzero()[:, 0].tolist()):
            mask[0, start:, place] = there[0, place]
        examples.append({
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
            "aspect_ratio_ids": ratios, "aspect_ratio_mask": there, "cross_attention_mask": mask,
        })  # fmt: skip
    return tuple(examples)


def make_blip2_t5(folder: Path, **settings: Any) -> Path:
    """BLIP-2 with T5 below `folder`; `settings` are further ones of the text model.

    Its buckets of distances end within the prompts. The table of embeddings is of float16, as an export stores it.
    """
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB)
    text = {
        "model_type": "t5", "d_model": HIDDEN, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_decoder_layers": 3,
        "num_heads": 4, "vocab_size": VOCAB, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
        "bos_token_id": 0, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, **settings,
    }  # fmt: skip
    config = Blip2Config(
        text_config=text, vision_config=_vision("blip_2_vision_model"), qformer_config=_qformer(), num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
    )  # fmt: skip
    model: Any = Blip2ForConditionalGeneration(config)
    save_tiny(model, tokenizer, dict(STATISTICS), folder, "", 0)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.half().float())
    model.save_pretrained(folder)
    return folder


def blip2_t5_examples(vlm: VLM) -> tuple[Example, ...]:
    """Two pictures, one and three."""
    return _prompts(vlm, tuple({"pixel_values": _noise(n, 3, 32, 32, seed=n)} for n in (2, 1, 3)))


ENTRIES: dict[str, Entry] = {
    "blip2_t5": Entry(make_blip2_t5, blip2_t5_examples),
    "florence2": Entry(_make_florence2, _florence2_examples),
    "mllama": Entry(_make_mllama, _mllama_examples),
}
