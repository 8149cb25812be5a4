"""The commands on a model that gives embeddings: export, gate, what turns the gate red, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.verify.mutate import DECODER, corrupted_scale, damaged
from tests.zoo.retrieval import make_colpali, make_colqwen2
from vlmexport import api
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.manifest import open_artifact
from vlmexport.plan import OnnxOptions
from vlmexport.quantize.scheme import make_scheme
from vlmexport.retrieval_plan import check_retrieval
from vlmexport.runtime.retrieval import RetrievalRunner
from vlmexport.runtime.retrieval_inputs import RetrievalInputs
from vlmexport.runtime.sampling import Sampling
from vlmexport.verify.gates import Gate
from vlmexport.verify.inputs import draw_picture
from vlmexport.verify.retrieval import check_losses, max_sim, order_agreement

LOSSES = {"quantization/mean_cosine", "quantization/least_cosine", "quantization/ranking"}
INT8 = OnnxOptions(scheme=make_scheme("rtn", bits=8, group_size=32))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_colpali(tmp_path_factory.mktemp("colpali"))


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "int8"
    result = api.export_onnx(str(model), out, INT8)
    assert result.report is not None
    assert result.report.status == "passed"
    names = {check.name for check in result.report.checks}
    assert {"decoder/embeddings[page.wide]", "decoder/ragged_batch", "model/embeddings[query.text]"} <= names
    assert {*LOSSES, "model/ranking"} <= names
    assert result.report.series["retrieval/scores"] != result.report.series["retrieval/scores_original"]
    return out


@pytest.mark.slow
def test_the_example_of_the_docs_ranks_pages(exported: Path) -> None:
    inputs, runner = RetrievalInputs(exported), RetrievalRunner(open_artifact(exported), threads=1)
    found, mask = runner.embeddings([inputs.page(draw_picture(64, 64, 1)), inputs.query("shapes?")])
    assert mask.sum(axis=1).tolist() == [inputs.page(draw_picture(9, 9, 1)).input_ids.shape[1], mask[1].sum()]
    assert 0 < max_sim(found[1][mask[1] == 1], found[0]) <= mask[1].sum()
    assert "RetrievalRunner" in (exported / "README.md").read_text()


def _failures(folder: Path) -> set[str]:
    report = api.verify_artifact(folder)
    assert report.status == "failed"
    return {check.name for check in report.failures()}


def _not_normed(folder: Path) -> None:
    """The division by the length is left out."""
    model = onnx.load(folder / DECODER, load_external_data=False)
    made = {out: node for node in model.graph.node for out in node.output}
    last = made["embeddings"]
    last.input[0] = made[last.input[0]].input[0]
    onnx.save(model, folder / DECODER)


@pytest.mark.slow
def test_a_corrupted_scale_is_red(exported: Path, tmp_path: Path) -> None:
    folder = damaged(exported, tmp_path / "damaged", corrupted_scale)
    assert any(name.startswith("codes/") for name in _failures(folder))


@pytest.mark.slow
def test_embeddings_without_the_normalisation_are_red(exported: Path, tmp_path: Path) -> None:
    folder = damaged(exported, tmp_path / "damaged", _not_normed)
    failed = _failures(folder)
    assert {"decoder/embeddings[page.wide]", "decoder/ragged_batch", "model/embeddings[query.text]"} <= failed


@pytest.mark.slow
def test_without_the_original_nothing_of_it_has_passed(exported: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "alone"))
    text = (folder / "manifest.json").read_text()
    source = open_artifact(exported).manifest.source["model"]
    (folder / "manifest.json").write_text(text.replace(source, str(tmp_path / "gone")))
    report = api.verify_artifact(folder)
    assert report.status == "incomplete"
    assert {"decoder/embeddings", "model/ranking", *LOSSES} <= {check.name for check in report.not_run()}


@pytest.mark.slow
def test_commands_that_answer_refuse_the_export(exported: Path) -> None:
    told = r"gives embeddings of pages and queries, it writes no text: use .*RetrievalRunner.*docs/retrieval.md"
    with pytest.raises(BadInputError, match=told):
        api.answer_prompt(exported, [], "hello", Sampling(), lambda _: None)
    with pytest.raises(BadInputError, match=told):
        api.bench_artifact(exported)
    with pytest.raises(BadInputError, match=told):
        api.make_server(exported, port=0)
    with pytest.raises(BadInputError, match=told):
        api.verify_artifact(exported, samples=exported / "none.jsonl")


@pytest.mark.slow
def test_options_that_are_not_for_it_are_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"--quant awq\+gptq has no samples .* choose --quant rtn, hqq or"):
        api.export_onnx(str(model), tmp_path / "out", OnnxOptions(scheme=make_scheme("awq+gptq")))
    with pytest.raises(UnsupportedModelError, match="--kv-cache int8 is not for it; choose --kv-cache same"):
        api.plan_onnx(str(model), OnnxOptions(scheme=INT8.scheme, kv_cache="int8"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_plan_and_inspect_know_it(model: Path) -> None:
    plan = api.plan_onnx(str(model), INT8)
    assert plan.kv_bytes_per_token == 0
    assert {w.action for w in plan.weights if w.name == "embedding_proj_layer.weight"} == {"quantize"}
    report = api.inspect_model(str(model))
    able = {target.name for target in report.targets if target.can_export}
    assert able == {"cpu", "cuda"}
    assert "--quant rtn" in report.recipe.command
    assert report.kv.bytes_per_token == 0
    assert set(report.tokens_per_image.values()) == {16}


def test_the_order_of_pages_counts_by_how_far_they_are_apart() -> None:
    wanted = np.array([[3.0, 2.0, 0.0]])
    assert order_agreement(wanted, wanted) == 1
    assert order_agreement(wanted, np.array([[2.0, 3.0, 0.0]])) == pytest.approx(5 / 6)
    assert order_agreement(wanted, np.array([[np.nan, 3.0, 0.0]])) == 0
    assert max_sim(np.eye(2, dtype=np.float32), np.array([[0.5, 0.1], [0.2, 0.4]], np.float32)) == pytest.approx(0.9)


def _unit(rows: Any) -> Any:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


def test_bad_codes_are_a_loss_and_a_bad_graph_is_a_fault() -> None:
    draw = np.random.default_rng(0).standard_normal
    own = {name: _unit(draw((1, 20, 16))) for name in ("page.a", "page.b", "page.c", "query.a", "query.b")}
    assert not _failed(own, own, own)
    coded = {name: _unit(rows + draw(rows.shape)) for name, rows in own.items()}
    assert _failed(coded, coded, own) == LOSSES
    turned = {name: rows.copy() for name, rows in own.items()}
    turned["page.b"][0, :1] *= -1
    assert _failed(turned, own, own) >= {"quantization/least_cosine"}
    turned["page.b"] *= -1
    assert _failed(turned, own, own) == {*LOSSES, "model/ranking"}
    gone = {**own, "query.a": own["query.a"] * np.nan}
    assert _failed(gone, own, own) == {*LOSSES, "model/ranking"}


def _failed(found: Any, wanted: Any, own: Any) -> set[str]:
    gate = Gate()
    check_losses(gate, found, wanted, own, (2e-3, 0.97))
    assert len(gate.checks) == len(LOSSES) + 1
    return {check.name for check in gate.checks if check.status == "failed"}


@pytest.mark.slow
def test_colqwen2_in_4_bits_is_lowered_exactly_and_its_loss_is_red(tmp_path: Path) -> None:
    """A random model in 4 bits: the gate tells the two apart."""
    folder, int4 = make_colqwen2(tmp_path / "model"), OnnxOptions(scheme=make_scheme("rtn", bits=4, group_size=32))
    report = api.export_onnx(str(folder), tmp_path / "out", int4).report
    assert report is not None
    assert (report.status_of("lowering"), report.status_of("quantization")) == ("passed", "failed")
    assert {check.name for check in report.failures()} <= LOSSES


def test_a_model_that_writes_text_takes_every_option() -> None:
    class Text:
        class facts:  # noqa: N801
            output = "logits"

    check_retrieval(Text, OnnxOptions(kv_cache="int8"))  # type: ignore[arg-type]
