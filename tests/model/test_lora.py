"""A merged adapter computes what the unmerged one does, and whatever is wrong with an adapter is said in one line.

The arithmetic was also compared with PEFT 0.21.2 itself, once: the merged model against PEFT's unmerged forward pass on
22 adapters of all the kinds below, in float32 (largest difference of logits 4e-5 of 5).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- the usual name

from tests.model.adapters import PREFIX, pair, pairs_of, write_adapter
from tests.model.importers.encoders import make_gptq
from tests.tiny import make_tiny
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import VLM, load_vlm
from vlmexport.model.lora import merge_adapter
from vlmexport.model.lora_files import read_adapter
from vlmexport.model.lora_names import ParameterNames
from vlmexport.package import source_facts
from vlmexport.plan_file import model_fingerprint
from vlmexport.split.examples import draw_picture, example_inputs, load_processor
from vlmexport.verify.reference import changed_source_files, original_source

Tensors = dict[str, torch.Tensor]
Hook = Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]
TEXT, VISION = "model.text_model.layers.0", "model.vision_model.encoder.layers.0"
TOWER = "model.vision_tower.encoder"  # LLaVA's
TABLE, PATCHES = "model.text_model.embed_tokens", "model.vision_model.embeddings.patch_embedding"


@pytest.fixture
def vlm(tiny_idefics3: Path) -> VLM:
    return load_vlm(str(tiny_idefics3))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("idefics3", tmp_path_factory.mktemp("tied") / "model", tied=True)


def parameter(vlm: VLM, name: str) -> torch.Tensor:
    return vlm.model.get_parameter(name).detach().clone()


def logits(vlm: VLM) -> torch.Tensor:
    inputs = example_inputs(vlm, load_processor(vlm), [draw_picture(32, 32, 1)], "What is red?")
    with torch.inference_mode():
        found: torch.Tensor = vlm.model(**inputs).logits
    return found


@contextmanager
def unmerged(model: Any, hooks: dict[str, Hook]) -> Iterator[None]:
    """Within the block, modules compute what PEFT's layers compute: their own output, changed by a hook."""
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    yield
    for handle in handles:
        handle.remove()


def linear_hook(tensors: Tensors, module: str, scaling: float) -> Hook:
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    return lambda _, inputs, output: output + scaling * F.linear(F.linear(inputs[0], a), b)


