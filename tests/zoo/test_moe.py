"""Mixtures of experts: exact through a prompt and 16 steps, in floats and in INT4, and every expert accounted for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.zoo import registry
from tests.zoo.measure import ONNX_LIMIT, int4_difference, largest
from tests.zoo.proof import FLOATS, Zooed, export
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.trace import trace_decoder
from vlmexport.split.capture import split_model
from vlmexport.split.parts import Role

FAMILIES = ("qwen3_vl_moe", "glm4v_moe", "aria")
REPLAY_LIMIT = 1e-5


def taken_apart(family: str, folder: Path) -> Zooed:
    vlm, examples = registry.make(family, folder)
    return Zooed(vlm, split_model(vlm, examples), examples)


@pytest.mark.slow
@pytest.mark.family
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_exact_in_onnx(family: str, tmp_path: Path) -> None:
    zooed = taken_apart(family, tmp_path / "model")
    assert zooed.split.replay_difference <= REPLAY_LIMIT
    artifact = export(zooed, FLOATS, tmp_path / "floats")
    assert artifact.manifest.model["attention"] == "gqa"
    assert largest(zooed, artifact) <= ONNX_LIMIT
    rounded, whole = int4_difference(zooed, tmp_path / "int4")
    assert rounded <= ONNX_LIMIT
    assert whole > 10 * ONNX_LIMIT


@pytest.mark.slow
@pytest.mark.family
@pytest.mark.parametrize("family", FAMILIES)
def test_the_answer_depends_on_the_picture(family: str, tmp_path: Path) -> None:
    vlm, examples = registry.make(family, tmp_path / "model")
    changed = {**examples[0], "pixel_values": examples[0]["pixel_values"] + 0.5}
    with torch.no_grad():
        before, after = (vlm.model(**example).logits.numpy() for example in (examples[0], changed))
    assert np.abs(before - after).max() > 1e-3 * np.abs(before).max()


@pytest.mark.slow
@pytest.mark.family
def test_layers_that_differ_in_a_stored_buffer_are_one_kind_with_numbers_of_their_own(tmp_path: Path) -> None:
    """The bias of each expert's choice is no parameter: a layer that had its neighbour's would choose other experts."""
    zooed = taken_apart("glm4v_moe", tmp_path / "model")
    part = zooed.split.parts[Role.DECODER].module
    traced = trace_decoder(zooed.vlm.model, part, fuse_rotary=True)  # type: ignore[arg-type]
    assert traced.kind_of == (0, 1, 1)
    biases = [held for name, held in traced.buffers.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert not torch.equal(*biases)


@pytest.mark.slow
def test_llama_4_is_refused_with_the_reason(tmp_path: Path) -> None:
    """Masks of prompts that are shorter than a chunk look causal, so it is not left to them."""
    vlm, examples = registry.make("llama4", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="llama4: layers of its decoder see chunks of 16 tokens"):
        split_model(vlm, examples)
