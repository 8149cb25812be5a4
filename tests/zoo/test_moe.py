"""Mixtures of experts whose layers differ in more than their weights.

Each family's exports are proven by test_support, what is asked of experts in general by tests/test_onnx_experts.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.zoo import registry
from vlmexport.lower.onnx.trace import trace_decoder
from vlmexport.split.capture import split_model
from vlmexport.split.parts import Role


@pytest.mark.slow
@pytest.mark.family
def test_layers_that_differ_in_a_stored_buffer_are_one_kind_with_numbers_of_their_own(tmp_path: Path) -> None:
    """The bias of each expert's choice is no parameter: a layer that had its neighbour's would choose other experts."""
    vlm, examples = registry.make("glm4v_moe", tmp_path / "model")
    part = split_model(vlm, examples).parts[Role.DECODER].module
    traced = trace_decoder(vlm.model, part, fuse_rotary=True)  # type: ignore[arg-type]
    assert traced.kind_of == (0, 1, 1)
    biases = [held for name, held in traced.buffers.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2
    assert not torch.equal(*biases)


@pytest.mark.slow
def test_a_checkpoint_in_bfloat16_is_split_with_the_float32_pictures_of_a_processor(tmp_path: Path) -> None:
    """Llama 4 turns no picture into the type of its weights, and layers that count tokens compute in it."""
    vlm, examples = registry.make("llama4", tmp_path / "model")
    for parameter in vlm.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert all(example["pixel_values"].dtype == torch.float32 for example in examples)
    split = split_model(vlm, examples)
    part = split.parts[Role.DECODER].module
    assert (part.chunks, part.counted) == ((16, 0, 16), (1,))
    assert split.replay_difference == 0
