"""A tiny Florence-2 with its own processor: what the commands need of an encoder-decoder."""

from __future__ import annotations

import json
from pathlib import Path

from tests.families.tiny_text import byte_level_tokenizer
from tests.zoo.cross import _SPECIAL, _make_florence2
from tests.zoo.models import IMAGE, VOCAB

SIDE, ROWS = 64, 65


def make_florence2_with_processor(folder: Path, **asked: int) -> Path:
    """Write the checkpoint and its processor to `folder`; `asked` is what its generation_config asks of answers."""
    from transformers import Florence2Processor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    _make_florence2(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = byte_level_tokenizer(_SPECIAL, VOCAB, image_token=IMAGE)
    tokenizer.chat_template = None
    size = {"height": SIDE, "width": SIDE}
    pixels = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    pixels.image_seq_length = ROWS
    Florence2Processor(pixels, tokenizer).save_pretrained(folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **asked}))
    return folder
