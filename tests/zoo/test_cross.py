"""Decoders that attend to states beside their tokens, as exported: equal to PyTorch, and red when a key is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from tests.zoo import registry
from tests.zoo.measure import ONNX_LIMIT, largest
from tests.zoo.proof import FLOATS, Zooed, export, relative
from vlmexport.cross_plan import check_cross
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.manifest import Artifact
from vlmexport.model.merge import MergeSpec
from vlmexport.plan import plan_export
from vlmexport.plan_file import AutoLimit
from vlmexport.quantize.scheme import make_scheme
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.split.difference import REPLAY_LIMIT
from vlmexport.target import load_target
from vlmexport.trt_plan import check_split

pytestmark = pytest.mark.slow
_TEXT = ("input_ids", "attention_mask")
STANDARD = dataclasses.replace(FLOATS, attention="standard")


@dataclasses.dataclass(frozen=True)
class Exported:
    """One family with its FP32 export."""

    zooed: Zooed
    artifact: Artifact
    ours: OnnxRunner


# Two ways to attend to states: by layers of every block, and by blocks of their own that see tiles of pictures.
FAMILIES = ["florence2", pytest.param("mllama", marks=pytest.mark.family)]
# What test_support asks of every family is asked here of the one in `make test` alone; INT4 codes are left to it.
once = pytest.mark.parametrize("exported", ["florence2"], indirect=True)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """The tiny checkpoint, split and exported in FP32."""
    folder = tmp_path_factory.mktemp(request.param)
    vlm, examples = registry.make(request.param, folder / "model")
    zooed = Zooed(vlm, split_model(vlm, examples), examples)
    artifact = export(zooed, STANDARD, folder / "fp32")
    yield Exported(zooed, artifact, OnnxRunner(artifact, threads=1, exact=True))


def _prompt(zooed: Zooed, index: int) -> ModelInputs:
    example = zooed.examples[index]
    pixels = {name: tensor.numpy() for name, tensor in example.items() if name not in _TEXT}
    return ModelInputs(example["input_ids"].numpy(), pixels)


@once
def test_the_parts_reproduce_the_model_and_the_export_the_parts(exported: Exported) -> None:
    """On all examples, through the first token of an answer and 16 more."""
    assert exported.zooed.split.replay_difference <= REPLAY_LIMIT
    assert largest(exported.zooed, exported.artifact) <= ONNX_LIMIT


@once
def test_the_answer_depends_on_the_picture(exported: Exported) -> None:
    """Another picture gives other logits."""
    item = _prompt(exported.zooed, 0)
    other = dataclasses.replace(item, pixel_inputs={**item.pixel_inputs})
    other.pixel_inputs["pixel_values"] = item.pixel_inputs["pixel_values"][..., ::-1].copy()
    rows = [merged_inputs(exported.ours, [p])[0].prefill(exported.ours)[0] for p in (item, other)]
    assert relative(rows[1], rows[0]) > 1e-3


def test_a_batch_of_prompts_is_each_of_them(exported: Exported) -> None:
    """Prompts of different length, padded, give what they give alone, for the first token and the next ones."""
    ours, items = exported.ours, [_prompt(exported.zooed, index) for index in (0, 1)]
    both, mask = merged_inputs(ours, items)
    logits, cache = both.prefill(ours, mask)
    singles = [merged_inputs(ours, [item])[0].prefill(ours) for item in items]
    for _ in range(3):
        alone = np.concatenate([row for row, _ in singles])
        assert relative(logits, alone) <= 1e-5
        tokens = ours.embed(logits[:, -1:].argmax(-1).astype(np.int64))
        logits = ours.decode(tokens, cache)
        singles = [(ours.decode(tokens[i : i + 1], past), past) for i, (_, past) in enumerate(singles)]


def test_keys_of_one_layer_that_are_lost_turn_the_proof_red(exported: Exported) -> None:
    """Without the keys and values of a single layer the logits are others."""
    ours, theirs = (
        OnnxRunner(exported.artifact, threads=1, exact=True),
        TorchRunner(exported.zooed.vlm, exported.zooed.split),
    )
    item = _prompt(exported.zooed, 0)
    wanted, mask = merged_inputs(theirs, [item])  # the export's own embeddings are rounded
    (_, cache), (_, past) = wanted.prefill(ours, mask), wanted.prefill(theirs, mask)
    token = ours.embed(np.array([[5]]))
    assert relative(ours.decode(token, cache), theirs.decode(token, past)) <= ONNX_LIMIT
    for name in ("cross_key_values.1.key", "cross_key_values.1.value"):
        cache.fixed[name] = np.zeros_like(cache.fixed[name])
    assert relative(ours.decode(token, cache), theirs.decode(token, past)) > ONNX_LIMIT


def test_every_weight_has_its_place(exported: Exported) -> None:
    """Keys and values of what the decoder attends to belong to the part that makes them, unquantized."""
    zooed, options = exported.zooed, dataclasses.replace(STANDARD, scheme=make_scheme("rtn", group_size=32))
    plan = plan_export(zooed.vlm, zooed.split, load_target("cpu"), options)
    once = [weight for weight in plan.weights if weight.part == "encoder"]
    assert {weight.action for weight in once} == {"keep"}
    assert {weight.reason for weight in once} == {"runs once for each prompt: not quantized"}
    assert any(weight.action == "quantize" and weight.part == "decoder" for weight in plan.weights)


def test_the_merge_survives_the_manifest(exported: Exported) -> None:
    """What the runner reads is what the split found."""
    merge = exported.zooed.split.merge
    assert merge.crosses and MergeSpec.from_dict(merge.to_dict()) == merge
    assert exported.ours.merge_spec == merge


def test_what_has_no_form_is_refused_with_the_way_out(exported: Exported) -> None:
    """Calibration, other caches, other layouts and engines know decoders of their own tokens alone."""
    zooed = exported.zooed
    refused = {
        "choose --quant rtn or hqq": {"scheme": make_scheme("awq", group_size=32)},
        "--quant auto": {"choice": AutoLimit(max_kl=0.1)},
        "choose --kv-cache same": {"kv_cache": "int8"},
        "choose --prefill same": {"prefill": "int8"},
        "choose --layout split": {"layout": "transformersjs"},
    }
    for way_out, change in refused.items():
        with pytest.raises(BadInputError, match=way_out):
            check_cross(zooed.vlm, zooed.split, dataclasses.replace(STANDARD, **change))
    with pytest.raises(UnsupportedModelError, match="engines have no form"):
        check_split(zooed.vlm, zooed.split)
