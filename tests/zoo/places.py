"""Tiny checkpoints of families whose features do not simply replace the embeddings of one image token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.zoo.entry import Entry, Example
from tests.zoo.models import HIDDEN, VOCAB, _build, _noise, _text, _vision
from vlmexport.model.load import VLM

_NAMES = ("<|endoftext|>", "<|im_end|>", "<image>", *(f"<mark{i}>" for i in range(8)))
IMAGE, MARKS = 2, tuple(range(3, 11))


def _saved(model: Any, folder: Path) -> Path:
    return save_tiny(model, byte_level_tokenizer(_NAMES, VOCAB), dict(STATISTICS), folder, "", 0)


def _words(count: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(20, VOCAB - 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def _prompt(*pieces: list[int]) -> Example:
    ids = torch.tensor([[token for piece in pieces for token in piece]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _ovis2(folder: Path) -> Path:
    """A visual vocabulary: features are mixtures of a table's rows, five marks around them rows of that table."""
    vision = _vision(vocab_size=48, hidden_stride=2, num_visual_indicator_tokens=5, tokenize_function="softmax")
    model = _build(
        "Ovis2", text_config=_text("qwen2"), vision_config=vision, image_token_id=IMAGE, vocab_size=VOCAB,
        hidden_size=HIDDEN, visual_indicator_token_ids=list(MARKS[:5]),
    )  # fmt: skip
    return _saved(model, folder)


def _ovis2_examples(_vlm: VLM) -> tuple[Example, ...]:
    """Tiles between marks, as the processor writes them; not every mark is in every prompt."""
    first, grid, row, tile, last = ([mark] for mark in MARKS[:5])
    image = [IMAGE] * 4
    two = _prompt(_words(3, 0), first, image, grid, image, last, _words(5, 1))
    one = _prompt(_words(2, 2), first, image, grid, last, _words(7, 3))
    three = _prompt(_words(2, 4), first, image, grid, image, tile, image, row, last, _words(4, 5))
    counted = zip((two, one, three), (2, 1, 3), strict=True)
    return tuple({**prompt, "pixel_values": _noise(n, 3, 32, 32, seed=n)} for prompt, n in counted)


Make = Callable[[Path], Path]
Examples = Callable[[VLM], tuple[Example, ...]]
ENTRIES: dict[str, Entry] = {
    "ovis2": Entry(_ovis2, _ovis2_examples),
}
