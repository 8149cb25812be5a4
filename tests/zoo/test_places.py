"""Families whose features are added, or that replace the embeddings of further tokens, from the split to ONNX Runtime.

`tests/zoo/test_proof.py` measures what all families have in common; here is what puts features in their places.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.zoo import registry
from tests.zoo.measure import _TEXT
from tests.zoo.places import IMAGE, MARKS, NO, YES
from tests.zoo.proof import FLOATS, Zooed, export, relative
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.manifest import open_artifact
from vlmexport.model.blocks import block_ids
from vlmexport.model.load import load_vlm
from vlmexport.model.merge import MergeSpec
from vlmexport.model.placing import joined_features, place_features
from vlmexport.model.wrapped import wrapping_class
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split import capture, places
from vlmexport.split.capture import split_model
from vlmexport.split.decoder import DecoderCall, DecoderPart, capture_decoder_call
from vlmexport.split.logits import HiddenTokens, find_hidden_tokens
from vlmexport.split.parts import Role
from vlmexport.verify.metrics import relative_error


def take_apart(family: str, folder: Path) -> Zooed:
    vlm, examples = registry.make(family, folder)
    return Zooed(vlm, split_model(vlm, examples), examples)


def inputs_of(example: dict[str, torch.Tensor]) -> ModelInputs:
    return ModelInputs(example["input_ids"].numpy(), {n: t.numpy() for n, t in example.items() if n not in _TEXT})


def test_features_are_added_to_the_embeddings_or_replace_them() -> None:
    embeds, ids = np.ones((1, 3, 2), np.float32), np.array([[5, 7, 5]])
    features = np.array([[2.0, 3.0]], np.float32)
    assert place_features(MergeSpec(7), embeds, ids, features)[0].tolist() == [[1, 1], [2, 3], [1, 1]]
    assert place_features(MergeSpec(7, place="add"), embeds, ids, features)[0].tolist() == [[1, 1], [3, 4], [1, 1]]


def test_fixed_rows_replace_their_tokens_where_there_are_images() -> None:
    spec = MergeSpec(7, fixed_tokens=(5, 9))
    embeds, ids = np.ones((2, 3, 1), np.float32), np.array([[5, 7, 9], [5, 5, 9]])
    features = np.array([[2.0], [3.0], [4.0]], np.float32)
    assert place_features(spec, embeds, ids, features)[:, :, 0].tolist() == [[3, 2, 4], [1, 1, 1]]
    joined = joined_features(spec, [features, np.array([[3.0], [3.0], [4.0]], np.float32)])
    assert joined is not None and joined[:, 0].tolist() == [2, 3, 3, 4]
    assert joined_features(spec, []) is None
    assert MergeSpec.from_dict(spec.to_dict()) == spec
    with pytest.raises(BadInputError, match=r"the prompt has 1 image tokens .id 7. but 2 feature rows"):
        place_features(spec, embeds[:1], ids[:1], np.ones((4, 1), np.float32))


@pytest.mark.slow
def test_marks_of_a_visual_vocabulary_get_its_rows(tmp_path: Path) -> None:
    zooed = take_apart("ovis2", tmp_path / "model")
    merge = zooed.split.merge
    assert (merge.place, merge.fixed_tokens) == ("scatter", MARKS[:5])
    assert zooed.split.replay_difference <= 1e-5
    _check_export(zooed, tmp_path / "onnx")


def _check_export(zooed: Zooed, folder: Path) -> None:
    """What the runner makes of each example is what reached the decoder, and its logits are the whole model's."""
    ours = OnnxRunner(export(zooed, FLOATS, folder), threads=1, exact=True)
    theirs = TorchRunner(zooed.vlm, zooed.split)
    for example in zooed.examples:
        item = inputs_of(example)
        (found, mask), (wanted, _) = (merged_inputs(runner, [item]) for runner in (ours, theirs))
        given = wanted.embeds != theirs.embed(item.input_ids)  # the table of text is stored in float16
        assert given.any()
        assert relative(found.embeds[given], wanted.embeds[given]) <= 1e-4
        with torch.no_grad():
            whole = zooed.vlm.model(**example).logits.numpy()
        assert relative(wanted.prefill(ours, mask, 0)[0], whole) <= 1e-4


