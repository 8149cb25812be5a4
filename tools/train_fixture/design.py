"""Sizes, seeds and schedule of the bundled model: everything that decides what the training produces."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from transformers import Idefics3Config, LlamaConfig

from vlmexport.calibrate.synthetic import CALIBRATION_SEEDS, TEST_SEEDS, TRAIN_SEEDS, Mix

TILE: Final = 32
PATCH: Final = 8
SHUFFLE: Final = 2
TOKENS_PER_TILE: Final = (TILE // PATCH) ** 2 // SHUFFLE**2
VOCABULARY: Final = 512


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train one phase.

    Attributes:
        steps: optimizer steps.
        horizon: the step at which the learning rate would reach its end; a phase may stop earlier.
        first_step: where in the sequence of seeds to continue.
        rows: pictures (or pairs) per step and process.
    """

    steps: int
    horizon: int
    mix: Mix
    first_step: int = 0
    rows: int = 32
    ranks: int = 2
    warmup: int = 30
    decay_from: float = 0.4
    muon_rate: float = 3e-3
    adam_rate: float = 2e-3
    questions_per_row: int = 5
    pair_share: float = 0.06
    seed: int = 1


# Later phases start from the checkpoint before them with fresh optimizers. The second leaves out what the first learned
# too slowly: light ink on dark, and counting among distractors. The third dwells on reading, the slowest of the rest;
# the fourth on pictures with a single text.
PHASES: Final = (
    Schedule(
        steps=900, horizon=1200, mix=Mix(counting=14, bars=16, several_texts=True, dark_ground=0.25, distractors=True)
    ),
    Schedule(
        steps=520,
        horizon=520,
        mix=Mix(several_texts=True),
        first_step=900,
        decay_from=0.15,
        muon_rate=1.5e-3,
        adam_rate=1e-3,
    ),
    Schedule(
        steps=280,
        horizon=280,
        mix=Mix(shapes=24, counting=4, text=60, grid=6, bars=6, several_texts=True),
        first_step=1420,
        warmup=15,
        decay_from=0.1,
        muon_rate=1.2e-3,
        adam_rate=8e-4,
    ),
    Schedule(
        steps=110,
        horizon=110,
        mix=Mix(shapes=20, counting=3, text=70, grid=3, bars=4),
        first_step=1700,
        warmup=10,
        decay_from=0.1,
        muon_rate=8e-4,
        adam_rate=5e-4,
    ),
)


def check_seeds() -> None:
    """Raise unless training, calibration and test seeds are disjoint."""
    ordered = sorted((TRAIN_SEEDS, CALIBRATION_SEEDS, TEST_SEEDS), key=lambda seeds: seeds.start)
    for before, after in pairwise(ordered):
        if before.stop > after.start:
            raise ValueError(f"seed ranges overlap: {before} and {after}")


def model_config(token_ids: dict[str, int]) -> Idefics3Config:
    """Return the configuration; `token_ids` gives the ids of bos, eos, pad and image."""
    special = {f"{name}_token_id": token_ids[name] for name in ("bos", "eos", "pad")}
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        # llama.cpp's converter finds the text architecture by this name.
        architectures=["LlamaForCausalLM"],
        **special,
    )
    vision = {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": TILE,
        "patch_size": PATCH,
    }
    return Idefics3Config(
        text_config=text,
        vision_config=vision,
        scale_factor=SHUFFLE,
        image_token_id=token_ids["image"],
        tie_word_embeddings=False,
        **special,
    )
