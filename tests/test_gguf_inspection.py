"""``inspect`` and ``plan gguf`` say of a tokenizer what the export would say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vlmexport import api
from vlmexport.demo import model_dir
from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.gguf_options import GgufOptions, GgufPlan, gguf_options
from vlmexport.gguf_pipeline import gguf_vocabulary
from vlmexport.inspection import TargetReport, TokenizerCheck, _target_report
from vlmexport.model.load import VLM, load_vlm


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


def rename_token(folder: Path, old: str, new: str) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def lowercase(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "normalizer": {"type": "Lowercase"}}))


def only_tekken(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tekken.json").write_text("{}")


def only_vocab(folder: Path) -> None:
    """The slow form of the bundled tokenizer, as Qwen's checkpoints have it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    merges = (" ".join(pair) for pair in tokenizer["model"]["merges"])
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    added = {str(t.pop("id")): t for t in tokenizer["added_tokens"]}
    file = folder / "tokenizer_config.json"
    settings = {**json.loads(file.read_text()), "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    file.write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()


def llamacpp(model: str, check: TokenizerCheck = gguf_vocabulary) -> TargetReport:
    """What ``inspect`` says of the target, without the parts that need a split."""
    return _target_report("llamacpp", load_vlm(model), None, "not split", check)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a token of mtmd": (lambda f: rename_token(f, "<global-img>", "<other-img>"), "no token '<global-img>'"),
    "a normalizer": (lowercase, "normalizer Lowercase"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json and no tokenizer.model"),
    "a broken tekken.json": (only_tekken, "tekken.json: transformers cannot read this tokenizer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_export_refuses(name: str, model: Path, tmp_path: Path) -> None:
    break_it, words = BROKEN[name]
    break_it(model)
    report = llamacpp(str(model))
    assert not report.can_export
    assert words in report.reason
    for call in (
        lambda: api.plan_gguf(str(model), gguf_options()),
        lambda: api.export_gguf(str(model), tmp_path / "out", GgufOptions(imatrix="none"), verify=False),
    ):
        with pytest.raises(BadInputError) as raised:
            call()
        assert str(raised.value) == report.reason


def test_inspect_asks_for_the_tokenizer(model: Path) -> None:
    rename_token(model, "<global-img>", "<other-img>")
    report = next(t for t in api.inspect_model(str(model)).targets if t.name == "llamacpp")
    assert "no token '<global-img>'" in report.reason


def test_a_tokenizer_of_vocab_json_is_taken(model: Path) -> None:
    only_vocab(model)
    report = llamacpp(str(model))
    assert report.can_export, report.reason
    assert api.plan_gguf(str(model), gguf_options()).arch == "llama"


def test_a_missing_package_is_a_reason() -> None:
    def missing(_: VLM, __: GgufPlan) -> None:
        raise NotPossibleHereError("pip install sentencepiece")

    assert llamacpp("demo").can_export
    report = llamacpp("demo", missing)
    assert (report.can_export, report.reason) == (False, "pip install sentencepiece")
