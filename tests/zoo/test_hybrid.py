"""Families whose decoders mix attention with layers that keep states, from the split to ONNX Runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tests.zoo import registry
from tests.zoo.measure import image_effect, int4_difference, largest
from tests.zoo.proof import FLOATS, Zooed, export, relative
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.manifest import Artifact
from vlmexport.model.kv import KVGeometry, State
from vlmexport.plan import plan_export
from vlmexport.runtime.decoder import DecoderSession, SharedCache
from vlmexport.runtime.decoder_inputs import DecoderInputs, merged_inputs, stacked
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs, Runner
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.cache import find_cache
from vlmexport.split.capture import split_model
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.kinds import proven_kinds
from vlmexport.split.layers import find_layers
from vlmexport.split.parts import Role
from vlmexport.split.states import kept_states
from vlmexport.target import load_target
from vlmexport.trt_plan import check_split

LIMIT = 1e-4
_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
# The one with the cheaper export is in `make test`.
FAMILIES = [
    pytest.param("lfm2_vl", marks=pytest.mark.slow),
    pytest.param("qwen3_5", marks=[pytest.mark.slow, pytest.mark.family]),
    pytest.param("lfm3_vl", marks=[pytest.mark.slow, pytest.mark.family]),
]


@pytest.fixture(scope="module", params=FAMILIES)
def zooed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Zooed:
    vlm, examples = registry.make(request.param, tmp_path_factory.mktemp(request.param) / "model")
    return Zooed(vlm, split_model(vlm, examples), examples)


@pytest.fixture(scope="module", params=["gqa", "standard"])
def exported(zooed: Zooed, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    options = dataclasses.replace(FLOATS, attention=request.param)
    return export(zooed, options, tmp_path_factory.mktemp(request.param))


def prompts(zooed: Zooed, runner: Runner) -> list[DecoderInputs]:
    """What reaches the decoder for each example: prompts of different lengths."""
    return [merged_inputs(runner, [asked(example)])[0] for example in zooed.examples]


def asked(example: dict[str, torch.Tensor]) -> ModelInputs:
    pixels = {n: t.numpy() for n, t in example.items() if n not in _TEXT}
    return ModelInputs(example["input_ids"].numpy(), pixels)


def answers(runner: Runner, inputs: DecoderInputs, mask: np.ndarray, tokens: np.ndarray) -> list[np.ndarray]:
    """Logits of the last token of every row, and behind each of `tokens` ``[batch, steps]``."""
    logits, cache = inputs.prefill(runner, mask, 1)
    return [logits, *(runner.decode(runner.embed(column[:, None]), cache) for column in tokens.T)]


def test_onnx_is_as_exact_as_any_family(zooed: Zooed, exported: Artifact) -> None:
    assert zooed.split.replay_difference <= 1e-5
    assert image_effect(zooed.vlm, zooed.examples[-1]) > LIMIT
    assert largest(zooed, exported) <= LIMIT
    kv = KVGeometry.from_dict(exported.manifest.model["kv"])
    assert kv == zooed.split.kv
    assert kv.states
    decoder = exported.manifest.parts["decoder"]
    assert {state.past for state in kv.states} <= {spec.name for spec in decoder.inputs}
    assert {state.present for state in kv.states} <= {spec.name for spec in decoder.outputs}


@pytest.mark.slow
def test_a_batch_is_its_rows(zooed: Zooed, exported: Artifact) -> None:
    """Rows of different lengths: the padding of one is in none of its states, wherever the form takes padding."""
    runner = OnnxRunner(exported, threads=1, exact=True)
    rows = prompts(zooed, runner)
    tokens = np.random.default_rng(0).integers(10, 200, (len(rows), 6))
    single = [answers(runner, row, np.ones((1, row.length), np.int64), tokens[i : i + 1]) for i, row in enumerate(rows)]
    sides: Sequence[str] = ("right", "left") if exported.manifest.model["attention"] == "standard" else ("right",)
    for side in sides:
        batch = answers(runner, *stacked(rows, side), tokens)  # type: ignore[arg-type]
        for step, logits in enumerate(batch):
            for row, alone in enumerate(single):
                assert relative(logits[row : row + 1], alone[step]) <= 1e-5, (side, step, row)


@pytest.mark.slow
def test_the_reference_takes_batches_row_by_row(zooed: Zooed) -> None:
    runner = TorchRunner(zooed.vlm, zooed.split)
    rows = prompts(zooed, runner)
    tokens = np.random.default_rng(0).integers(10, 200, (len(rows), 3))
    inputs, mask = stacked(rows)
    batch = answers(runner, inputs, mask, tokens)
    for i, row in enumerate(rows):
        alone = answers(runner, row, np.ones((1, row.length), np.int64), tokens[i : i + 1])
        assert all(np.array_equal(logits[i : i + 1], one) for logits, one in zip(batch, alone, strict=True))
    whole, cache = inputs.prefill(runner, mask, 0)
    assert whole.shape[:2] == mask.shape
    assert not whole[mask == 0].any()
    assert cache.lengths.tolist() == [row.length for row in rows]


@pytest.mark.slow
def test_a_prompt_in_pieces_is_the_prompt(zooed: Zooed, exported: Artifact) -> None:
    """As a prompt graph computes it, and token by token."""
    runner = OnnxRunner(exported, threads=1, exact=True)
    prompt = prompts(zooed, runner)[-1]
    whole, _ = prompt.prefill(runner, None, 1)
    first, cache = prompt.tokens(0, 5).prefill(runner, None, 1)
    for start in range(5, prompt.length):
        first = prompt.tokens(start, start + 1).decode(runner, cache)
    assert relative(first, whole) <= 1e-5
    if exported.manifest.model["attention"] != "gqa":
        return
    session = ort.InferenceSession(exported.path / exported.manifest.parts["decoder"].file)
    chunked = DecoderSession(session, zooed.split.kv, "gqa", prompt=session, chunk=4)
    logits, _ = chunked.prefill(
        prompt.embeds, np.ones((1, prompt.length), np.int64), 1, reserve=4, extras=prompt.extras
    )
    assert relative(logits, whole) <= 1e-5


@pytest.mark.slow
def test_states_are_what_later_tokens_depend_on(zooed: Zooed, exported: Artifact) -> None:
    if exported.manifest.model["attention"] != "gqa":
        pytest.skip("the buffers are those of the gqa form")
    runner = OnnxRunner(exported, threads=1, exact=True)
    prompt = prompts(zooed, runner)[0]
    token = runner.embed(np.array([[42]]))
    _, cache = prompt.prefill(runner, None, 1)
    wanted = runner.decode(token, cache)
    for state in zooed.split.kv.states:
        _, cache = prompt.prefill(runner, None, 1)
        assert isinstance(cache, SharedCache)
        assert cache.states.held(state.past).any()
        cache.states._read[state.past].update_inplace(np.zeros_like(cache.states.held(state.past)))
        assert relative(runner.decode(token, cache), wanted) > LIMIT, state


@pytest.mark.slow
@pytest.mark.parametrize("zooed", ["lfm2_vl"], indirect=True)  # the others: test_support
def test_int4_products_are_those_of_the_dequantized_codes(zooed: Zooed, tmp_path: Path) -> None:
    codes, original = int4_difference(zooed, tmp_path)
    assert codes <= LIMIT < original


@pytest.mark.slow
def test_alike_layers_are_repeated(zooed: Zooed) -> None:
    part = zooed.split.parts[Role.DECODER].module
    assert isinstance(part, DecoderPart)
    kinds = proven_kinds(part.decoder, find_layers(part.decoder)[1])
    assert kinds == {"lfm2_vl": (0, 1, 0), "qwen3_5": (0, 0, 2, 0), "lfm3_vl": (0, 1, 0, 3)}[zooed.vlm.facts.model_type]


@pytest.mark.slow
def test_what_has_no_form_is_refused(zooed: Zooed) -> None:
    with pytest.raises(BadInputError, match=r"--kv-cache int8: the layers of .* keep different things"):
        options = dataclasses.replace(FLOATS, kv_cache="int8")
        plan_export(zooed.vlm, zooed.split, load_target(options.target), options)
    plain = dataclasses.replace(zooed.split, merge=dataclasses.replace(zooed.split.merge, extras=(), pictures=None))
    with pytest.raises(UnsupportedModelError, match="keep different things from token to token"):
        check_split(zooed.vlm, plain)


@pytest.mark.slow
def test_pictures_of_sizes_that_were_not_traced(zooed: Zooed, exported: Artifact) -> None:
    """Grids of patches that are larger and smaller than the table of positions, alone and together."""
    if zooed.vlm.facts.model_type != "lfm2_vl" or exported.manifest.model["attention"] != "gqa":
        pytest.skip("the grids are those of LFM2-VL, whose encoder is the same in both forms")
    vlm, runner = zooed.vlm, OnnxRunner(exported, threads=1)
    reference = TorchRunner(vlm, zooed.split)
    for grids in (((6, 10), (2, 2), (12, 4)), ((2, 30),)):
        pixels = torch.zeros(len(grids), 64, 192)
        mask = torch.zeros(len(grids), 64, dtype=torch.int64)
        for place, (rows, columns) in enumerate(grids):
            generator = torch.Generator().manual_seed(place)
            pixels[place, : rows * columns] = torch.randn(rows * columns, 192, generator=generator)
            mask[place, : rows * columns] = 1
        given = {"pixel_values": pixels, "spatial_shapes": torch.tensor(grids), "pixel_attention_mask": mask}
        arrays = {name: tensor.numpy() for name, tensor in given.items()}
        with torch.no_grad():
            own = torch.cat(list(vlm.model.get_image_features(**given).pooler_output)).numpy()
        assert relative(runner.image_features(arrays), own) <= LIMIT
        assert relative(reference.project(reference.vision(arrays)), own) <= 1e-5
    too_few = {**arrays, "spatial_shapes": np.array([[9, 9]])}
    with pytest.raises(BadInputError, match="a picture of 9 x 9 patches, pixel_values 64 of each"):
        runner.image_features(too_few)


def test_states_are_found_and_kept_in_the_manifest(tmp_path: Path) -> None:
    vlm, _ = registry.make("lfm2_vl", tmp_path)
    kv = find_cache(vlm)
    assert [kept is None for kept in kv.per_layer] == [True, False, True]
    assert kv.states == (State(0, "conv", (128, 3)), State(2, "conv", (128, 3)))
    typed = dataclasses.replace(kv, states=(*kv.states, State(2, "recurrent", (2, 4, 4), "float32")))
    assert KVGeometry.from_dict(typed.to_dict()) == typed
    assert typed.state_bytes(2) == 2 * 2 * 128 * 3 + 4 * 2 * 4 * 4


def test_states_of_another_form_are_refused() -> None:
    class Layer:
        conv_states = {0: torch.zeros(1, 4, 3), 1: torch.zeros(1, 4, 3)}  # noqa: RUF012

    with pytest.raises(UnsupportedModelError, match="layer 2 of the decoder keeps conv states of the shapes"):
        kept_states("layer 2", 2, Layer())


def test_a_decoder_without_any_keys_is_refused(tmp_path: Path) -> None:
    vlm, _ = registry.make("lfm2_vl", tmp_path)
    config: Any = vlm.model.config
    config.text_config.layer_types = ["conv", "conv", "conv"]
    with pytest.raises(UnsupportedModelError, match="no layer of the decoder keeps keys and values"):
        find_cache(vlm)
