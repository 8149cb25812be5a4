"""A tiny ColPali with its processor: PaliGemma under an embedding layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

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
    model.get_output_embeddings = lambda: model.embedding_proj_layer
    randomise(model, 1)
    with torch.no_grad():  # a table of float16, as the export stores it
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.half().float())
    model.save_pretrained(folder)
    return folder
