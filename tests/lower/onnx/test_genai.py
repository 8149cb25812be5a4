"""The genai layout's graphs, files and refusals; what the runtime does with them is in tests/clients."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from tests.families.tiny_text import byte_level_tokenizer
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.families.genai import GENAI_FAMILIES, UNWRITTEN
from vlmexport.lower.onnx import genai_files
from vlmexport.lower.onnx.embedding import lower_embedding
from vlmexport.lower.onnx.genai_families import genai_family
from vlmexport.lower.onnx.genai_graphs import with_merge
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.model.merge import MergeSpec
from vlmexport.plan import OnnxOptions, check_options
from vlmexport.progress import SilentProgress
from vlmexport.split.parts import Part, Role, Signature
from vlmexport.target import load_target

IMAGE, HIDDEN = 7, 4
GENAI = OnnxOptions(layout="genai")


@pytest.fixture
def merging(tmp_path: Path) -> ort.InferenceSession:
    torch.manual_seed(0)
    part = Part(Role.EMBEDDING, nn.Embedding(16, HIDDEN), "table.", Signature((), ()), ())
    graph = with_merge(lower_embedding(part, 21, ir.DataType.FLOAT), IMAGE)
    stream_weights(graph.model, graph.groups, tmp_path / "embedding.onnx", SilentProgress(), "write")
    return ort.InferenceSession(tmp_path / "embedding.onnx")


def merged(session: ort.InferenceSession, ids: list[list[int]], rows: int) -> np.ndarray[Any, Any]:
    features = 100 + np.arange(rows * HIDDEN, dtype=np.float32).reshape(rows, HIDDEN)
    found = session.run(None, {"input_ids": np.array(ids), "image_features": features})[0]
    return np.asarray(found)


def test_feature_rows_take_the_places_of_image_tokens_in_order(merging: ort.InferenceSession) -> None:
    ids = [[1, IMAGE, 2, IMAGE], [IMAGE, 3, 3, 4]]
    plain, found = merged(merging, ids, 0), merged(merging, ids, 3)
    places = np.array(ids) == IMAGE
    np.testing.assert_array_equal(found[places], 100 + np.arange(12, dtype=np.float32).reshape(3, HIDDEN))
    np.testing.assert_array_equal(found[~places], plain[~places])
    assert (plain < 50).all()


def test_a_text_and_a_step_need_no_rows(merging: ort.InferenceSession) -> None:
    text = merged(merging, [[1, 2, 3]], 0)
    assert text.shape == (1, 3, HIDDEN)
    np.testing.assert_array_equal(merged(merging, [[2]], 0)[0, 0], text[0, 1])
    assert merged(merging, [[IMAGE]], 0).shape == (1, 1, HIDDEN)


@pytest.mark.parametrize(("ids", "rows"), [([[1, IMAGE]], 2), ([[IMAGE, IMAGE, 1]], 1), ([[1, 2]], 1)])
def test_another_number_of_rows_is_an_error(merging: ort.InferenceSession, ids: list[list[int]], rows: int) -> None:
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match="ScatterND"):
        merged(merging, ids, rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dataclasses.replace(GENAI, attention="standard"), "runs only --attention gqa"),
        (dataclasses.replace(GENAI, kv_cache="int8"), "runs only --kv-cache same"),
        (dataclasses.replace(GENAI, prefill="int8"), "runs only --prefill same"),
        (dataclasses.replace(GENAI, preprocessor=True), "prepares pictures by itself"),
    ],
)
def test_options_that_the_runtime_has_no_place_for_are_refused(options: OnnxOptions, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        check_options(options, load_target("cpu"))


def model_of(name: str, uniform: bool = True, **merge: Any) -> tuple[Any, Any]:
    vlm = SimpleNamespace(facts=SimpleNamespace(model_type=name))
    return vlm, SimpleNamespace(merge=MergeSpec(image_token_id=1, **merge), kv=SimpleNamespace(uniform=uniform))


@pytest.mark.parametrize(
    ("name", "uniform", "merge", "reason"),
    [
        ("idefics3", True, {}, "onnxruntime-genai runs no such model; this layout is for qwen2_vl, qwen2_5_vl"),
        ("gemma3", True, {}, "runs every decoder with a causal mask"),
        ("qwen3_vl", True, {}, "nothing of the image beside the embeddings"),
        ("qwen2_vl", True, {"deepstack_layers": 3}, "nothing of the image beside the embeddings"),
        ("qwen2_vl", True, {"mask": "image_blocks"}, "runs every decoder with a causal mask"),
        ("qwen2_vl", True, {"place": "add"}, "in a way that onnxruntime-genai does not know"),
        ("qwen2_vl", True, {"extras": ("block_ids",)}, "gives the decoder no block_ids"),
        ("qwen2_vl", False, {}, "keep different things"),
    ],
)
def test_models_that_the_runtime_does_not_run_are_refused(
    name: str, uniform: bool, merge: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name}: no genai layout: .*{reason}"):
        genai_family(*model_of(name, uniform, **merge))


def test_every_family_of_the_table_is_taken() -> None:
    for name in GENAI_FAMILIES:
        assert genai_family(*model_of(name, extras=("position_ids",))).runs_as == "qwen2_5_vl"
    assert not GENAI_FAMILIES.keys() & UNWRITTEN.keys()


def image_processor(**changed: Any) -> Any:
    known = {
        "resample": 3, "size": {"shortest_edge": 3136, "longest_edge": 100352}, "patch_size": 14, "merge_size": 2,
        "temporal_patch_size": 2, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
    }  # fmt: skip
    return SimpleNamespace(**{**known, **changed})


def test_the_image_processors_steps_in_the_runtimes_words() -> None:
    vlm: Any = SimpleNamespace(facts=SimpleNamespace(model_type="qwen2_vl"))
    steps = [step["operation"] for step in genai_files._transforms(vlm, image_processor())]
    assert [step["type"] for step in steps] == ["DecodeImage", "Resize", "Rescale", "Normalize", "PatchImage"]
    assert steps[1]["attrs"]["interpolation"] == "CUBIC"
    assert (steps[1]["attrs"]["min_pixels"], steps[1]["attrs"]["max_pixels"]) == (3136, 100352)
    json.dumps(steps)
    for changed in ({"do_resize": False}, {"do_normalize": False}, {"resample": 5}):
        with pytest.raises(UnsupportedModelError, match="has no image processor with"):
            genai_files._transforms(vlm, image_processor(**changed))


def test_padding_that_prompts_hold_is_no_padding() -> None:
    tokenizer = byte_level_tokenizer(("<|end|>", "<|stop|>"), 300)
    assert genai_files._padding(tokenizer) == tokenizer.pad_token_id
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    assert genai_files._padding(tokenizer) == -1
    tokenizer.pad_token = None
    assert genai_files._padding(tokenizer) == -1
