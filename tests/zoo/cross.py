"""Tiny random checkpoints of families whose decoder attends to states beside its own tokens.

Encoder-decoders (Florence-2 with BART, BLIP-2 with T5) and decoders with layers of cross-attention (Llama 3.2 Vision).
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.zoo.entry import Entry, Example
from tests.zoo.models import HIDDEN, IMAGE, VOCAB, _noise, count_rows
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


ENTRIES: dict[str, Entry] = {
    "florence2": Entry(_make_florence2, _florence2_examples),
}
