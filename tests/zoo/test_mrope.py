"""Families with three positions for each token, from the split to ONNX Runtime: Qwen-VL 2, 2.5 and 3, GLM-4V."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.zoo.proof import FLOATS, STEPS, Zooed, export, relative
from tests.zoo.qwen import FAMILIES, SIZES, load_qwen, prompt, prompts
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.lower.onnx.decoder import lower_decoder
from vlmexport.model.load import VLM
from vlmexport.model.merge import MergeSpec
from vlmexport.model.positions import prompt_positions
from vlmexport.plan import ExportPlan
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.runtime.decoder_inputs import DecoderInputs, merged_inputs, stacked
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import Array, ModelInputs, Runner
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split import capture, packed
from vlmexport.split.capture import split_decoder, split_model
from vlmexport.split.decoder import capture_decoder_call
from vlmexport.split.features import feature_rows, find_feature_call
from vlmexport.target import load_target

PIXELS = ("pixel_values", "image_grid_thw")


# One with all that the others have, and more, is in `make test`.
_ALL = [
    family if family == "qwen3_vl" else pytest.param(family, marks=[pytest.mark.slow, pytest.mark.family])
    for family in FAMILIES
]


@pytest.fixture(scope="module", params=_ALL)
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_qwen(request.param, tmp_path_factory.mktemp(request.param))


def inputs_of(example: dict[str, torch.Tensor]) -> ModelInputs:
    return ModelInputs(example["input_ids"].numpy(), {n: example[n].numpy() for n in PIXELS if n in example})


def test_positions_and_additions_are_the_models(vlm: VLM) -> None:
    examples = prompts(vlm)
    calls = [capture_decoder_call(vlm.model, example) for example in examples]
    part, merge, difference = split_decoder(vlm, examples, calls)
    deep = vlm.facts.model_type == "qwen3_vl"
    assert (merge.position, merge.spatial_merge_size, merge.deepstack_layers) == ("mrope", 2, 2 if deep else 0)
    assert merge.extras == (("position_ids", "deepstack_embeds") if deep else ("position_ids",))
    assert difference <= 1e-5
    assert MergeSpec.from_dict(merge.to_dict()) == merge
    assert [spec.name for spec in part.signature.inputs][2:] == list(merge.extras)
    for sizes in (*SIZES, ((6, 6), (4, 4), (16, 2))):
        given = prompt(vlm, sizes)
        wanted = capture_decoder_call(vlm.model, given).kwargs["position_ids"].numpy()
        np.testing.assert_array_equal(
            prompt_positions(merge, given["input_ids"].numpy(), inputs_of(given).pixel_inputs), wanted
        )


def test_text_alone_counts_up_on_every_axis() -> None:
    spec = MergeSpec(7, position="mrope", spatial_merge_size=2)
    np.testing.assert_array_equal(prompt_positions(spec, np.array([[1, 2, 3]]), {}), np.tile(np.arange(3), (3, 1, 1)))


def test_an_image_takes_the_positions_of_its_longer_side() -> None:
    spec = MergeSpec(7, position="mrope", spatial_merge_size=2)
    ids = np.array([[1, 7, 7, 7, 2]])
    found = prompt_positions(spec, ids, {"image_grid_thw": np.array([[1, 2, 6]])})
    assert found[:, 0].tolist() == [[0, 1, 1, 1, 4], [0, 1, 1, 1, 4], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([1, 7, 7, 2], [[1, 2, 6]], "image 1 has 1 x 1 x 3 tokens by image_grid_thw, the prompt 2 in a row"),
        ([1, 7, 2, 7], [[1, 2, 2]], "more runs of image tokens than image_grid_thw has images"),
        ([1, 7, 2], [[1, 2, 2], [1, 2, 2]], "image_grid_thw has 2 images, the prompt 1 runs"),
    ],
)
def test_grids_that_do_not_fit_the_prompt_are_refused(ids: list[int], grids: list[list[int]], message: str) -> None:
    spec = MergeSpec(7, position="mrope", spatial_merge_size=2)
    with pytest.raises(BadInputError, match=message):
        prompt_positions(spec, np.array([ids]), {"image_grid_thw": np.array(grids)})


def test_positions_that_are_counted_otherwise_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load_qwen("qwen2_vl", tmp_path)
    examples = prompts(vlm)
    calls = [capture_decoder_call(vlm.model, example) for example in examples]
    calls[1].kwargs["position_ids"] = calls[1].kwargs["position_ids"] + 1
    with pytest.raises(UnsupportedModelError, match=r"qwen2_vl: its positions .* of example 1 are not those of image"):
        capture.split_decoder(vlm, examples, calls)


def test_packed_patches_give_the_models_own_features(vlm: VLM) -> None:
    """Loops over the grid are replaced by tensors, in eager mode and in a trace alike."""
    deep = 2 if vlm.facts.model_type == "qwen3_vl" else 0
    for sizes in (*SIZES, ((34, 22), (10, 44), (6, 6))):
        given = {name: prompt(vlm, sizes)[name] for name in PIXELS}
        ask = find_feature_call(vlm.model, vlm.facts.image_token_id, given)
        with torch.no_grad():
            wanted = feature_rows(vlm.model.get_image_features(**given), deep)
            found = feature_rows(ask(given), deep)
        assert relative(found.numpy(), wanted.numpy()) < 1e-5


def test_the_tensorrt_layout_refuses_such_decoders(tmp_path: Path) -> None:
    vlm = load_qwen("qwen3_vl", tmp_path)
    examples = prompts(vlm)
    part, _, _ = split_decoder(vlm, examples, [capture_decoder_call(vlm.model, example) for example in examples])
    options = dataclasses.replace(FLOATS, target="tensorrt", attention="static", cache_length=64)
    plan = ExportPlan("tiny", options, "fp32", "fp16", ())
    weights = DecoderWeights({})
    with pytest.raises(UnsupportedModelError, match="qwen3_vl: its decoder takes positions on 3 axes and"):
        lower_decoder(vlm, part, plan, load_target("tensorrt"), weights)


def test_an_encoder_that_needs_the_lengths_of_pictures_is_refused() -> None:
    lengths = packed.Segments(packed._Packed(), torch.zeros(4, dtype=torch.int64))
    assert (lengths[1:] - lengths[:-1]).tolist() == [0]
    for use in (lambda: lengths.max(), lambda: lengths.cumsum(0)):
        with pytest.raises(UnsupportedModelError, match=r"lengths of its pictures .* else than attention"):
            use()


def test_rows_of_a_batch_keep_their_positions(tmp_path: Path) -> None:
    vlm = load_qwen("qwen3_vl", tmp_path)
    examples = prompts(vlm)
    calls = [capture_decoder_call(vlm.model, example) for example in examples]
    runner = TorchRunner(vlm)
    runner.merge_spec = split_decoder(vlm, examples, calls)[1]
    batch = [inputs_of(example) for example in (*examples, prompt(vlm, ()))]
    together, mask = merged_inputs(runner, batch)
    alone, again = stacked([merged_inputs(runner, [item])[0] for item in batch])
    np.testing.assert_array_equal(mask, again)
    logits = [inputs.prefill(runner, mask)[0] for inputs in (together, alone)]
    np.testing.assert_allclose(*logits, atol=1e-4)
    for row, call in enumerate(calls):
        np.testing.assert_allclose(logits[0][row, -1], call.logits[0, -1].numpy(), atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A family's export and what to compare it with."""

    zooed: Zooed
    ours: OnnxRunner
    theirs: TorchRunner


