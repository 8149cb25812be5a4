"""Perception LM, whose image encoder is timm's: split, lowered, and compared with PyTorch through 16 steps.

Run by ``make test-torchvision`` where timm is installed; without it the family is refused (``tests/zoo``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("timm", reason="timm is not installed")

from tests.families.tiny_text import byte_level_tokenizer, save_tiny
from tests.zoo.measure import image_effect, largest
from tests.zoo.models import IMAGE, VOCAB, Pixels, _build, _noise, _text
from tests.zoo.more import _in_one_row
from tests.zoo.proof import FLOATS, Zooed, export
from vlmexport.model.load import load_vlm
from vlmexport.split.capture import split_model

pytestmark = [pytest.mark.slow, pytest.mark.torchvision]
SIDE = 32


def _perception_lm(token: int) -> Any:
    """A ViT with rotary positions in two directions and a class token, that the model leaves out."""
    sizes = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": [SIDE, SIDE], "patch_size": 8, "mlp_ratio": 2}
    how = {"global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]}
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336", "model_args": sizes | how}
    return _build(
        "PerceptionLM", text_config=_text("llama"), vision_config=vision, image_token_id=token,
        video_token_id=token + 1, projector_pooling_ratio=2, vision_use_cls_token=True,
    )  # fmt: skip


def _pixels() -> tuple[Pixels, ...]:
    return tuple({"pixel_values": _noise(1, count, 3, SIDE, SIDE, seed=count)} for count in (2, 1, 3))


def test_perception_lm_is_exact(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(("<|endoftext|>", "<|im_end|>", IMAGE, "<video>"), VOCAB)
    model = _perception_lm(tokenizer.convert_tokens_to_ids(IMAGE))
    vlm = load_vlm(str(save_tiny(model, tokenizer, {}, tmp_path / "model", "", 0)))
    examples = _in_one_row(_pixels)(vlm)
    split = split_model(vlm, examples)
    assert split.replay_difference <= 1e-5
    zooed = Zooed(vlm, split, examples)
    assert largest(zooed, export(zooed, FLOATS, tmp_path / "export")) <= 1e-4
    assert image_effect(vlm, examples[-1]) > 1e-3
