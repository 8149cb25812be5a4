"""Models that give embeddings of pages and queries: split, lowered, and compared with PyTorch in ONNX Runtime."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from tests.families.tiny_text import STATISTICS, byte_level_tokenizer, save_tiny
from tests.tiny import randomise
from tests.zoo import gemma
from tests.zoo.measure import _TEXT
from tests.zoo.proof import FLOATS, Zooed, export, relative
from tests.zoo.retrieval import make_colqwen2
from vlmexport.errors import BadInputError, UnsupportedModelError, VlmExportError
from vlmexport.manifest import Artifact, open_artifact
from vlmexport.model.load import load_vlm
from vlmexport.model.retrieval import embedding_head, retrieval_class
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.retrieval import RetrievalRunner
from vlmexport.runtime.retrieval_inputs import RetrievalInputs
from vlmexport.split.capture import split_model
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.retrieval import RetrievalPart
from vlmexport.verify.inputs import draw_picture

WIDTH, LIMIT = 24, 1e-4
_NAMES = ("<|endoftext|>", "<|im_end|>", "<image>")


def make_colpali(folder: Path) -> Path:
    """PaliGemma under an embedding layer; no processor."""
    inner: Any = gemma._paligemma(2, "paligemma")
    tokenizer = byte_level_tokenizer(_NAMES, gemma.VOCAB)
    save_tiny(inner, tokenizer, dict(STATISTICS), folder, "", 0)
    model: Any = transformers.ColPaliForRetrieval(
        transformers.ColPaliConfig(vlm_config=inner.config, embedding_dim=WIDTH)
    )
    model.get_output_embeddings = lambda: model.embedding_proj_layer
    randomise(model, 1)
    with torch.no_grad():  # a table of float16, as the export stores it
        model.get_input_embeddings().weight.copy_(model.get_input_embeddings().weight.half().float())
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zooed(tmp_path_factory: pytest.TempPathFactory) -> Zooed:
    vlm = load_vlm(str(make_colpali(tmp_path_factory.mktemp("colpali"))), embeddings=True)
    examples = gemma.gemma_examples("paligemma", 2)
    return Zooed(vlm, split_model(vlm, examples), examples)


@pytest.fixture(scope="module")
def exported(zooed: Zooed, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(zooed, FLOATS, tmp_path_factory.mktemp("export"))


def inputs_of(example: dict[str, torch.Tensor]) -> ModelInputs:
    return ModelInputs(example["input_ids"].numpy(), {n: t.numpy() for n, t in example.items() if n not in _TEXT})


def wanted(zooed: Zooed, inputs: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return zooed.vlm.model(**inputs).embeddings.numpy()


@pytest.mark.slow
def test_pages_and_queries_have_the_models_embeddings(zooed: Zooed, exported: Artifact) -> None:
    """Pages one by one, queries of another length, and a padded batch of both; only the first page was traced."""
    assert zooed.split.replay_difference <= 1e-5
    runner = RetrievalRunner(exported, threads=1)
    graph = ir.load(exported.path / "decoder.onnx").graph
    assert [value.name for value in graph.inputs] == ["inputs_embeds", "attention_mask", "block_ids"]
    assert [value.name for value in graph.outputs] == ["embeddings"]
    singles = []
    for example in zooed.examples:
        found, mask = runner.embeddings([inputs_of(example)])
        singles.append(found[0])
        assert mask.all()
        assert found.shape[2] == WIDTH
        assert relative(found, wanted(zooed, example)) <= LIMIT
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, atol=1e-5)
    query = {"input_ids": torch.tensor([[20, 30, 40, 50, 60]]), "attention_mask": torch.ones(1, 5, dtype=torch.int64)}
    found, _ = runner.embeddings([inputs_of(query)])
    assert relative(found, wanted(zooed, query)) <= LIMIT
    batch, mask = runner.embeddings([inputs_of(query), inputs_of(zooed.examples[1])])
    assert relative(batch[0, :5], found[0]) <= 1e-4
    assert relative(batch[1], singles[1]) <= 1e-4
    assert not batch[0, 5:].any()
    assert not mask[0, 5:].any()
    other = {**zooed.examples[0], "pixel_values": zooed.examples[0]["pixel_values"].flip(-1)}
    assert relative(runner.embeddings([inputs_of(other)])[0], singles[0][None]) > 1e-2


@pytest.mark.slow
def test_such_an_export_writes_no_text(exported: Artifact, tmp_path: Path) -> None:
    assert exported.manifest.model["output"] == "embeddings"
    runner = OnnxRunner(exported, threads=1)
    with pytest.raises(BadInputError, match="gives embeddings of pages and queries; it writes no text"):
        runner.prefill(runner.embed(np.array([[1, 2]])), np.ones((1, 2), np.int64))
    shutil.copytree(exported.path, tmp_path, dirs_exist_ok=True)
    data = json.loads((tmp_path / "manifest.json").read_text())
    del data["model"]["output"]
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BadInputError, match="writes text; it gives no embeddings"):
        RetrievalRunner(open_artifact(tmp_path, check_hashes=False))


@pytest.mark.slow
def test_commands_for_text_refuse_the_model(tmp_path: Path) -> None:
    folder = make_colpali(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match="colpali gives embeddings of pages and queries, not text; `vlmexport onnx` exports"
    ):
        load_vlm(str(folder))


def test_a_class_that_writes_text_is_no_retrieval_class(tmp_path: Path) -> None:
    for kind, name in (("gemma3", "Gemma3ForConditionalGeneration"), ("colpali", "NoSuchClass"), ("llama", "Llama")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [name]}))
        assert retrieval_class(tmp_path) is None


@pytest.mark.slow
def test_embeddings_that_are_not_normed_are_refused(zooed: Zooed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetrievalPart, "logits", DecoderPart.logits)
    with pytest.raises(UnsupportedModelError, match="colpali: the replayed decoder and LM head differ"):
        split_model(zooed.vlm, zooed.examples)


def test_a_model_that_writes_text_has_no_embedding_layer() -> None:
    """An LM head beside a whole model is no embedding layer."""
    inner: Any = gemma._paligemma(2, "paligemma")
    assert embedding_head(inner) is None
    assert embedding_head(transformers.ColPaliForRetrieval(transformers.ColPaliConfig(vlm_config=inner.config)))


def _positions_of_grids(self: Any, **given: Any) -> Any:
    """ColQwen2's forward, which is given the positions that Qwen2-VL counts from the pictures' grids."""
    kinds = (given["input_ids"] == self.config.vlm_config.image_token_id).int()
    counted, _ = self.vlm.get_rope_index(given["input_ids"], kinds, image_grid_thw=given.get("image_grid_thw"))
    return _COLQWEN2_FORWARD(self, **given, position_ids=counted)


_COLQWEN2_FORWARD = transformers.ColQwen2ForRetrieval.forward


@pytest.fixture(scope="module")
def colqwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_colqwen2(tmp_path_factory.mktemp("colqwen2"))


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["1d", pytest.param("mrope", marks=pytest.mark.family)])
def test_pages_of_any_size_and_queries_have_the_embeddings_of_colqwen2(
    positions: str, colqwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own class counts positions in one row; one that counts them in three has them from the host."""
    if positions == "mrope":
        monkeypatch.setattr(transformers.ColQwen2ForRetrieval, "forward", _positions_of_grids)
    vlm = load_vlm(str(colqwen2), embeddings=True)
    split = split_model(vlm)
    assert split.replay_difference <= 1e-5
    assert split.merge.position == positions
    runner = RetrievalRunner(export(Zooed(vlm, split, ()), FLOATS, tmp_path / "out"), threads=1)
    inputs = RetrievalInputs(colqwen2)
    sizes = ((64, 64), (128, 32), (200, 90))
    pages = [inputs.page(draw_picture(*size, seed)) for seed, size in enumerate(sizes)]
    assert len({page.pixel_inputs["pixel_values"].shape[1] for page in pages}) == len(sizes)
    items = [*pages, inputs.query("What did it cost?"), inputs.query("x")]
    batch, mask = runner.embeddings(items)
    for row, tokens, item in zip(batch, mask, items, strict=True):
        given = {name: torch.from_numpy(np.array(array)) for name, array in item.pixel_inputs.items()}
        ids = torch.from_numpy(item.input_ids)
        theirs = wanted(Zooed(vlm, split, ()), {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given})
        alone, _ = runner.embeddings([item])
        assert relative(alone, theirs) <= LIMIT
        assert relative(row[tokens == 1], theirs[0]) <= LIMIT
        assert not row[tokens == 0].any()
    other = ModelInputs(
        pages[0].input_ids, {**pages[0].pixel_inputs, "pixel_values": -pages[0].pixel_inputs["pixel_values"]}
    )
    assert relative(runner.embeddings([other])[0], batch[:1, : other.input_ids.shape[1]]) > 1e-2
    pair = {n: np.concatenate([a, a]) for n, a in pages[0].pixel_inputs.items()}
    with pytest.raises(VlmExportError, match="vision_encoder"):  # a page has one picture
        runner.embeddings([ModelInputs(np.concatenate([pages[0].input_ids] * 2, axis=1), pair)])


@pytest.mark.slow
def test_an_encoder_that_is_given_other_patches_is_refused(colqwen2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mirrored(self: Any, **given: Any) -> Any:
        return _COLQWEN2_FORWARD(self, **{**given, "pixel_values": given["pixel_values"].flip(1)})

    monkeypatch.setattr(transformers.ColQwen2ForRetrieval, "forward", mirrored)
    with pytest.raises(UnsupportedModelError, match="colqwen2: the model does not call get_image_features for"):
        split_model(load_vlm(str(colqwen2), embeddings=True))
