"""Tiny checkpoints of families whose features do not simply replace the embeddings of one image token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.zoo import gemma
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


def _molmo2(folder: Path) -> Path:
    """Features are added to the embeddings of their tokens; all tokens of pictures, the marks too, see each other."""
    vision = _vision(image_size=[32, 32], num_key_value_heads=2, head_dim=32)
    adapter = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
               "intermediate_size": 96, "text_hidden_size": HIDDEN, "vision_feature_layer": [2, 1]}  # fmt: skip
    text = _text("molmo2_text", vocab_size=VOCAB - 4, additional_vocab_size=4)
    start, column, end = MARKS[:3]
    model = _build(
        "Molmo2", text_config=text, vision_config=vision, adapter_config=adapter, image_patch_id=IMAGE,
        image_start_token_id=start, low_res_image_start_token_id=start, image_end_token_id=end,
        frame_start_token_id=column, frame_end_token_id=column,
    )  # fmt: skip
    return _saved(model, folder)


# Rows and columns of tokens of each picture of an example, as a whole and in its crops.
_GRIDS = (((2, 2, 2, 4), (1, 2, 3, 2)), ((2, 2, 4, 2),), ((2, 2, 2, 2), (2, 1, 2, 3), (2, 2, 1, 4)))


def _molmo2_examples(_vlm: VLM) -> tuple[Example, ...]:
    """Pictures between marks; a token pools up to four patches of any crop, and -1 stands for none."""
    made = []
    for index, grids in enumerate(_GRIDS):
        start, column, end = ([mark] for mark in MARKS[:3])
        pieces = [_words(3, index)]
        for low, wide, high, across in grids:
            for rows, columns in ((low, wide), (high, across)):
                pieces += [start, ([IMAGE] * columns + column) * rows, end]
        prompt = _prompt(*pieces, _words(5 + index, 9 + index))
        ids, crops = prompt["input_ids"], 2 * len(grids)
        tokens = int((ids == IMAGE).sum())
        generator = torch.Generator().manual_seed(index)
        pooling = torch.randint(0, 16 * crops, (tokens, 4), generator=generator)
        pooling[::3, 2:] = -1
        types = torch.isin(ids, torch.tensor([IMAGE, *MARKS[:3]])).long()
        made.append(
            {**prompt, "mm_token_type_ids": types, "pixel_values": _noise(crops, 16, 192, seed=index),
             "image_token_pooling": pooling, "image_grids": torch.tensor(grids)}
        )  # fmt: skip
    return tuple(made)


def _chameleon(folder: Path) -> Path:
    """Pictures become ids of a codebook, whose tokens' embeddings are the features; their logits are masked.

    Half of the heads' norms differ from each other. The table is one of float16, as the export stores it.
    """
    codes = 24
    names = {"IMGIMG" + "".join(chr(ord("A") + int(d)) for d in str(i)) + "Z": VOCAB - 2 * i - 1 for i in range(codes)}
    vq = {"embed_dim": 16, "num_embeddings": codes, "latent_channels": 16, "resolution": 16, "base_channels": 32,
          "channel_multiplier": [1, 1, 2], "num_res_blocks": 1}  # fmt: skip
    config = transformers.ChameleonConfig(
        **{k: v for k, v in _text("").items() if k not in ("model_type", "head_dim")}, vq_config=vq,
        vocabulary_map={"<image>": IMAGE, **names}, tie_word_embeddings=False,
    )  # fmt: skip
    folder = _saved(transformers.ChameleonForConditionalGeneration(config), folder)
    model = transformers.ChameleonForConditionalGeneration.from_pretrained(folder)
    table: Any = model.get_input_embeddings()
    with torch.no_grad():
        table.weight.copy_(table.weight.half().float())
        # Codes near to each other would be taken for one another where two runtimes round differently.
        model.model.vqmodel.quantize.embedding.weight.mul_(0.3)
    model.save_pretrained(folder)
    return folder


def _chameleon_examples(_vlm: VLM) -> tuple[Example, ...]:
    made = []
    for index, count in enumerate((2, 1, 3)):
        pieces = [piece for i in range(count) for piece in ([MARKS[0]], [IMAGE] * 16, [MARKS[1]], _words(2, i))]
        prompt = _prompt(_words(2, index), *pieces, _words(4 + index, 9 + index))
        made.append({**prompt, "pixel_values": _noise(count, 3, 16, 16, seed=index)})
    return tuple(made)


def _shieldgemma2(folder: Path) -> Path:
    """Gemma 3 inside a class that asks for two tokens' logits at the end of the prompt."""
    inner: Any = gemma._gemma3(IMAGE)
    config = transformers.ShieldGemma2Config(
        text_config=inner.config.text_config, vision_config=inner.config.vision_config, image_token_index=IMAGE,
        mm_tokens_per_image=inner.config.mm_tokens_per_image, tie_word_embeddings=True,
    )  # fmt: skip
    config.yes_token_index, config.no_token_index = YES, NO
    model: Any = transformers.ShieldGemma2ForImageClassification(config)
    _saved(model.model, folder)
    model.save_pretrained(folder)
    return folder


YES, NO = 50, 60
ENTRIES: dict[str, Entry] = {
    "shieldgemma2": Entry(_shieldgemma2, lambda _vlm: gemma.gemma_examples("gemma3", IMAGE)),
    "chameleon": Entry(_chameleon, _chameleon_examples),
    "molmo2": Entry(_molmo2, _molmo2_examples),
    "ovis2": Entry(_ovis2, _ovis2_examples),
}