@pytest.mark.slow
def test_rows_that_are_in_no_table_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, examples = registry.make("ovis2", tmp_path)
    monkeypatch.setattr(places, "_rows_of", lambda *_args: None)
    with pytest.raises(UnsupportedModelError, match=r"tokens \[3, 4, 5, 6, 7\] are replaced .* in no table"):
        split_model(vlm, examples)


@pytest.mark.slow
def test_a_place_that_is_not_the_models_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, examples = registry.make("ovis2", tmp_path)
    find = places.find_places

    def wrong(*args: Any) -> Any:
        merge, projector = find(*args)
        return dataclasses.replace(merge, fixed_tokens=merge.fixed_tokens[::-1]), projector

    monkeypatch.setattr("vlmexport.split.capture.find_places", wrong)
    with pytest.raises(UnsupportedModelError, match="ovis2: the replayed merged embeddings differ"):
        split_model(vlm, examples)


@pytest.mark.slow
@pytest.mark.family
def test_features_are_added_and_all_tokens_of_pictures_see_each_other(tmp_path: Path) -> None:
    zooed = take_apart("molmo2", tmp_path / "model")
    merge = zooed.split.merge
    assert (merge.place, merge.mask, merge.block_tokens) == ("add", "image_tokens", (IMAGE, *MARKS[:3]))
    assert MergeSpec.from_dict(merge.to_dict()) == merge
    _check_export(zooed, tmp_path / "onnx")


@pytest.mark.slow
def test_added_features_that_are_put_in_the_embeddings_place_are_refused(tmp_path: Path) -> None:
    zooed = take_apart("molmo2", tmp_path)
    example, wrong = zooed.examples[0], dataclasses.replace(zooed.split.merge, place="scatter")
    call = capture_decoder_call(zooed.vlm.model, example)
    features = torch.from_numpy(TorchRunner(zooed.vlm, zooed.split).image_features(inputs_of(example).pixel_inputs))
    with pytest.raises(UnsupportedModelError, match="molmo2: the replayed merged embeddings differ"):
        capture._merge_difference(zooed.vlm, wrong, example, call, features, None)


def test_tokens_of_one_block_are_found_by_their_ids() -> None:
    ids = np.array([[9, 7, 5, 9, 7]])
    assert block_ids("image_tokens", ids, 7, (5, 7)).tolist() == [[0, 1, 1, 0, 1]]
    assert block_ids("image_blocks", ids, 7, (5, 7)).tolist() == [[0, 1, 0, 0, 2]]


@pytest.mark.slow
@pytest.mark.family
def test_ids_of_pictures_are_rows_of_the_one_table(tmp_path: Path) -> None:
    """The encoder gives ids, the projector reads the embedding's data, and ids of pictures are never written."""
    zooed = take_apart("chameleon", tmp_path / "model")
    decoder = zooed.split.parts[Role.DECODER].module
    assert isinstance(decoder, DecoderPart)
    assert decoder.hidden_tokens is not None
    assert len(decoder.hidden_tokens.ids) == 24
    assert zooed.split.parts[Role.VISION_ENCODER].signature.outputs[0].dtype == "int32"
    _check_export(zooed, tmp_path / "onnx")
    assert not (tmp_path / "onnx/projector.onnx_data").exists()
    example = zooed.examples[0]
    item = inputs_of(example)
    ours = OnnxRunner(open_artifact(tmp_path / "onnx"), threads=1, exact=True)
    inputs, mask = merged_inputs(ours, [item])
    logits = inputs.prefill(ours, mask, 0)[0]
    with torch.no_grad():
        whole = zooed.vlm.model(**example).logits.numpy()
    lowest = np.finfo(np.float32).min
    np.testing.assert_array_equal(logits == lowest, whole == lowest)


