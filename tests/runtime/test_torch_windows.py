"""The reference's padded batches of models whose layers see a window: transformers counts it in slots."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.zoo.models import make_zoo
from tests.zoo.proof import relative
from vlmexport.model.load import load_vlm
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.decoder import text_decoder
from vlmexport.split.windows import shortest_window

STEPS, LIMIT = 6, 1e-5


def test_a_padded_row_sees_its_own_last_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of 16 tokens behind a prompt of 5 that is padded to 40."""
    vlm = load_vlm(str(make_zoo("cohere2_vision", tmp_path)))
    assert shortest_window(text_decoder(vlm.model)) == 16
    runner = TorchRunner(vlm)
    ids = np.random.default_rng(0).integers(10, 200, (2, 40))
    mask = np.array([[1] * 5 + [0] * 35, [1] * 40])
    steps = np.random.default_rng(1).integers(10, 200, (2, STEPS))
    wanted = [_run(runner, ids[row : row + 1, : mask[row].sum()], None, steps[row : row + 1]) for row in (0, 1)]
    found = _run(runner, ids, mask, steps)
    assert relative(found, np.concatenate(wanted, axis=1)) <= LIMIT
    monkeypatch.setattr(runner, "_window", None)
    assert relative(_run(runner, ids, mask, steps)[:, :1], wanted[0]) > 1e-2


def test_a_decoder_without_windows_has_none(tmp_path: Path) -> None:
    vlm = load_vlm(str(make_zoo("llava", tmp_path)))
    assert shortest_window(text_decoder(vlm.model)) is None


def _run(runner: TorchRunner, ids: np.ndarray, mask: np.ndarray | None, steps: np.ndarray) -> np.ndarray:
    """Logits ``[steps + 1, batch, vocab]`` behind the prompts and behind each of `steps` ``[batch, steps]``."""
    given = np.ones_like(ids) if mask is None else mask
    logits, cache = runner.prefill(runner.embed(ids), given)
    made = [logits[:, -1]]
    for step in range(steps.shape[1]):
        made.append(runner.decode(runner.embed(steps[:, step : step + 1]), cache)[:, -1])
    return np.stack(made)
