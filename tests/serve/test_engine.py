"""What an engine says of how an answer ended, and whether an original is loaded at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.serve.conftest import asked
from vlmexport.model.merge import MergeSpec
from vlmexport.runtime.rules import AnswerRules
from vlmexport.runtime.sampling import Sampling
from vlmexport.serve import compare, engine
from vlmexport.serve.compare import Original, too_large
from vlmexport.serve.engine import OnnxEngine
from vlmexport.serve.limits import Limits
from vlmexport.serve.refusal import RefusedError


class Builder:
    """A prompt of three tokens; tokens are their own texts."""

    processor = None
    tokenizer = SimpleNamespace(decode=lambda ids, **more: "".join(map(str, ids)))

    def build(self, pictures: Any, text: str) -> Any:
        return SimpleNamespace(input_ids=np.zeros((1, 3), np.int64))


def speaks(monkeypatch: pytest.MonkeyPatch, tokens: list[int | None], rules: AnswerRules, longest: int) -> Any:
    def steps(*args: Any, **more: Any) -> Iterator[list[int | None]]:
        return iter([[token] for token in tokens])

    monkeypatch.setattr(engine, "generate_steps", steps)
    made = OnnxEngine(None, Builder(), 100, rules)  # type: ignore[arg-type]
    return made.speak(asked("x"), [], Sampling(max_new_tokens=longest), lambda text: None)


@pytest.mark.parametrize(
    ("tokens", "last", "longest", "finish"),
    [
        ([5, 6, None], 1, 3, "length"),  # an end that was forced, there
        ([5, 6, None], 1, 4, "stop"),
        ([5, 6, None], None, 3, "stop"),
        ([5, 6, 7], 7, 3, "length"),
        ([5, 6, 7], None, 3, "length"),
    ],
)
def test_an_end_that_is_forced_at_the_longest_length_is_no_stop(
    tokens: list[int | None], last: int | None, longest: int, finish: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken = speaks(monkeypatch, tokens, AnswerRules(start=2, last=last), longest)
    assert (spoken.finish, spoken.text) == (finish, "".join(str(token) for token in tokens if token is not None))


def test_where_a_model_has_no_number_of_positions_the_servers_limit_holds() -> None:
    made = OnnxEngine(None, Builder(), None, limits=Limits(prompt_tokens=3))  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="the prompt has 3 tokens; there is room for 3"):
        made.speak(asked("x"), [], Sampling(), lambda text: None)


def test_the_original_keeps_the_rules_of_its_generation_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "generation_config.json").write_text('{"no_repeat_ngram_size": 3, "forced_eos_token_id": 1}')
    runner = SimpleNamespace(merge_spec=MergeSpec(1, decoder_start_token_id=2))
    loaded = SimpleNamespace(runner=runner, vlm=SimpleNamespace(path=tmp_path))
    monkeypatch.setattr(compare, "load_reference", lambda *args, **more: loaded)
    monkeypatch.setattr(compare, "PromptBuilder", lambda *args, **more: Builder())
    monkeypatch.setattr(compare, "positions", lambda folder, **more: 100)
    monkeypatch.setattr(Original, "_weight_files", lambda self: ())
    artifact = SimpleNamespace(manifest=SimpleNamespace(source={"model": str(tmp_path)}))
    original = Original(artifact)  # type: ignore[arg-type]
    assert original.why_not() == ""
    assert original._open().rules == AnswerRules(start=2, last=1, no_repeat=3)


def test_an_original_that_does_not_fit_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters count by the files' headers, in FP32 whatever they are stored as."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(10, 20, dtype=torch.bfloat16), "b": torch.zeros(50, dtype=torch.float16)}, file)
    for free, fits in ((1000, True), (999, False), (None, True)):
        monkeypatch.setattr(compare, "available_memory", lambda free=free: free)
        assert (too_large([file]) == "") == fits
    monkeypatch.setattr(compare, "available_memory", lambda: 2_000_000)
    monkeypatch.setattr(compare, "load_reference", lambda *args, **more: pytest.fail("was loaded"))
    artifact = SimpleNamespace(manifest=SimpleNamespace(source={"model": "demo"}))
    why = Original(artifact).why_not()  # type: ignore[arg-type]
    assert "in FP32 it needs 0.01" in why and "0.002 GB are available" in why and "--no-compare" in why


def test_numbers_that_cannot_be_compared_say_why() -> None:
    one = np.ones((2, 3), np.float32)
    for ours, theirs, note in (
        (one, np.ones((2, 4), np.float32), "another shape"),
        (np.full((2, 3), np.nan, np.float32), one, "not finite"),
        (one, one, ""),
    ):
        found = compare._compared("part", "relative", compare._relative, ours, theirs)
        assert (found.note, found.value) == (note, None if note else 0.0)