def check_same(vlm: VLM, adapter: Path, hooks: dict[str, Hook]) -> None:
    before = logits(vlm)
    with unmerged(vlm.model, hooks):
        wanted = logits(vlm)
    merged = logits(load_vlm(vlm.source, lora=str(adapter)))
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-4)
    assert (merged - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("config", "scalings"),
    [
        ({}, {}),
        ({"use_rslora": True}, {"": 4.0}),
        ({"alpha_pattern": {"q_proj": 1, "layers.0.mlp.fc1": 12}}, {"q_proj": 0.25, "fc1": 3.0}),
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_linear_layers_of_both_sides(vlm: VLM, tmp_path: Path, config: Any, scalings: dict[str, float]) -> None:
    ends = [
        f"{TEXT}.self_attn.q_proj",
        f"{TEXT}.mlp.down_proj",
        "layers.0.mlp.fc1",
        "modality_projection.proj",
        "lm_head",
    ]
    tensors = pairs_of(vlm, ends, size=0.3)
    adapter = write_adapter(tmp_path, tensors, **config)
    modules = {name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}
    assert len(modules) == len(ends)
    factor = {m: next((s for end, s in scalings.items() if m.endswith(end)), 2.0) for m in modules}
    check_same(vlm, adapter, {m: linear_hook(tensors, m, factor[m]) for m in modules})


def test_a_module_may_have_a_rank_of_its_own(vlm: VLM, tmp_path: Path) -> None:
    tensors = pairs_of(vlm, [f"{TEXT}.self_attn.q_proj"], rank=2) | pairs_of(vlm, [f"{TEXT}.mlp.up_proj"], rank=8)
    write_adapter(tmp_path, tensors, rank_pattern={"layers.0.self_attn.q_proj": 2}, r=8)
    hooks = {f"{TEXT}.self_attn.q_proj": 4.0, f"{TEXT}.mlp.up_proj": 1.0}
    before = parameter(vlm, f"{TEXT}.mlp.up_proj.weight")
    merged = load_vlm(vlm.source, lora=str(tmp_path))
    for module, scaling in hooks.items():
        delta = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        wanted = parameter(vlm, f"{module}.weight") + scaling * delta
        torch.testing.assert_close(parameter(merged, f"{module}.weight"), wanted)
    assert torch.equal(parameter(vlm, f"{TEXT}.mlp.up_proj.weight"), before)


def test_embeddings(vlm: VLM, tmp_path: Path) -> None:
    rows, columns = vlm.model.get_input_embeddings().weight.shape
    a, b = torch.randn(4, rows), torch.randn(columns, 4)
    tensors = {f"{TABLE}.lora_embedding_A": a, f"{TABLE}.lora_embedding_B": b}
    tensors[f"{TABLE}.base_layer.weight"] = parameter(vlm, f"{TABLE}.weight")  # PEFT writes it beside
    adapter = write_adapter(tmp_path, tensors)
    check_same(vlm, adapter, {TABLE: lambda _, inputs, output: output + 2 * F.embedding(inputs[0], a.T) @ b.T})


def test_the_patch_convolution(vlm: VLM, tmp_path: Path) -> None:
    shape = parameter(vlm, f"{PATCHES}.weight").shape
    a, b = 0.1 * torch.randn(4, *shape[1:]), torch.randn(shape[0], 4, 1, 1)
    adapter = write_adapter(tmp_path, {f"{PATCHES}.lora_A.weight": a, f"{PATCHES}.lora_B.weight": b})
    hook: Hook = lambda layer, x, y: y + 2 * F.conv2d(F.conv2d(x[0], a, stride=layer.stride), b)  # noqa: E731
    check_same(vlm, adapter, {PATCHES: hook})


def test_dora_scales_rows_to_their_magnitudes(vlm: VLM, tmp_path: Path) -> None:
    module = f"{TEXT}.self_attn.q_proj"
    tensors = pairs_of(vlm, [module])
    plain = load_vlm(vlm.source, lora=str(write_adapter(tmp_path / "plain", tensors)))
    magnitudes = 1 + torch.rand(len(parameter(vlm, f"{module}.weight")))
    adapter = write_adapter(
        tmp_path / "dora", {**tensors, f"{module}.lora_magnitude_vector": magnitudes}, use_dora=True
    )
    found = parameter(load_vlm(vlm.source, lora=str(adapter)), f"{module}.weight")
    torch.testing.assert_close(found.norm(dim=1), magnitudes)
    torch.testing.assert_close(F.normalize(found), F.normalize(parameter(plain, f"{module}.weight")))


def test_dora_of_an_embedding_scales_columns(vlm: VLM, tmp_path: Path) -> None:
    rows, columns = vlm.model.get_input_embeddings().weight.shape
    magnitudes = 1 + torch.rand(columns)
    tensors = {
        f"{TABLE}.lora_embedding_A": torch.randn(4, rows),
        f"{TABLE}.lora_embedding_B": torch.randn(columns, 4),
        f"{TABLE}.lora_magnitude_vector": magnitudes,
    }
    merged = load_vlm(vlm.source, lora=str(write_adapter(tmp_path, tensors, use_dora=True)))
    torch.testing.assert_close(parameter(merged, f"{TABLE}.weight").norm(dim=0), magnitudes)


def test_biases_and_whole_modules(vlm: VLM, tmp_path: Path) -> None:
    fc1 = f"{VISION}.mlp.fc1"
    bias, head, norm = (
        torch.randn(len(parameter(vlm, f"{fc1}.bias"))),
        parameter(vlm, "lm_head.weight"),
        f"{VISION}.layer_norm1.bias",
    )
    tensors = {
        **pairs_of(vlm, [fc1]),
        f"{fc1}.lora_B.bias": bias,
        norm: parameter(vlm, norm) + 1,
        f"{VISION}.self_attn.q_proj.base_layer.bias": parameter(vlm, f"{VISION}.self_attn.q_proj.bias") * 3,
        "lm_head.modules_to_save.weight": head * 2,
    }
    merged = load_vlm(vlm.source, lora=str(write_adapter(tmp_path, tensors, bias="all", lora_bias=True)))
    torch.testing.assert_close(parameter(merged, f"{fc1}.bias"), parameter(vlm, f"{fc1}.bias") + 2 * bias)
    torch.testing.assert_close(parameter(merged, norm), tensors[norm])
    q_bias = f"{VISION}.self_attn.q_proj.bias"
    torch.testing.assert_close(parameter(merged, q_bias), 3 * parameter(vlm, q_bias))
    torch.testing.assert_close(parameter(merged, "lm_head.weight"), head * 2)
    assert merged.lora is not None
    assert merged.lora.changed == tuple(sorted([f"{fc1}.bias", f"{fc1}.weight", norm, q_bias, "lm_head.weight"]))


@pytest.mark.parametrize("indices", [[3, 7], {"embed_tokens": [3, 7]}])
def test_single_tokens(vlm: VLM, tmp_path: Path, indices: Any) -> None:
    rows = torch.randn(2, vlm.facts.hidden_size)
    tensors = {f"{TABLE}.token_adapter.trainable_tokens_delta": rows}
    merged = load_vlm(vlm.source, lora=str(write_adapter(tmp_path, tensors, trainable_token_indices=indices)))
    wanted = parameter(vlm, f"{TABLE}.weight")
    wanted[[3, 7]] = rows
    torch.testing.assert_close(parameter(merged, f"{TABLE}.weight"), wanted)


def test_the_merge_rounds_once_to_the_checkpoint_s_dtype(tmp_path: Path) -> None:
    base = load_vlm(str(make_tiny("idefics3", tmp_path / "half", dtype="bfloat16")))
    module = f"{TEXT}.mlp.up_proj"
    tensors = pairs_of(base, [module])
    merged = load_vlm(base.source, lora=str(write_adapter(tmp_path / "adapter", tensors)))
    a, b = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
    wanted = (parameter(base, f"{module}.weight").float() + 2 * (b @ a)).bfloat16()
    assert torch.equal(parameter(merged, f"{module}.weight"), wanted)
    assert merged.facts == base.facts


def test_other_weights_stay_as_they_were_loaded(vlm: VLM, tmp_path: Path) -> None:
    before = dict(vlm.model.named_parameters())
    merged = merge_adapter(vlm.model, read_adapter(str(write_adapter(tmp_path, pairs_of(vlm, ["lm_head"])))))
    after = dict(vlm.model.named_parameters())
    assert merged.changed == ("lm_head.weight",)
    assert [name for name in before if before[name] is not after[name]] == ["lm_head.weight"]


# What a checkpoint ties, and what an adapter makes of it.


def test_an_adapter_of_one_of_two_tied_weights_unties_them(tied: Path, tmp_path: Path) -> None:
    base = load_vlm(str(tied))
    assert base.facts.tied_embeddings
    tensors = pair("lm_head", *parameter(base, "lm_head.weight").shape, size=0.3)
    adapter = write_adapter(tmp_path, tensors)
    check_same(base, adapter, {"lm_head": linear_hook(tensors, "lm_head", 2.0)})
    merged = load_vlm(str(tied), lora=str(adapter))
    assert merged.lora is not None
    assert merged.lora.untied
    assert not merged.facts.tied_embeddings
    assert not merged.config.get_text_config().tie_word_embeddings
    torch.testing.assert_close(parameter(merged, f"{TABLE}.weight"), parameter(base, f"{TABLE}.weight"))


def test_two_equal_changes_and_single_tokens_keep_weights_tied(tied: Path, tmp_path: Path) -> None:
    base = load_vlm(str(tied))
    table = parameter(base, f"{TABLE}.weight") * 2
    both = write_adapter(tmp_path / "both", {f"{TABLE}.weight": table, "lm_head.weight": table})
    rows = {f"{TABLE}.token_adapter.trainable_tokens_delta": torch.randn(1, base.facts.hidden_size)}
    tokens = write_adapter(tmp_path / "tokens", rows, trainable_token_indices=[5])
    for adapter in (both, tokens):
        merged = load_vlm(str(tied), lora=str(adapter))
        assert merged.facts.tied_embeddings
        assert merged.lora is not None
        assert merged.lora.changed == ("lm_head.weight", f"{TABLE}.weight")
        assert not merged.lora.untied


# Names from other versions.


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("model.language_model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("language_model.model.layers.1.mlp.up_proj.weight", "model.language_model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.self_attn.q_proj.weight", "model.language_model.layers.1.self_attn.q_proj.weight"),
        ("model.text_model.layers.0.self_attn.v_proj.weight", "model.language_model.layers.0.self_attn.v_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", f"{TOWER}.layers.0.mlp.fc1.weight"),
        ("model.vision_tower.vision_tower.encoder.layers.1.mlp.fc2.bias", f"{TOWER}.layers.1.mlp.fc2.bias"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    ],
)  # fmt: skip
def test_names_of_other_versions(tiny_llava: Path, name: str, found: str) -> None:
    assert ParameterNames(load_vlm(str(tiny_llava)).model).find(name) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("encoder.blocks.0.attn.q_proj.weight", "is not in Llava"),
        ("backbone.layers.0.self_attn.q_proj.weight", "could mean .* or "),
        ("model.language_model.layers.9.mlp.up_proj.weight", "is not in Llava"),
        ("up_proj.weight", "is not in Llava"),
        ("other.0.weight", "is not in Llava"),
    ],
)
def test_names_that_mean_nothing_or_too_much(tiny_llava: Path, name: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        ParameterNames(load_vlm(str(tiny_llava)).model).find(name)


def test_an_adapter_with_names_of_another_version(tiny_llava: Path, tmp_path: Path) -> None:
    base = load_vlm(str(tiny_llava))
    new, old = "model.language_model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj"
    tensors = pairs_of(base, [new])
    renamed = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    one, other = (
        load_vlm(base.source, lora=str(write_adapter(tmp_path / n, t))) for n, t in (("new", tensors), ("old", renamed))
    )
    assert torch.equal(parameter(one, f"{new}.weight"), parameter(other, f"{new}.weight"))
    both = write_adapter(tmp_path / "both", {**tensors, **renamed})
    with pytest.raises(BadInputError, match="would both change"):
        load_vlm(base.source, lora=str(both))


# Bad input.


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def only_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def half_a_file(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def add(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = folder / "adapter_model.safetensors"
        more = {PREFIX + name.replace("__", "."): t for name, t in tensors.items()}
        save_file({**load_file(file), **more}, file)

    return change


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no LoRA adapter.*adapter_config.json"),
    "broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "pickle": (only_pickle, "pickle can run any code"),
    "more in pickle": (lambda f: (f / "non_lora_trainables.bin").write_bytes(b""), "non_lora_trainables.bin"),
    "cut off": (half_a_file, "damaged or cut off"),
    "another method": (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'"),
    "experts": (lambda f: edit_config(f, target_parameters=["experts.up"]), "target_parameters"),
    "aLoRA": (lambda f: edit_config(f, alora_invocation_tokens=[1]), "aLoRA"),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa"), "path_initial_model_for_weight_conversion"),
    "no rank": (lambda f: edit_config(f, r=None), "r, lora_alpha or a pattern"),
    "another rank": (lambda f: edit_config(f, r=8), r"ranks 4 \(lora_A\) and 4 \(lora_B\), adapter_config.json says 8"),
    "half a pair": (add(lm_head2__lora_A__weight=torch.ones(4, 8)), "lora_B is missing"),
    "unused tensor": (add(lm_head__lora_E=torch.ones(4)), "lm_head.lora_E is no tensor of a LoRA adapter"),
    "no such module": (add(frob__weight=torch.ones(4)), "frob.weight is not in Idefics3"),
    "NaN": (add(lm_head__weight=torch.full((448, 128), torch.nan)), "NaN"),
    "integers": (add(lm_head__weight=torch.ones(448, 128, dtype=torch.int8)), "not a float type"),
    "too large a vocabulary": (add(lm_head__weight=torch.ones(450, 128)), "450x128.*448x128"),
    "magnitudes": (add(lm_head__lora_magnitude_vector=torch.ones(3)), "3 magnitudes.*448 rows"),
    "rows": (add(lm_head__token_adapter__trainable_tokens_delta=torch.ones(1, 128)), r"1x128 values for its rows \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_bad_adapter_is_refused(vlm: VLM, tmp_path: Path, name: str) -> None:
    break_it, message = BREAKAGES[name]
    adapter = write_adapter(tmp_path / "adapter", pairs_of(vlm, ["lm_head"]))
    break_it(adapter)
    with pytest.raises(BadInputError, match=message) as caught:
        load_vlm(vlm.source, lora=str(adapter))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base(vlm: VLM, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, pair(f"{TEXT}.mlp.up_proj", 512, 64))
    with pytest.raises(
        BadInputError, match=r"up_proj is 512x64, .*up_proj.weight of the model is 256x128.*another base"
    ):
        load_vlm(vlm.source, lora=str(adapter))


def test_a_merged_weight_must_fit_its_dtype(tmp_path: Path) -> None:
    base = load_vlm(str(make_tiny("idefics3", tmp_path / "half", dtype="float16")))
    adapter = write_adapter(tmp_path / "adapter", pairs_of(base, ["lm_head"], size=1e6))
    with pytest.raises(BadInputError, match=r"lm_head.weight with the adapter merged does not fit float16"):
        load_vlm(base.source, lora=str(adapter))


def test_a_quantized_base_is_refused(vlm: VLM, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pairs_of(vlm, ["lm_head"]))
    packed = make_gptq(Path(vlm.source), tmp_path / "packed", group=32)[0]
    with pytest.raises(BadInputError, match=r"quantized already.*second time"):
        load_vlm(str(packed), lora=str(adapter))


def test_an_adapter_given_as_a_model_names_its_base(vlm: VLM, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, pairs_of(vlm, ["lm_head"]), base_model_name_or_path="me/base")
    with pytest.raises(BadInputError, match=rf"LoRA adapter.*--model me/base --lora {adapter}"):
        load_vlm(str(adapter))


def test_adapters_inside_a_folder_are_pointed_at(vlm: VLM, tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint-10", pairs_of(vlm, ["lm_head"]))
    with pytest.raises(BadInputError, match=r"did you mean .*checkpoint-10"):
        read_adapter(str(tmp_path))


def test_another_base_by_name_is_a_note(vlm: VLM, tmp_path: Path) -> None:
    tensors = pairs_of(vlm, ["lm_head"])
    other = load_vlm(vlm.source, lora=str(write_adapter(tmp_path / "a", tensors, base_model_name_or_path="me/other")))
    assert other.lora is not None
    assert "names me/other as its base" in other.lora.notes[0]
    same = write_adapter(tmp_path / "b", tensors, base_model_name_or_path="hub/Idefics3")
    found = load_vlm(vlm.source, lora=str(same)).lora
    assert found is not None
    assert found.notes == ()


# What an export records of an adapter, and what verify makes of that.


def manifest_of(source: dict[str, Any]) -> Any:
    from vlmexport.manifest import Manifest

    return Manifest("split", "cpu", {}, source, {}, {}, {}, (), ())


def test_the_record_of_an_adapter(vlm: VLM, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", pairs_of(vlm, ["lm_head"]))
    merged = load_vlm(vlm.source, lora=str(adapter))
    facts = source_facts(merged)
    assert facts["lora"]["path"] == str(adapter)
    assert set(facts["lora"]["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert "lora" not in source_facts(vlm)
    manifest = manifest_of(facts)
    assert original_source(manifest, None, None) == (vlm.source, str(adapter))
    assert original_source(manifest, "moved", None) == ("moved", str(adapter))
    assert original_source(manifest, None, "other") == (vlm.source, "other")
    assert original_source(manifest_of(source_facts(vlm)), None, None) == (vlm.source, None)


def test_another_adapter_shows_in_the_files(vlm: VLM, tmp_path: Path) -> None:
    tensors = pairs_of(vlm, ["lm_head"])
    merged = load_vlm(vlm.source, lora=str(write_adapter(tmp_path / "a", tensors)))
    other = load_vlm(vlm.source, lora=str(write_adapter(tmp_path / "b", tensors, lora_alpha=4)))
    manifest = manifest_of(source_facts(merged))
    assert changed_source_files(manifest, merged) == []
    assert changed_source_files(manifest, other) == ["adapter_config.json is not the file that was exported"]
    assert changed_source_files(manifest, vlm) == ["the export was made with a LoRA adapter, the reference was not"]
    assert changed_source_files(manifest_of(source_facts(vlm)), merged) == [
        "the export was made without a LoRA adapter, the reference was not"
    ]
    prints = {model_fingerprint(v.path, v.adapter_files) for v in (vlm, merged, other)}
    assert len(prints) == 3


def test_refusals_have_the_right_kind(vlm: VLM, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path, pairs_of(vlm, ["lm_head"]))
    edit_config(adapter, peft_type="VERA")
    with pytest.raises(UnsupportedModelError):
        read_adapter(str(adapter))
