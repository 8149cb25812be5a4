"""What a model's generation_config asks of every answer beside its likeliest tokens.

Read for encoder-decoders alone, whose answers stand by themselves: a first token, a last one at the longest length, and
no sequence of tokens twice. Beams and penalties are not applied; `vlmexport inspect` names those that are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.model.json_files import read_json_if_there
from vlmexport.model.merge import MergeSpec


@dataclass(frozen=True)
class AnswerRules:
    """Tokens that an answer must or must not have; ``AnswerRules()`` asks for nothing.

    `start`: the token before an answer. `first`: its first token. `last`: its token at the longest length that was
    asked for. `no_repeat`: no sequence of so many tokens comes twice, the start counted; 0 for any.
    """

    start: int = 0
    first: int | None = None
    last: int | None = None
    no_repeat: int = 0

    def applied(self, logits: NDArray[Any], answer: Sequence[int], longest: int) -> NDArray[Any]:
        """One row of logits ``[vocab]`` behind the tokens `answer`, -inf where a token may not come."""
        forced = self.last if len(answer) + 1 == longest else None
        if forced is None and not answer:
            forced = self.first
        if forced is not None:
            only = np.full(logits.shape, -np.inf, np.float32)
            only[forced] = 0
            return only
        if not (repeated := self._repeated(answer)):
            return logits
        free = np.array(logits, np.float32)
        free[repeated] = -np.inf
        return free

    def _repeated(self, answer: Sequence[int]) -> list[int]:
        """Tokens that would end a sequence of `no_repeat` tokens that is there already."""
        tokens, before = [self.start, *answer], self.no_repeat - 1
        if before < 0 or len(tokens) < before:
            return []
        end = tokens[len(tokens) - before :]
        places = range(len(tokens) - before)
        return [tokens[place + before] for place in places if tokens[place : place + before] == end]


def answer_rules(folder: Path, merge: MergeSpec) -> AnswerRules:
    """The rules of the export in `folder`: of its generation_config.json, or without one of its config.json."""
    start = merge.decoder_start_token_id
    if start is None:
        return AnswerRules()
    asked = read_json_if_there(folder / "generation_config.json")
    if not asked:
        config = read_json_if_there(folder / "config.json")
        asked = {**config, **config.get("text_config", {})}
    last = asked.get("forced_eos_token_id")
    return AnswerRules(
        start=start,
        first=asked.get("forced_bos_token_id"),
        last=min(last) if isinstance(last, list) else last,
        no_repeat=int(asked.get("no_repeat_ngram_size") or 0),
    )