@pytest.mark.slow
def test_logits_that_are_not_hidden_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm, examples = registry.make("chameleon", tmp_path)
    monkeypatch.setattr(places, "find_hidden_tokens", lambda _calls: None)
    with pytest.raises(UnsupportedModelError, match=r"chameleon: the replayed decoder and LM head, given embeddings"):
        split_model(vlm, examples)


def test_logits_of_tokens_that_are_never_written_are_a_constant() -> None:
    """Only tokens that are hidden at every position count; the rest is as the head gives it."""
    lowest = torch.finfo(torch.float32).min
    logits = torch.tensor([[[1.0, lowest, 3.0], [lowest, lowest, 2.0]]])
    hidden = find_hidden_tokens([DecoderCall({}, logits)])
    assert hidden == HiddenTokens((1,), lowest)
    assert hidden.hide(torch.ones(1, 3)).tolist() == [[1.0, lowest, 1.0]]
    assert find_hidden_tokens([DecoderCall({}, torch.ones(1, 2, 3))]) is None
    out = np.array([[1.0, np.float32(lowest), 3.0]], np.float32)
    assert relative_error(out, np.array([[1.0, np.float32(lowest), 3.3]], np.float32)) == pytest.approx(0.1, rel=1e-4)
    assert relative_error(out, np.array([[1.0, 2.0, 3.0]], np.float32)) > 1e30


@pytest.mark.slow
@pytest.mark.family
def test_a_classifier_by_two_tokens_is_the_model_inside_it(tmp_path: Path) -> None:
    """ShieldGemma2 is loaded as its own class, and exported as the model inside; the classes are two of its logits."""
    zooed = take_apart("shieldgemma2", tmp_path / "model")
    assert zooed.vlm.facts.architecture == "Gemma3ForConditionalGeneration"
    ours = OnnxRunner(export(zooed, FLOATS, tmp_path / "onnx"), threads=1, exact=True)
    theirs = TorchRunner(zooed.vlm, zooed.split)
    classifier = transformers.ShieldGemma2ForImageClassification.from_pretrained(tmp_path / "model").eval()
    example = zooed.examples[-1]
    inputs, mask = merged_inputs(theirs, [inputs_of(example)])
    logits = inputs.prefill(ours, mask)[0][0, -1, [YES, NO]]
    with torch.no_grad():
        wanted = classifier(**example).probabilities[0].numpy()
    np.testing.assert_allclose(np.exp(logits) / np.exp(logits).sum(), wanted, atol=1e-5)


@pytest.mark.slow
def test_weights_of_a_wrapped_model_that_are_missing_are_refused(tmp_path: Path) -> None:
    folder = registry.entries()["shieldgemma2"].make(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_file({n: t for n, t in tensors.items() if n != lost}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInputError, match="weights missing from the files"):
        load_vlm(str(folder))


def test_a_class_that_is_no_wrapper_is_left_to_transformers(tmp_path: Path) -> None:
    for name in ("Gemma3ForConditionalGeneration", "Gemma3Model", "NoSuchClass", "PaliGemmaModel"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "architectures": [name]}))
        assert wrapping_class(tmp_path) is None


def test_features_at_a_mask_of_the_processor_are_refused(tmp_path: Path) -> None:
    """Kosmos-2 puts features where a mask says, over tokens of any id; there is no form for that yet."""
    text = {"vocab_size": 320, "embed_dim": 64, "layers": 1, "ffn_dim": 64, "attention_heads": 2}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = transformers.Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=4)
    transformers.Kosmos2ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="kosmos-2: the config has no image token id"):
        load_vlm(str(tmp_path))
