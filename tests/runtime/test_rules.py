"""What a generation_config asks of an encoder-decoder's answers, as transformers applies it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmexport.model.merge import MergeSpec
from vlmexport.runtime.rules import AnswerRules, answer_rules

_START, _VOCAB, _LONGEST = 2, 12, 9
_ENCODED = MergeSpec(1, decoder_start_token_id=_START)


def _theirs(asked: dict[str, Any], answer: list[int], logits: np.ndarray) -> np.ndarray:
    from transformers.generation import logits_process as known

    made = []
    if asked.get("no_repeat_ngram_size"):
        made.append(known.NoRepeatNGramLogitsProcessor(asked["no_repeat_ngram_size"]))
    if "forced_bos_token_id" in asked:
        made.append(known.ForcedBOSTokenLogitsProcessor(asked["forced_bos_token_id"]))
    if "forced_eos_token_id" in asked:
        made.append(known.ForcedEOSTokenLogitsProcessor(1 + _LONGEST, asked["forced_eos_token_id"]))
    row = torch.from_numpy(logits)[None]
    for processor in made:
        row = processor(torch.tensor([[_START, *answer]]), row)
    return row[0].numpy()


@pytest.mark.parametrize("size", [0, 1, 2, 3])
@pytest.mark.parametrize("more", [{}, {"forced_bos_token_id": 5, "forced_eos_token_id": 3}])
def test_the_rules_are_those_of_transformers(size: int, more: dict[str, int], tmp_path: Path) -> None:
    asked = {"no_repeat_ngram_size": size, **more}
    (tmp_path / "generation_config.json").write_text(json.dumps(asked))
    rules, rng, answer = answer_rules(tmp_path, _ENCODED), np.random.default_rng(0), []
    for _ in range(_LONGEST):
        logits = rng.normal(size=_VOCAB).astype(np.float32)
        wanted, found = _theirs(asked, answer, logits), rules.applied(logits, answer, _LONGEST)
        assert np.array_equal(wanted, found), answer
        answer.append(int(wanted.argmax()) % 4)


def test_without_a_generation_config_the_text_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"forced_bos_token_id": 4}}))
    assert answer_rules(tmp_path, _ENCODED) == AnswerRules(start=_START, first=4)


def test_a_decoder_without_an_encoder_has_no_rules(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 2}))
    rules = answer_rules(tmp_path, MergeSpec(1))
    logits = np.arange(_VOCAB, dtype=np.float32)
    assert rules == AnswerRules() and rules.applied(logits, [1, 1], 3) is logits
