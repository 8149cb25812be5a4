"""Tiny models that give embeddings, with their processors: ColPali over PaliGemma, ColQwen2 over Qwen2-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_qwen import SPECIAL as QWEN_SPECIAL
from tests.families.tiny_qwen import make_tiny_qwen
from tests.families.tiny_text import byte_level_tokenizer, save_tiny
from tests.tiny import randomise
from tests.zoo import gemma

WIDTH = 24
SPECIAL = ("<|endoftext|>", "<|im_end|>", "<image>")


def make_colpali(folder: Path) -> Path:
    """Write the checkpoint and its processor to `folder`."""
    from transformers import ColPaliConfig, ColPaliForRetrieval, ColPaliProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    inner: Any = gemma._paligemma(2, "paligemma")
    tokenizer = byte_level_tokenizer(SPECIAL, gemma.VOCAB - 60, image_token="<image>")
    save_tiny(inner, tokenizer, {}, folder, "", 0)
    tokenizer.chat_template = None
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    pixels = SiglipImageProcessorPil(size={"height": gemma.SIDE, "width": gemma.SIDE})
    pixels.image_seq_length = gemma.ROWS
    ColPaliProcessor(pixels, tokenizer).save_pretrained(folder)
    model: Any = ColPaliForRetrieval(ColPaliConfig(vlm_config=inner.config, embedding_dim=WIDTH))
    return _saved(model, folder)


def make_colqwen2(folder: Path) -> Path:
    """The same for pictures of any size: a checkpoint of Qwen2-VL, under an embedding layer."""
    from transformers import AutoConfig, ColQwen2Config, ColQwen2ForRetrieval, ColQwen2Processor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    small = make_tiny_qwen("qwen2_vl", folder, text={"num_hidden_layers": 3}, vision={"depth": 2})
    config = AutoConfig.from_pretrained(small)
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
    pixels = Qwen2VLImageProcessorPil(size=size, patch_size=14, merge_size=2, temporal_patch_size=2)
    ColQwen2Processor(pixels, byte_level_tokenizer(QWEN_SPECIAL, 320)).save_pretrained(folder)
    return _saved(ColQwen2ForRetrieval(ColQwen2Config(vlm_config=config, embedding_dim=WIDTH)), folder)


def _saved(model: Any, folder: Path) -> Path:
    model.get_output_embeddings = lambda: model.embedding_proj_layer
    randomise(model, 1)
    with torch.no_grad():  # a table of float16, as the export stores it
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.half().float())
    model.save_pretrained(folder)
    return folder
