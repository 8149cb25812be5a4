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
