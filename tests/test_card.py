from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from vlmexport.card import model_card
from vlmexport.manifest import PREFILL_PART, Manifest, QuantizedRecord


def record(bits: int, group: int, symmetric: bool, codebook: str, part: str = "decoder") -> QuantizedRecord:
    return QuantizedRecord(part, "w", bits, group, symmetric, 128, (), codebook)


def card(
    folder: Path, *records: QuantizedRecord, source: dict[str, Any] | None = None, layout: str = "split", **model: Any
) -> str:
    facts = {"model": "some/model", "architecture": "Tiny", **(source or {})}
    told = {"padding": "right", "decoder_dtype": "float32", "kv": {"dtype": "float32"}, **model}
    return model_card(Manifest(layout, "cpu", {"vlmexport": "0"}, facts, told, {}, {}, records, ()), folder)


def test_formats_are_told_by_their_name(tmp_path: Path) -> None:
    text = card(tmp_path, record(4, 64, True, "nf4"), record(4, 64, True, "nf4"), record(8, 128, False, ""))
    assert "Decoder: 2 matrices NF4, groups of 64; 1 matrices 8-bit asymmetric, groups of 128. Vision" in text
    assert "KV cache" not in text
    assert "Prompts" not in text
    assert "quantized checkpoint" not in text


def test_codes_of_a_checkpoint_are_told_as_such(tmp_path: Path) -> None:
    text = card(tmp_path, record(4, 128, True, ""), source={"quantization": {"summary": "gptq 4-bit g128 sym"}})
    assert "groups of 128. Codes and scales are those of the quantized checkpoint (gptq 4-bit g128 sym)." in text


def test_the_cache_and_the_prompt_graph_are_told(tmp_path: Path) -> None:
    records = (record(4, 32, True, ""), record(8, 128, True, "", PREFILL_PART))
    text = card(tmp_path, *records, kv={"dtype": "int8"}, prefill={"blocked": []})
    assert "Decoder: 1 matrices 4-bit symmetric, groups of 32." in text
    assert "The KV cache holds 8-bit integers." in text
    assert "Prompts run through a graph of their own, `decoder_prefill.onnx`, with INT8 products." in text


def test_floats_are_told(tmp_path: Path) -> None:
    assert "No weight of the decoder is quantized; it computes in float32." in card(tmp_path)


def test_a_card_is_for_the_runtime_of_its_layout(tmp_path: Path) -> None:
    assert 'vlmexport run . --image picture.png --prompt "What is in this picture?"' in card(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    several: dict[str, Any] = {"variant": "q4", "variants": {"fp16": {}, "q4": {}}}
    web = card(tmp_path, layout="transformersjs", **several)
    data = ModelCard(web).data
    assert (data.library_name, data.pipeline_tag) == ("transformers.js", "image-text-to-text")
    assert "for transformers.js (`cpu` profile)" in web
    assert "Precisions in it (`dtype`): `q4`, `fp16`; the first is the default." in web
    assert 'from_pretrained(id, { dtype: "q4" })' in web
    assert "await processor(picture, prompt)" in web
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}')
    assert "await processor(prompt, picture)" in card(tmp_path, layout="transformersjs", **several)
    genai = card(tmp_path, layout="genai")
    assert ModelCard(genai).data.tags == ["onnx", "vlmexport", "onnxruntime-genai"]
    assert 'og.Model(".")' in genai
    assert "vlmexport run" not in genai
    for text in (web, genai):
        assert text.count("```") % 2 == 0
