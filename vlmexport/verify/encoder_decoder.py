"""What must hold within the graphs of an encoder-decoder: its prompt is encoded, its cache is of the answer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vlmexport.errors import BadInputError
from vlmexport.runtime.decoder_inputs import DecoderInputs, stacked, token_inputs
from vlmexport.runtime.protocol import Array, Runner
from vlmexport.verify.decoder import PART, short_and_long
from vlmexport.verify.gates import Gate

# Tokens of an answer that are compared, the one that starts it included.
ANSWER_TOKENS = 9


def check_answers(
    gate: Gate, exact: Runner, embeds: Mapping[str, DecoderInputs], limit: float, vocab_size: int
) -> None:
    """The checks of `vlmexport.verify.decoder.check_consistency`, asked of answers.

    ``decoder/keep_last``: logits of the last token alone equal the last of all; ``decoder/cache``: an answer's tokens
    one at a time equal the same in one call; ``decoder/right_padding``: answers to prompts of a padded batch equal
    those to the prompts alone; ``decoder/padding_guard``: left padding is refused.
    """
    longest = max(embeds.values(), key=lambda prompt: prompt.length)
    fed = 1 + np.arange(1, ANSWER_TOKENS)[None] * 7 % (vocab_size - 1)
    with gate.guard("decoder/keep_last", PART, "lowering"):
        whole, last = (_answered([longest], exact, fed, keep) for keep in (0, 1))
        gate.close("decoder/keep_last", PART, "lowering", whole[:, -1:], last[:, -1:], limit)
    with gate.guard("decoder/cache", PART, "lowering"):
        found = _token_by_token(longest, exact, fed)
        gate.close("decoder/cache", PART, "lowering", _answered([longest], exact, fed, 0), found, limit)
    with gate.guard("decoder/padding_guard", PART, "lowering"):
        gate.verdict("decoder/padding_guard", PART, "lowering", _left_padding(exact, embeds), "faults")
    with gate.guard("decoder/right_padding", PART, "lowering"):
        rows = short_and_long(embeds.values())
        alone = np.concatenate([_answered([row], exact, fed, 0) for row in rows])
        gate.close("decoder/right_padding", PART, "lowering", alone, _answered(rows, exact, fed, 0), limit)


def _answered(rows: Sequence[DecoderInputs], runner: Runner, fed: Array, keep: int) -> Array:
    """Logits of the start token and of the last `keep` (0: all) of the tokens `fed` ``[1, n]``, fed in one call."""
    inputs, mask = stacked(rows)
    logits, cache = inputs.prefill(runner, mask)
    more = token_inputs(runner, fed.repeat(len(rows), axis=0)).decode(runner, cache, keep)
    return np.concatenate([logits, more], axis=1)


def _token_by_token(row: DecoderInputs, runner: Runner, fed: Array) -> Array:
    logits, cache = row.prefill(runner)
    steps = [token_inputs(runner, fed[:, i : i + 1]).decode(runner, cache) for i in range(fed.shape[1])]
    return np.concatenate([logits, *steps], axis=1)


def _left_padding(exact: Runner, embeds: Mapping[str, DecoderInputs]) -> list[str]:
    inputs, mask = stacked(short_and_long(embeds.values()), "left")
    try:
        inputs.prefill(exact, mask, 1)
    except BadInputError:
        return []
    return ["a left-padded batch was accepted, although the encoder counts its positions from the first token"]
