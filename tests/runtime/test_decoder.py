"""What a ``standard`` decoder graph is fed: a graph that only reports its mask and positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.runtime.mock_export import F32, I64, Graph
from vlmexport.model.kv import KVGeometry
from vlmexport.runtime.decoder import DecoderSession
from vlmexport.runtime.sessions import SessionSettings, open_session

WIDTH = 12


def reporting_graph(path: Path) -> Path:
    """Logits: one-hot of the position, plus 100 x the number of valid tokens. Cache: the embeddings, joined."""
    g = Graph()
    onehot = g.op("OneHot", "position_ids", g.const(WIDTH, np.int64), g.const([0, 1]))
    valid = g.op("Cast", g.op("ReduceSum", "attention_mask", g.const([1], np.int64)), to=F32)
    g.op("Add", onehot, g.op("Mul", g.op("Unsqueeze", valid, g.const([2], np.int64)), g.const(100)), outputs=["logits"])
    new = g.op("Unsqueeze", "inputs_embeds", g.const([1], np.int64))
    for kind in ("key", "value"):
        g.op("Concat", f"past_key_values.0.{kind}", new, outputs=[f"present.0.{kind}"], axis=2)
    past = [(f"past_key_values.0.{k}", F32, ["batch_size", 1, "past_sequence_length", 4]) for k in ("key", "value")]
    present = [(f"present.0.{k}", F32, ["batch_size", 1, "total_sequence_length", 4]) for k in ("key", "value")]
    inputs = [
        ("inputs_embeds", F32, ["batch_size", "sequence_length", 4]),
        ("attention_mask", I64, ["batch_size", "total_sequence_length"]),
        ("position_ids", I64, ["batch_size", "sequence_length"]),
        *past,
    ]
    g.save(path, inputs, [("logits", F32, ["batch_size", "sequence_length", WIDTH]), *present])
    return path


def session(path: Path) -> DecoderSession:
    return DecoderSession(open_session(path, "decoder", SessionSettings(1)), KVGeometry(1, 1, 4), "standard")


@pytest.mark.parametrize(
    ("mask", "positions", "later"),
    [
        ([[1, 1, 1], [1, 0, 0]], [[0, 1, 2], [0, 0, 0]], [3, 1]),
        ([[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [0, 0, 0]], [3, 1]),
    ],
    ids=["right", "left"],
)
def test_positions_and_masks_follow_the_padding(
    tmp_path: Path, mask: list[list[int]], positions: list[list[int]], later: list[int]
) -> None:
    decoder = session(reporting_graph(tmp_path / "decoder.onnx"))
    embeds = np.zeros((2, 3, 4), np.float32)
    logits, cache = decoder.prefill(embeds, np.array(mask), 0, reserve=0)
    assert (logits % 100).argmax(-1).tolist() == positions
    for step in range(3):
        logits = decoder.decode(embeds[:, :1], cache, 1)
        assert (logits[:, 0] % 100).argmax(-1).tolist() == [p + step for p in later]
        assert (logits[:, 0] // 100).max(-1).tolist() == [p + step + 1 for p in later] == cache.lengths.tolist()


def test_a_graph_without_num_logits_to_keep_is_cut_to_the_last_valid(tmp_path: Path) -> None:
    decoder = session(reporting_graph(tmp_path / "decoder.onnx"))
    mask = np.array([[1, 1, 1], [1, 1, 0]])
    logits, _ = decoder.prefill(np.zeros((2, 3, 4), np.float32), mask, 1, reserve=0)
    assert logits.shape == (2, 1, WIDTH)
    assert (logits[:, 0] % 100).argmax(-1).tolist() == [2, 1]
