"""An adapter GGUF over the base in the real llama.cpp gives what PyTorch gives with the adapter merged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.model.adapters import pair, pairs_of, write_adapter
from tests.tiny import make_tiny
from tools.train_fixture.gguf_files import write_mmproj, write_text
from vlmexport.api import export_lora
from vlmexport.calibrate.synthetic import TEST_SEEDS, scene
from vlmexport.demo import model_dir
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.gguf_options import GgufOptions
from vlmexport.gguf_plan import plan_gguf
from vlmexport.lower.gguf.adapter import write_adapter as write_gguf
from vlmexport.model.load import VLM, load_vlm
from vlmexport.model.lora import low_rank_updates, merge_adapter
from vlmexport.model.lora_files import read_adapter
from vlmexport.runtime.llamacpp.prompt import marked_prompt
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.runtime.prompt import PromptBuilder

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUESTION = "Is the red star left of the blue circle? Count the green squares."
PICTURES = [scene(TEST_SEEDS[0]).image]
WITH_PICTURES = 1e-5  # the limit: llama.cpp's vision encoder rounds in places to F16
SAME, DIFFERENT = 1e-8, 1e-2  # measured: 2e-11 at most, and 0.3 at least


@pytest.fixture(scope="module")
def demo() -> VLM:
    return load_vlm("demo")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("base")
    return write_text(model_dir(), folder / "text.gguf"), write_mmproj(model_dir(), folder / "mmproj.gguf")


@pytest.fixture(scope="module")
def text_pairs(demo: VLM) -> dict[str, torch.Tensor]:
    """Every linear layer of the text model, the LM head and the embedding."""
    layers = [name for name, _ in demo.model.named_modules() if "text_model" in name and name.endswith(LINEARS)]
    found = pairs_of(demo, [*layers, "lm_head"])
    rows, columns = demo.model.get_input_embeddings().weight.shape
    embedding = pair("e", columns, rows, size=0.05)
    found["model.text_model.embed_tokens.lora_embedding_A"] = embedding["e.lora_A.weight"] * rows**0.5
    found["model.text_model.embed_tokens.lora_embedding_B"] = embedding["e.lora_B.weight"]
    return found


def merged_logits(adapter: Path | None, pictures: int = 0) -> np.ndarray:
    """Logits of the bundled model in float32, with the adapter merged before anything is rounded."""
    model: Any = load_vlm("demo").model
    model.float()
    if adapter is not None:
        merge_adapter(model, read_adapter(str(adapter)))
    made = PromptBuilder(model_dir()).build(PICTURES[:pictures], QUESTION)
    inputs = {"input_ids": torch.tensor(made.input_ids), **{k: torch.tensor(v) for k, v in made.pixel_inputs.items()}}
    with torch.inference_mode():
        logits: np.ndarray = model(**inputs).logits[0].numpy()
    return logits


def llama_logits(base: tuple[Path, Path], lora: Path, pictures: int = 0) -> np.ndarray:
    builder = PromptBuilder(model_dir())
    text, mmproj = base
    with LlamaCppRunner(text, mmproj if pictures else None, threads=1, context=512, exact=True, lora=lora) as runner:
        text_prompt = marked_prompt(builder, QUESTION, pictures, runner.marker)
        return runner.prompt_logits(runner.prompt(text_prompt, PICTURES[:pictures]))


def divergence(wanted: np.ndarray, found: np.ndarray) -> float:
    """Largest KL over the last rows of `wanted`, as many as `found` has."""
    rows = [x.astype(np.float64) for x in (wanted[-len(found) :], found)]
    p, q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in rows)
    return float((np.exp(p) * (p - q)).sum(-1).max())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3},
        pytest.param({"alpha_pattern": {"layers.1.self_attn.q_proj": 32, "gate_proj": 1}}, marks=pytest.mark.slow),
        pytest.param({"lora_alpha": 0, "alpha_pattern": {"o_proj": 8}}, marks=pytest.mark.slow),
    ],
    ids=["plain", "rslora", "alpha_pattern", "alpha_0"],
)
def test_llama_cpp_equals_the_merged_model(
    base: tuple[Path, Path], text_pairs: dict[str, torch.Tensor], tmp_path: Path, config: dict[str, Any]
) -> None:
    adapter = write_adapter(tmp_path / "adapter", text_pairs, **config)
    made = export_lora(str(adapter), tmp_path / "adapter.gguf", base="demo")
    found, wanted = llama_logits(base, made.path), merged_logits(adapter)
    assert divergence(wanted, found) <= SAME
    assert divergence(merged_logits(None), found) > DIFFERENT


@pytest.mark.slow
def test_with_a_picture(base: tuple[Path, Path], text_pairs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", text_pairs)
    made = export_lora(str(adapter), tmp_path / "adapter.gguf", base="demo")
    found = llama_logits(base, made.path, pictures=1)
    assert divergence(merged_logits(adapter, pictures=1), found) <= WITH_PICTURES
    assert divergence(merged_logits(None, pictures=1), found) > DIFFERENT


def test_f16_is_close(base: tuple[Path, Path], text_pairs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", text_pairs)
    made = export_lora(str(adapter), tmp_path / "adapter.gguf", base="demo", outtype="f16")
    assert divergence(merged_logits(adapter), llama_logits(base, made.path)) <= 1e-5


def test_rows_in_another_order_would_show(
    demo: VLM, base: tuple[Path, Path], text_pairs: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """llama.cpp's query and key rows are interleaved; an adapter without that is another adapter."""
    adapter = write_adapter(tmp_path / "adapter", text_pairs)
    plan = plan_gguf(demo, GgufOptions(quant="F16", imatrix="none"))
    flat = dataclasses.replace(plan, tensors=tuple(dataclasses.replace(t, transform=None) for t in plan.tensors))
    updates = low_rank_updates(demo.model, read_adapter(str(adapter)))
    write_gguf(tmp_path / "flat.gguf", flat, updates, 8)
    assert divergence(merged_logits(adapter), llama_logits(base, tmp_path / "flat.gguf")) > DIFFERENT


