"""Tiny checkpoints of families whose decoders are mixtures of experts."""

from __future__ import annotations

from pathlib import Path

from tests.families.tiny_qwen import make_tiny_qwen
from tests.zoo import qwen
from tests.zoo.entry import Entry


def _qwen3_vl_moe(folder: Path) -> Path:
    """Five experts, so that some get no row of a short prompt; one layer among them is dense."""
    text = {"num_experts": 5, "num_experts_per_tok": 2, "mlp_only_layers": [3]}
    return make_tiny_qwen("qwen3_vl_moe", folder, text=text)


ENTRIES = {
    "qwen3_vl_moe": Entry(make=_qwen3_vl_moe, examples=qwen.prompts),
}
