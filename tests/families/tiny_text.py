"""Parts of tiny checkpoints of families whose image processors do not load without torchvision.

The folder gets its tokenizer and a hand-written preprocessor_config.json; model inputs are made from the picture here,
as transformers' processors do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.tiny import CORPUS, randomise

STATISTICS = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}


def byte_level_tokenizer(special: Sequence[str], vocab: int, **named: str) -> Any:
    """A byte-level BPE tokenizer of `vocab` entries at most; the first of `special` is bos, the second the end.

    `named` are tokens that a processor asks for by name (``boi_token``).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[0],
        extra_special_tokens=named,
        model_max_length=2048,
    )


def save_tiny(model: Any, tokenizer: Any, preprocessor: dict[str, Any], folder: Path, template: str, seed: int) -> Path:
    """Fill `model` with random weights and write it to `folder` with its tokenizer and image processor's settings."""
    randomise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                # `randomise` takes the experts for a part of each row.
                parameter.mul_(parameter.shape[1] ** 0.5)
            if _counts_from_one(model, name):
                parameter.sub_(1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def _counts_from_one(model: Any, name: str) -> bool:
    """Gemma's norms multiply by ``1 + w``; its tower's are plain."""
    is_norm = name.endswith("norm.weight") and "vision_tower" not in name
    return model.config.model_type == "gemma3" and is_norm


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured blocks with a slope across them: no two patches are equal."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (-(-height // 8), -(-width // 8), 3)).repeat(8, 0).repeat(8, 1)
    slope = np.linspace(0, 60, width)[None, :, None] + np.linspace(0, 40, height)[:, None, None]
    return Image.fromarray(np.clip(blocks[:height, :width] * 0.6 + slope, 0, 255).astype(np.uint8))


def normalised(image: Image.Image) -> NDArray[np.float32]:
    """The picture as the processors normalise it, ``[3, height, width]``."""
    mean, std = (np.array(STATISTICS[key], np.float32)[:, None, None] for key in ("image_mean", "image_std"))
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    return np.asarray((pixels - mean) / std, np.float32)