@pytest.fixture(scope="module")
def exported(vlm: VLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    examples = prompts(vlm)
    zooed = Zooed(vlm, split_model(vlm, examples), examples)
    artifact = export(zooed, FLOATS, tmp_path_factory.mktemp("export"))
    yield Exported(zooed, OnnxRunner(artifact, threads=1, exact=True), TorchRunner(vlm, zooed.split))


def steps(runner: Runner, embed: Callable[[Array], Array], given: DecoderInputs, tokens: list[int]) -> Array:
    """Logits of the prompt, then of each of `tokens` (greedy ones where there are none yet)."""
    logits, cache = given.prefill(runner, keep=0, reserve=4)
    rows = [logits]
    for step in range(STEPS):
        if step == len(tokens):
            tokens.append(int(rows[-1][0, -1].argmax()))
        rows.append(runner.decode(embed(np.array([[tokens[step]]])), cache))
    return np.concatenate(rows, axis=1)


@pytest.mark.slow
def test_the_export_is_pytorch(exported: Exported) -> None:
    """Pixels to features, a prompt and 16 steps behind it; only one of the examples was traced."""
    vlm = exported.zooed.vlm
    for sizes in (*SIZES, ((34, 22), (10, 44), (6, 6)), ()):
        item = inputs_of(prompt(vlm, sizes))
        found, wanted = (merged_inputs(runner, [item])[0] for runner in (exported.ours, exported.theirs))
        images = item.input_ids == vlm.facts.image_token_id
        if sizes:  # the table of embeddings is stored in float16, whatever the decoder's type
            assert relative(found.embeds[images], wanted.embeds[images]) < 1e-4
        for name, array in wanted.extras.items():
            assert np.abs(found.extras[name] - array).max() <= 1e-4 * max(1.0, float(np.abs(array).max()))
        tokens: list[int] = []
        embed = exported.theirs.embed
        right = steps(exported.theirs, embed, wanted, tokens)
        assert relative(steps(exported.ours, embed, wanted, tokens), right) < 1e-4
        with torch.no_grad():
            whole = vlm.model(**prompt(vlm, sizes)).logits.numpy()
        assert relative(right[:, : whole.shape[1]], whole) < 1e-5


@pytest.mark.slow
def test_the_steps_are_the_whole_models(exported: Exported) -> None:
    """What is generated over the cache continues at the largest position of the prompt, as transformers does it."""
    vlm = exported.zooed.vlm
    example = prompt(vlm, SIZES[1])
    given = merged_inputs(exported.theirs, [inputs_of(example)])[0]
    tokens: list[int] = []
    logits = steps(exported.ours, exported.theirs.embed, given, tokens)
    ids = torch.cat([example["input_ids"], torch.tensor([tokens])], dim=1)
    kinds = torch.nn.functional.pad(example["mm_token_type_ids"], (0, len(tokens)))
    longer = {**example, "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    with torch.no_grad():
        whole = vlm.model(**longer).logits.numpy()
    assert relative(logits, whole) < 1e-4


@pytest.mark.slow
def test_what_is_left_out_is_seen(exported: Exported) -> None:
    example = prompt(exported.zooed.vlm, SIZES[1])
    given = merged_inputs(exported.ours, [inputs_of(example)])[0]
    wanted = given.prefill(exported.theirs, keep=0)[0]
    for name in given.extras:
        less = DecoderInputs(given.embeds, {n: a for n, a in given.extras.items() if n != name})
        assert relative(less.prefill(exported.ours, keep=0)[0], wanted) > 1e-2
    with pytest.raises(BadInputError, match="the decoder graph takes no block_ids"):
        DecoderInputs(given.embeds, {"block_ids": np.zeros(given.embeds.shape[:2], np.int64)}).prefill(exported.ours)


@pytest.mark.slow
def test_a_padded_batch_has_the_rows_of_single_prompts(exported: Exported) -> None:
    vlm = exported.zooed.vlm
    items = [inputs_of(prompt(vlm, sizes)) for sizes in (*SIZES, ())]
    rows = [merged_inputs(exported.ours, [item])[0] for item in items]
    inputs, mask = stacked(rows)
    logits, cache = inputs.prefill(exported.ours, mask)
    later = exported.ours.decode(exported.ours.embed(np.full((4, 1), 50)), cache)
    for row, single in enumerate(rows):
        alone, own = single.prefill(exported.ours)
        step = exported.ours.decode(exported.ours.embed(np.full((1, 1), 50)), own)
        assert relative(logits[row], alone[0]) < 1e-4
        assert relative(later[row], step[0]) < 1e-4
