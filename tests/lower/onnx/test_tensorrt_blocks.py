"""Decoders with blocks of tokens that see each other, in TensorRT's dialect: against PyTorch, and built by RTX."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.lower.onnx import decoding
from tests.lower.onnx.decoding import Model, relative
from tests.lower.onnx.rtx import Dims, build_engine
from tests.lower.onnx.test_tensorrt_decoder import Static
from tests.zoo.gemma import gemma_examples, make_gemma
from vlmexport.errors import UnsupportedModelError
from vlmexport.model.load import load_vlm
from vlmexport.plan import OnnxOptions
from vlmexport.split.capture import split_model
from vlmexport.trt_options import TrtOptions
from vlmexport.trt_plan import plan_trt

LIMIT = 1e-5
CACHE = 64
EXACT = OnnxOptions("tensorrt", "tensorrt", None, attention="static", cache_length=CACHE, decoder_dtype="fp32")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Model:
    vlm = load_vlm(str(make_gemma("gemma3", tmp_path_factory.mktemp("gemma3"))))
    return Model(vlm, split_model(vlm, gemma_examples("gemma3", vlm.facts.image_token_id)))


def test_prompts_with_blocks_and_steps_behind_them(gemma3: Model, tmp_path: Path) -> None:
    path = decoding.write(decoding.lower(gemma3, EXACT), tmp_path)
    session = Static(path)
    short, long = (example for example in gemma3.part.examples[:2])
    rows = [short["inputs_embeds"][0], long["inputs_embeds"][0]]
    embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    ids = torch.nn.utils.rnn.pad_sequence([short["block_ids"][0], long["block_ids"][0]], batch_first=True)
    assert "block_ids" in session.inputs
    logits, past = session.run(embeds, [0, 0], session.empty(2), block_ids=ids)
    for row, example in enumerate((short, long)):
        with torch.no_grad():
            wanted = gemma3.part.module(**example)[0]
        assert relative(logits[row, : len(rows[row])], wanted) <= LIMIT
    step = torch.randn(2, 1, embeds.shape[2], generator=torch.Generator().manual_seed(0))
    logits, _ = session.run(step, [len(row) for row in rows], past, block_ids=torch.zeros(2, 1, dtype=torch.int64))
    for row, example in enumerate((short, long)):
        whole = torch.cat([example["inputs_embeds"], step[row : row + 1]], dim=1)
        blocks = torch.nn.functional.pad(example["block_ids"], (0, 1))
        with torch.no_grad():
            wanted = gemma3.part.module(whole, torch.ones_like(blocks), block_ids=blocks)[0, -1:]
        assert relative(logits[row], wanted) <= LIMIT
    causal, _ = session.run(embeds, [0, 0], session.empty(2), block_ids=torch.zeros_like(ids))
    assert relative(causal[1], gemma3.part.module(**long)[0].detach()) > 0.1


@pytest.mark.slow
def test_tensorrt_for_rtx_builds_the_graph(gemma3: Model, tmp_path: Path) -> None:
    path = decoding.write(decoding.lower(gemma3, dataclasses.replace(EXACT, decoder_dtype="fp16")), tmp_path)

    def shapes(name: str, dims: Dims, tokens: int) -> Dims:
        free = {"inputs_embeds": (1, tokens), "block_ids": (1, tokens), "logits_positions": (1, 1)}.get(name, (1,))
        return (*free, *dims[len(free) :])

    size = build_engine(path, shapes, (24, 1))
    assert isinstance(size, int), size


def test_an_export_for_a_gpu_is_refused_for_now(gemma3: Model) -> None:
    with pytest.raises(UnsupportedModelError, match="gemma3: its decoder takes block_ids beside embeddings"):
        plan_trt(gemma3.vlm, gemma3.split, TrtOptions(EXACT, "a10"), None)
