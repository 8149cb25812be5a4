"""Loading accounts for every tensor; each bad folder gets its own sentence (the CLI tests check the exit codes)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import load_vlm
from vlmexport.model.wrapped import wrapping_class

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def copy(tiny_idefics3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_idefics3, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def first(tensors: Tensors, part: str) -> str:
    return next(name for name in tensors if part in name)


def test_facts_of_a_tiny_model(tiny_idefics3: Path) -> None:
    vlm = load_vlm(str(tiny_idefics3))
    assert vlm.facts.architecture == "Idefics3ForConditionalGeneration"
    assert (vlm.facts.kv.layers, vlm.facts.kv.heads, vlm.facts.kv.head_dim) == (2, 2, 32)
    assert vlm.facts.dtype == "float32"
    assert vlm.facts.eos_token_ids
    assert not vlm.model.training
    assert not any(p.requires_grad for p in vlm.model.parameters())


def test_weights_are_the_files_own(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    stored = load_file(tiny_llava / "model.safetensors")
    assert len(stored) == len(list(vlm.model.parameters()))
    loaded = vlm.parameters_by_name()["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert any(t.shape == loaded.shape and torch.equal(t, loaded) for t in stored.values())


def test_eos_falls_back_to_the_text_config(copy: Path) -> None:
    (copy / "generation_config.json").write_text("{}")
    assert load_vlm(str(copy)).facts.eos_token_ids


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BadInputError, match=name):
        load_vlm(str(copy))


def test_pickle_weights_are_never_read(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    with pytest.raises(BadInputError, match=r"pickle weights only \(pytorch_model.bin\).*safe_serialization"):
        load_vlm(str(copy))


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(copy: Path, keep: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BadInputError, match=r"model\.safetensors is damaged or cut off"):
        load_vlm(str(copy))


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadInputError, match=r"model-00001-of-00002\.safetensors is missing"):
        load_vlm(str(copy))


def test_a_missing_tensor_is_never_made_up(copy: Path) -> None:
    edit_weights(copy, lambda t: t.__delitem__(first(t, "q_proj.weight")))
    with pytest.raises(BadInputError, match=r"weights missing from the files: .*q_proj\.weight"):
        load_vlm(str(copy))


def test_a_left_over_tensor_is_never_dropped(copy: Path) -> None:
    edit_weights(copy, lambda t: t.update({"stray.weight": torch.ones(2, 2)}))
    with pytest.raises(BadInputError, match=r"no place in the model: stray\.weight"):
        load_vlm(str(copy))


def test_a_misshapen_tensor_is_named_with_both_shapes(copy: Path) -> None:
    def cut(tensors: Tensors) -> None:
        name = first(tensors, "text_model.layers.0.mlp.down_proj")
        tensors[name] = tensors[name][:, :-1].contiguous()

    edit_weights(copy, cut)
    with pytest.raises(BadInputError, match=r"down_proj\.weight is 128x255 in the file, 128x256 in the model"):
        load_vlm(str(copy))


def test_a_text_model_is_told_apart(copy: Path) -> None:
    edit_config(copy, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"no vision-language model.*'llama'"):
        load_vlm(str(copy))


def test_an_unknown_architecture_is_named(copy: Path) -> None:
    edit_config(copy, model_type="frobnicator")
    with pytest.raises(UnsupportedModelError, match="'frobnicator' is unknown to transformers"):
        load_vlm(str(copy))


def test_remote_code_needs_the_flag(copy: Path) -> None:
    edit_config(copy, model_type="own", auto_map={"AutoModelForImageTextToText": "modeling.Own"})
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load_vlm(str(copy))


@pytest.mark.parametrize("place", ["quantization_config", "text_config"])
def test_an_unknown_quantization_is_refused_with_the_known_ones(copy: Path, place: str) -> None:
    quantization = {"quant_method": "aqlm", "bits": 2}
    text = json.loads((copy / "config.json").read_text())["text_config"]
    inside = quantization if place == "quantization_config" else {**text, "quantization_config": quantization}
    edit_config(copy, **{place: inside})
    known = "awq, bitsandbytes, compressed-tensors, gptq"
    with pytest.raises(UnsupportedModelError, match=rf"already quantized .method aqlm.*{known} checkpoints"):
        load_vlm(str(copy))


def test_a_quantization_that_is_no_object_is_refused(copy: Path) -> None:
    edit_config(copy, quantization_config="gptq")
    with pytest.raises(UnsupportedModelError, match=r"already quantized .method unknown"):
        load_vlm(str(copy))


def test_a_lora_adapter_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInputError, match="LoRA adapter"):
        load_vlm(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"x": 1}', "\x00"])
def test_a_broken_config_is_refused(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    with pytest.raises(BadInputError, match=r"config\.json"):
        load_vlm(str(copy))


def test_a_config_with_a_wrong_value_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["hidden_size"] = "many"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match="idefics3"):
        load_vlm(str(copy))


def test_a_class_that_transformers_lacks_wraps_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "auto_map": {}}')
    assert wrapping_class(tmp_path) is None


def test_an_unknown_class_without_a_model_type_is_one_clear_line(copy: Path) -> None:
    edit_config(copy, model_type=None, architectures=["NoSuchModel"], auto_map={"AutoModel": "modeling.NoSuchModel"})
    for trust in (False, True):
        with pytest.raises((BadInputError, UnsupportedModelError)) as caught:
            load_vlm(str(copy), trust_remote_code=trust)
        assert "None" not in str(caught.value) and "\n" not in str(caught.value)
