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
        whole, last = (_in_one_call(longest, exact, fed, keep) for keep in (0, 1))
        gate.close("decoder/keep_last", PART, "lowering", whole[:, -1:], last[:, -1:], limit)
    with gate.guard("decoder/cache", PART, "lowering"):
        found = _token_by_token([longest], exact, fed)
        gate.close("decoder/cache", PART, "lowering", _in_one_call(longest, exact, fed, 0), found, limit)
    with gate.guard("decoder/padding_guard", PART, "lowering"):
        gate.verdict("decoder/padding_guard", PART, "lowering", _left_padding(exact, embeds), "faults")
    with gate.guard("decoder/right_padding", PART, "lowering"):
        rows = short_and_long(embeds.values())
        alone = np.concatenate([_token_by_token([row], exact, fed) for row in rows])
        gate.close("decoder/right_padding", PART, "lowering", alone, _token_by_token(rows, exact, fed), limit)


def _in_one_call(row: DecoderInputs, runner: Runner, fed: Array, keep: int) -> Array:
    """Logits of the start token and of the last `keep` (0: all) of the tokens `fed` ``[1, n]``, fed in one call."""
    logits, cache = row.prefill(runner)
    return np.concatenate([logits, token_inputs(runner, fed).decode(runner, cache, keep)], axis=1)


def _token_by_token(rows: Sequence[DecoderInputs], runner: Runner, fed: Array) -> Array:
    """Logits ``[rows, 1 + n, vocab]`` of the start token and of all of `fed`, fed to every row of one padded batch."""
    inputs, mask = stacked(rows)
    logits, cache = inputs.prefill(runner, mask)
    found = [logits]
    for place in range(fed.shape[1]):
        tokens = fed[:, place : place + 1].repeat(len(rows), axis=0)
        found.append(token_inputs(runner, tokens).decode(runner, cache))
    return np.concatenate(found, axis=1)


def _left_padding(exact: Runner, embeds: Mapping[str, DecoderInputs]) -> list[str]:
    inputs, mask = stacked(short_and_long(embeds.values()), "left")
    try:
        inputs.prefill(exact, mask, 1)
    except BadInputError:
        return []
    return ["a left-padded batch was accepted, although the encoder counts its positions from the first token"]
