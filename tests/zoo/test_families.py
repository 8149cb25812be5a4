"""Families whose image features replace token embeddings: split, lowered, quantized, and compared with PyTorch.

Only the first example is traced; features of all three and logits of the last are compared, through 16 decode steps.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.zoo.measure import int4_difference
from tests.zoo.proof import FLOATS, Zooed, export, largest_differences, take_apart
from vlmexport.errors import NotPossibleHereError
from vlmexport.model.load import load_vlm

REPLAY_LIMIT, LOWERING_LIMIT = 1e-5, 1e-4
# One of each way in which features come to the decoder; every family is proven by test_support.
FAMILIES = [
    pytest.param("pixtral", marks=[pytest.mark.slow, pytest.mark.family]),
    pytest.param("cohere2_vision", marks=[pytest.mark.slow, pytest.mark.family]),
    pytest.param("llava_next", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=FAMILIES)
def zooed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zooed:
    return take_apart(request.param, tmp_path_factory.mktemp(request.param) / "model")


@pytest.mark.slow
@pytest.mark.parametrize("zooed", ["llava_next"], indirect=True)
def test_parts_reproduce_the_model_and_so_does_onnx(zooed: Zooed, tmp_path: Path) -> None:
    assert zooed.split.replay_difference <= REPLAY_LIMIT
    found = largest_differences(zooed, export(zooed, FLOATS, tmp_path))
    assert {"features[0]", "features[1]", "features[2]", "prefill", "decode"} <= found.keys()
    assert max(found.values()) <= LOWERING_LIMIT, found


@pytest.mark.slow
def test_the_standard_form_is_as_exact(zooed: Zooed, tmp_path: Path) -> None:
    found = largest_differences(zooed, export(zooed, dataclasses.replace(FLOATS, attention="standard"), tmp_path))
    assert max(found.values()) <= LOWERING_LIMIT, found


@pytest.mark.slow
@pytest.mark.parametrize("zooed", ["llava_next"], indirect=True)
def test_int4_products_are_those_of_the_dequantized_codes(zooed: Zooed, tmp_path: Path) -> None:
    rounded, original = int4_difference(zooed, tmp_path)
    assert rounded <= LOWERING_LIMIT < original


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
@pytest.mark.parametrize("family", ["PerceptionLM", "FastVlm"])
def test_a_tower_of_timm_is_refused_without_it(family: str, tmp_path: Path) -> None:
    vision = {"model_type": "timm_wrapper", "architecture": "vit_pe_core_large_patch14_336"}
    config = getattr(transformers, f"{family}Config")(vision_config=vision)
    config.architectures = [f"{family}ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotPossibleHereError, match="requires the timm library"):
        load_vlm(str(tmp_path))


def test_a_decoder_without_rotary_embedding_has_the_fast_form(tmp_path: Path) -> None:
    """Positions are added to the embeddings; attention keeps its operator, which then turns nothing."""
    parts = take_apart("blip2", tmp_path / "model")
    artifact = export(parts, FLOATS, tmp_path / "fp32")
    graph = onnx.load(artifact.part_path("decoder"), load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    turned = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "do_rotary"]
    assert turned == [0, 0, 0]
    assert max(largest_differences(parts, artifact).values()) <= LOWERING_LIMIT