def test_the_file_says_what_it_is(text_pairs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "my-adapter", text_pairs, base_model_name_or_path="me/base", lora_alpha=5)
    made = export_lora(str(adapter), tmp_path / "a.gguf", base="demo")
    reader = gguf.GGUFReader(made.path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys["general.architecture"] == "llama"
    assert (keys["general.type"], keys["adapter.type"], keys["adapter.lora.alpha"]) == ("adapter", "lora", 5.0)
    assert (keys["general.name"], keys["general.base_model.0.name"]) == ("my-adapter", "me/base")
    names = {tensor.name for tensor in reader.tensors}
    assert names == {f"{name}.{half}" for name in made.changed for half in ("lora_a", "lora_b")}
    assert "token_embd.weight" in made.changed
    assert len(made.changed) == 4 * len(LINEARS) + 2


def test_the_vision_side_is_refused(demo: VLM, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pairs_of(demo, ["encoder.layers.0.self_attn.q_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"q_proj.weight is on the vision side.*--lora"):
        export_lora(str(adapter), tmp_path / "a.gguf", base="demo")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"lm_head.lora_magnitude_vector": torch.ones(512)}, "DoRA magnitudes"),
        ({"lm_head.lora_B.bias": torch.ones(512)}, "bias"),
        ({"model.text_model.norm.weight": torch.ones(256)}, "replaced altogether"),
    ],
)
def test_more_than_a_low_rank_update_is_refused(
    demo: VLM, tmp_path: Path, more: dict[str, torch.Tensor], reason: str
) -> None:
    if "bias" in reason:
        more |= pairs_of(demo, ["encoder.layers.0.mlp.fc1"])
        more["model.vision_model.encoder.layers.0.mlp.fc1.lora_B.bias"] = more.pop("lm_head.lora_B.bias")
    adapter = write_adapter(tmp_path / "adapter", {**pairs_of(demo, ["lm_head"]), **more})
    with pytest.raises(BadInputError, match=reason):
        export_lora(str(adapter), tmp_path / "a.gguf", base="demo")


def test_a_copy_of_the_base_s_own_embedding_is_no_change(demo: VLM, tmp_path: Path) -> None:
    """PEFT writes the embedding beside an adapter that touches it."""
    table = demo.model.get_input_embeddings().weight.detach().clone()
    tensors = {**pairs_of(demo, ["lm_head"]), "model.text_model.embed_tokens.base_layer.weight": table}
    made = export_lora(str(write_adapter(tmp_path / "adapter", tensors)), tmp_path / "a.gguf", base="demo")
    assert made.changed == ("output.weight",)


def test_a_tied_embedding_is_refused(tmp_path: Path) -> None:
    """llama.cpp applies an adapter of token_embd.weight to the LM head too, with matrices of the wrong shape."""
    folder = make_tiny("idefics3", tmp_path / "tied", tied=True)
    vlm = load_vlm(str(folder))
    rows, columns = vlm.model.get_input_embeddings().weight.shape
    halves = pair("e", columns, rows)
    embedding = {
        "model.text_model.embed_tokens.lora_embedding_A": halves["e.lora_A.weight"],
        "model.text_model.embed_tokens.lora_embedding_B": halves["e.lora_B.weight"],
    }
    adapter = write_adapter(tmp_path / "e", embedding)
    with pytest.raises(UnsupportedModelError, match="for the LM head too"):
        export_lora(str(adapter), tmp_path / "a.gguf", base=str(folder))
    head = write_adapter(tmp_path / "h", pair("lm_head", rows, columns))
    with pytest.raises(UnsupportedModelError, match="tied to the embedding"):
        export_lora(str(head), tmp_path / "a.gguf", base=str(folder))


def test_a_file_is_replaced_only_by_force(demo: VLM, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", pairs_of(demo, ["lm_head"]))
    out = tmp_path / "a.gguf"
    out.write_text("mine")
    with pytest.raises(BadInputError, match="--force"):
        export_lora(str(adapter), out, base="demo")
    assert out.read_text() == "mine"
    export_lora(str(adapter), out, base="demo", force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    with pytest.raises(BadInputError, match="is a folder"):
        export_lora(str(adapter), tmp_path, base="demo")
    with pytest.raises(BadInputError, match="does not exist"):
        export_lora(str(adapter), tmp_path / "none" / "a.gguf", base="demo")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "a.gguf"}


def test_values_that_f16_does_not_hold_are_refused(demo: VLM, tmp_path: Path) -> None:
    tensors = {name: 1e6 * t for name, t in pairs_of(demo, ["lm_head"]).items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(BadInputError, match="65504"):
        export_lora(str(adapter), tmp_path / "a.gguf", base="demo", outtype="f16")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}
