"""Families whose image features replace token embeddings: split, lowered, quantized, and compared with PyTorch.

Only the first example is traced; features of all three and logits of the last are compared, through 16 decode steps.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.zoo.models import make_zoo, zoo_examples
from tests.zoo.proof import FLOATS, Zooed, export, largest_differences, relative, take_apart
from vlmexport.errors import NotPossibleHereError, UnsupportedModelError
from vlmexport.lower.onnx import decoder
from vlmexport.lower.onnx.trace import TracedDecoder, trace_decoder
from vlmexport.manifest import Artifact
from vlmexport.model.load import load_vlm
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import merge
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role

REPLAY_LIMIT, LOWERING_LIMIT = 1e-5, 1e-4
INT4 = dataclasses.replace(FLOATS, scheme=make_scheme("rtn", group_size=32))
# Decoders without rotary embedding have the standard form only.
NO_ROTARY = ("blip2", "instructblip")
# Of each way in which features come to the decoder one is in `make test`, the others are in `make test-all`.
ONE_OF_EACH = ("pixtral", "cohere2_vision", "llava_next")
OTHERS = (
    "llava", "vipllava", "llava_onevision", "video_llava", "idefics2", "idefics3", "smolvlm", "internvl", "aya_vision",
    "deepseek_vl", "janus", "got_ocr2", "mistral3", *NO_ROTARY,
)  # fmt: skip
FAMILIES = [
    *(pytest.param(family, marks=pytest.mark.slow) for family in ONE_OF_EACH),
    *(pytest.param(family, marks=[pytest.mark.slow, pytest.mark.family]) for family in OTHERS),
]
REFUSED = {
    "lfm2_vl": r"lfm2_vl: layer 0 \(conv\) of the decoder keeps no keys and values of its own but another state",
}


@pytest.fixture(scope="module", params=FAMILIES)
def zooed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Zooed]:
    return request.param, take_apart(request.param, tmp_path_factory.mktemp(request.param) / "model")


def default_form(family: str) -> str:
    return "standard" if family in NO_ROTARY else "gqa"


def exported(family: str, zooed: Zooed, folder: Path, attention: str, **options: object) -> Artifact:
    """An export; one trace of the decoder does for all that differ in their weights alone."""
    chosen = dataclasses.replace(FLOATS, attention=attention, **options)  # type: ignore[arg-type]
    with mock.patch.object(decoder, "trace_decoder", _trace_once):
        return export(zooed, chosen, folder)


@functools.cache
def _trace_once(model: Any, part: Any, *, fuse_rotary: bool, repeat: bool) -> TracedDecoder:
    return trace_decoder(model, part, fuse_rotary=fuse_rotary, repeat=repeat)


def test_parts_reproduce_the_model_and_so_does_onnx(zooed: tuple[str, Zooed], tmp_path: Path) -> None:
    family, parts = zooed
    assert parts.split.replay_difference <= REPLAY_LIMIT
    found = largest_differences(parts, exported(family, parts, tmp_path, default_form(family)))
    assert {"features[0]", "features[1]", "features[2]", "prefill", "decode"} <= found.keys()
    assert max(found.values()) <= LOWERING_LIMIT, found


@pytest.mark.slow
def test_the_standard_form_is_as_exact(zooed: tuple[str, Zooed], tmp_path: Path) -> None:
    family, parts = zooed
    if default_form(family) == "standard":
        pytest.skip("the standard form is this family's only one")
    found = largest_differences(parts, exported(family, parts, tmp_path, "standard"))
    assert max(found.values()) <= LOWERING_LIMIT, found


def test_int4_products_are_those_of_the_dequantized_codes(zooed: tuple[str, Zooed], tmp_path: Path) -> None:
    family, parts = zooed
    artifact = exported(family, parts, tmp_path, default_form(family), scheme=INT4.scheme)
    names = [member.name for record in artifact.manifest.quantized for member in record.members]
    assert any(name.endswith("q_proj.weight") for name in names)
    schemes = dict.fromkeys(names, INT4.scheme)
    weights = DecoderWeights(weight_names(parts.vlm.model, parts.split.parts[Role.DECODER].module), schemes)
    reference, example = TorchRunner(parts.vlm, parts.split), parts.examples[-1]
    ids = example["input_ids"].numpy()
    pixels = {name: t.numpy() for name, t in example.items() if name not in ("input_ids", "attention_mask")}
    embeds = merge(parts.split.merge, reference.embed(ids), ids, reference.image_features(pixels))
    mask = np.ones(ids.shape, np.int64)
    whole, _ = reference.prefill(embeds, mask, 0)
    with reference.substituted({name: weights.quantized(name).dequantize() for name in names}):
        wanted, _ = reference.prefill(embeds, mask, 0)
    logits, _ = OnnxRunner(artifact, threads=1, exact=True).prefill(embeds, mask, 0)
    assert np.isfinite(logits).all()
    assert relative(logits, wanted) <= LOWERING_LIMIT
    assert relative(whole, wanted) > LOWERING_LIMIT


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
