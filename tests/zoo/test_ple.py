"""Decoders whose layers get inputs of their own for each token, and whose last layers read others' keys (Gemma 4)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from tests.zoo import ple
from tests.zoo.measure import largest
from tests.zoo.proof import FLOATS, Zooed, export, relative
from vlmexport.errors import BadInputError, NotPossibleHereError, UnsupportedModelError
from vlmexport.model.kv import LayerKV
from vlmexport.model.load import load_vlm
from vlmexport.model.per_token import PER_LAYER
from vlmexport.plan import plan_export
from vlmexport.runtime.decoder_inputs import DecoderInputs, merged_inputs, stacked, token_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.split.kinds import proven_kinds
from vlmexport.split.layers import find_layers
from vlmexport.split.parts import Role
from vlmexport.split.per_layer import TokenTables, token_tables
from vlmexport.split.sharing import SharedKeys, find_sources
from vlmexport.target import load_target
from vlmexport.trt_options import TrtOptions, trt_onnx_options
from vlmexport.trt_plan import plan_trt

LIMIT = 1e-4
STEPS = 8
FORMS = ("gqa", "standard")


@pytest.fixture(scope="module")
def zooed(tmp_path_factory: pytest.TempPathFactory) -> Zooed:
    return _taken(ple.gemma4(tmp_path_factory.mktemp("gemma4")))


def _taken(folder: Path) -> Zooed:
    vlm = load_vlm(str(folder))
    examples = ple.gemma4_examples(vlm.facts.image_token_id)
    return Zooed(vlm, split_model(vlm, examples), examples)


def _decoder(zooed: Zooed) -> Any:
    return zooed.split.parts[Role.DECODER].module.decoder


def _prompts(zooed: Zooed, runner: Any) -> list[DecoderInputs]:
    made = []
    for example in zooed.examples:
        pixels = {name: example[name].numpy() for name in ("pixel_values", "image_position_ids")}
        made.append(merged_inputs(runner, [ModelInputs(example["input_ids"].numpy(), pixels)])[0])
    return made


@pytest.mark.slow
def test_the_split_finds_what_layers_keep_read_and_get(zooed: Zooed) -> None:
    small, wide = LayerKV(2, 32), LayerKV(2, 64)
    assert zooed.split.kv.per_layer == (small, small, small, wide, None, None, None)
    assert find_sources(_decoder(zooed)) == {4: 2, 5: 2, 6: 3}
    assert proven_kinds(_decoder(zooed), find_layers(_decoder(zooed))[1]) == (0, 0, 2, 3, 4, 4, 6)
    assert zooed.split.merge.extras == (PER_LAYER,)
    assert zooed.split.replay_difference <= 1e-5
    plan = plan_export(zooed.vlm, zooed.split, load_target("cpu"), FLOATS)
    table = plan.weight("model.language_model.embed_tokens_per_layer.weight")
    assert (table.part, table.action, table.dtype) == ("embed_tokens", "keep", "float16")


@pytest.mark.slow
def test_rows_that_are_not_looked_up_are_refused(zooed: Zooed) -> None:
    from vlmexport.split.decoder import capture_decoder_call

    calls = [capture_decoder_call(zooed.vlm.model, example) for example in zooed.examples]
    tables = token_tables(zooed.vlm, _decoder(zooed), zooed.examples, calls)
    assert isinstance(tables, TokenTables)
    assert (tables.replaced, tables.stand_in) == ((zooed.vlm.facts.image_token_id,), 0)
    changed = calls[1].kwargs | {PER_LAYER: calls[1].kwargs[PER_LAYER] + 1}
    other = [calls[0], dataclasses.replace(calls[1], kwargs=changed), calls[2]]
    with pytest.raises(UnsupportedModelError, match="per_layer_inputs of example 1 are not rows of its table"):
        token_tables(zooed.vlm, _decoder(zooed), zooed.examples, other)
    with pytest.raises(UnsupportedModelError, match="of its image tokens are no row of its table"):
        token_tables(zooed.vlm, _decoder(zooed), zooed.examples[1:], other[1:])


def test_the_keys_of_one_layer_with_the_values_of_another_are_refused() -> None:
    watch, key, value = SharedKeys(), torch.zeros(1), torch.zeros(1)
    assert watch.source(0, key, value) is None
    assert watch.source(1, key, value) == 0
    with pytest.raises(
        UnsupportedModelError, match="layer 2 of the decoder reads the keys of layer 0 with other values"
    ):
        watch.source(2, key, torch.zeros(1))


@pytest.mark.slow
@pytest.mark.family
@pytest.mark.parametrize("form", FORMS)
def test_both_forms_are_exact_alone_and_in_padded_batches(zooed: Zooed, form: Any, tmp_path: Path) -> None:
    artifact = export(zooed, dataclasses.replace(FLOATS, attention=form), tmp_path)
    assert largest(zooed, artifact) <= LIMIT
    ours, theirs = OnnxRunner(artifact, threads=1, exact=True), TorchRunner(zooed.vlm, zooed.split)
    rows = _prompts(zooed, theirs)
    inputs, mask = stacked(rows)
    logits, cache = inputs.prefill(ours, mask, 1)
    alone = [row.prefill(theirs) for row in rows]
    worst = relative(logits, np.concatenate([first for first, _ in alone]))
    for step in range(STEPS):  # the cache of the batch grows past what was reserved for it
        ids = np.full((len(rows), 1), 20 + step)
        logits = token_inputs(theirs, ids).decode(ours, cache)
        wanted = [token_inputs(theirs, ids[:1]).decode(theirs, past) for _, past in alone]
        worst = max(worst, relative(logits, np.concatenate(wanted)))
    assert worst <= LIMIT
    _other_inputs_are_seen(ours, rows[0])
    _tables_are_the_models(zooed, ours, theirs)
    shared = [n for n in _nodes(artifact.part_path("decoder")) if n.op_type == _OPERATOR[form]]
    assert len(shared) == len(ple.LAYERS)
    assert {v.name for v in onnx.load(artifact.part_path("decoder"), load_external_data=False).graph.input} & {
        "past_key_values.4.key",
        "past_key_values.6.value",
    } == set()


_OPERATOR = {"gqa": "GroupQueryAttention", "standard": "Attention"}


def _nodes(path: Path) -> Any:
    return onnx.load(path, load_external_data=False).graph.node


def _other_inputs_are_seen(ours: OnnxRunner, prompt: DecoderInputs) -> None:
    """Other rows, and none, change the result or are refused: a difference of 0 means something."""
    logits, _ = prompt.prefill(ours)
    other = DecoderInputs(prompt.embeds, {PER_LAYER: np.zeros_like(prompt.extras[PER_LAYER])})
    assert relative(other.prefill(ours)[0], logits) > 1e-2
    with pytest.raises(BadInputError, match="needs the per_layer_inputs of every token"):
        ours.prefill(prompt.embeds, np.ones(prompt.embeds.shape[:2], np.int64))


def _tables_are_the_models(zooed: Zooed, ours: OnnxRunner, theirs: TorchRunner) -> None:
    ids = np.arange(ple.VOCAB)[None]
    wanted, found = theirs.per_layer(ids), ours.per_layer(ids)
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
    image = zooed.vlm.facts.image_token_id
    np.testing.assert_array_equal(found[:, image], found[:, 0])
    assert np.abs(found[:, image + 1] - found[:, 0]).max() > 0.1


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_gemma_3n_is_refused_without_timm(tmp_path: Path) -> None:
    """Its vision tower is timm's; nothing of it was proven."""
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotPossibleHereError, match="requires the timm library"):
        load_vlm(str(tmp_path))


@pytest.mark.slow
def test_tensorrt_is_refused_before_any_work(zooed: Zooed) -> None:
    options = TrtOptions(trt_onnx_options(None), "a100", max_seq=512)
    with pytest.raises(UnsupportedModelError, match=PER_LAYER):
        plan_trt(zooed.vlm, zooed.split, options, None)


@pytest.mark.slow
@pytest.mark.family
def test_large_models_have_image_blocks_within_windows_alone(tmp_path: Path) -> None:
    zooed = _taken(ple.gemma4_large(tmp_path / "model"))
    assert (zooed.split.merge.mask, zooed.split.merge.extras) == ("image_blocks", ("block_ids",))
    blocks = zooed.split.parts[Role.DECODER].module.blocks
    assert (blocks.whole, blocks.cut) == (False, True)
    assert zooed.split.kv.per_layer == (LayerKV(2, 32), LayerKV(2, 32), LayerKV(1, 64))
    artifact = export(zooed, FLOATS, tmp_path / "gqa")
    assert largest(zooed, artifact) <= LIMIT
    zooed.split.parts[Role.DECODER].module.blocks = dataclasses.replace(blocks, whole=True)
    assert largest(zooed, artifact) > LIMIT
