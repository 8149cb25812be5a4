"""Families whose image features replace token embeddings: split, lowered, quantized, and compared with PyTorch.

Only the first example is traced; features of all three and logits of the last are compared, through 16 decode steps.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.zoo.measure import int4_difference
from tests.zoo.models import make_zoo, zoo_examples
from tests.zoo.proof import FLOATS, Zooed, export, largest_differences, take_apart
from vlmexport.errors import NotPossibleHereError, UnsupportedModelError
from vlmexport.lower.onnx.trace import trace_decoder
from vlmexport.model.load import load_vlm
from vlmexport.split.capture import split_model
from vlmexport.split.parts import Role

REPLAY_LIMIT, LOWERING_LIMIT = 1e-5, 1e-4
# One of each way in which features come to the decoder; every family is proven by test_support.
FAMILIES = [pytest.param(family, marks=pytest.mark.slow) for family in ("pixtral", "cohere2_vision", "llava_next")]
REFUSED = {
    "lfm2_vl": r"lfm2_vl: layer 0 \(conv\) of the decoder keeps no keys and values of its own but another state",
}


@pytest.fixture(scope="module", params=FAMILIES)
def zooed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zooed:
    return take_apart(request.param, tmp_path_factory.mktemp(request.param) / "model")


def test_parts_reproduce_the_model_and_so_does_onnx(zooed: Zooed, tmp_path: Path) -> None:
    assert zooed.split.replay_difference <= REPLAY_LIMIT
    found = largest_differences(zooed, export(zooed, FLOATS, tmp_path))
    assert {"features[0]", "features[1]", "features[2]", "prefill", "decode"} <= found.keys()
    assert max(found.values()) <= LOWERING_LIMIT, found


@pytest.mark.slow
def test_the_standard_form_is_as_exact(zooed: Zooed, tmp_path: Path) -> None:
    found = largest_differences(zooed, export(zooed, dataclasses.replace(FLOATS, attention="standard"), tmp_path))
    assert max(found.values()) <= LOWERING_LIMIT, found


def test_int4_products_are_those_of_the_dequantized_codes(zooed: Zooed, tmp_path: Path) -> None:
    rounded, original = int4_difference(zooed, tmp_path)
    assert rounded <= LOWERING_LIMIT < original


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_taken_apart_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    vlm = load_vlm(str(make_zoo(family, tmp_path / "model")))
    examples = zoo_examples(family, vlm.model, vlm.facts.image_token_id)
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        split_model(vlm, examples)


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


def test_a_decoder_without_rotary_embedding_names_the_form_that_it_has(tmp_path: Path) -> None:
    parts = take_apart("blip2", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="--attention standard"):
        trace_decoder(parts.vlm.model, parts.split.parts[Role.DECODER].module, fuse_rotary=True)  # type: ignore[arg-type]
