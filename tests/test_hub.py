"""Pushing to the hub, with a stand-in for its client; and what the card says of lineage and proof."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from tests.test_card import card
from vlmexport import hub
from vlmexport.card import lineage
from vlmexport.card_proof import proof_section, write_proof
from vlmexport.cli.main import run
from vlmexport.errors import BadInputError, NotPossibleHereError, VlmExportError
from vlmexport.hub import HubTarget, check_target, push_folder
from vlmexport.local_paths import without_local_paths

TARGET = HubTarget("me/my-export", private=True)
REPORT = {
    "status": "passed",
    "lowering": {"max_abs_logit": 2.3e-5, "kl": 1e-4, "top1": 0.98},
    "quantization": {"kl": 6e-3, "top1": 0.991, "perplexity_ratio": 1.01, "accuracy": None, "reference_accuracy": None},
    "checks": [{"name": "a", "status": "passed"}, {"name": "runtime/provider", "status": "not_run"}],
}


class Hub:
    """Remembers what it was asked; `error` is raised by everything."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.asked, self.role = error, [], "write"  # type: ignore[var-annotated]
        self.there: dict[str, Path] = {}

    def _note(self, name: str, **given: Any) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append((name, given))

    def whoami(self) -> dict[str, str]:
        self._note("whoami")
        return {"name": "me", "orgs": [{"name": "ours"}], "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, repo: str, **given: Any) -> None:
        self._note("create_repo", repo=repo, **given)

    def list_repo_files(self, repo: str) -> list[str]:
        return sorted(self.there)

    def hf_hub_download(self, repo: str, name: str) -> str:
        return str(self.there[name])

    def create_commit(self, **given: Any) -> SimpleNamespace:
        self._note("create_commit", **given)
        return SimpleNamespace(commit_url="https://huggingface.co/me/my-export/commit/1")


def http_error(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("no\nmore", response=SimpleNamespace(status_code=status, headers={}, request=None))  # type: ignore[arg-type]


def export_folder(folder: Path) -> Path:
    """A folder that says what it is, with a file that is none of it."""
    (folder / "decoder.onnx").write_bytes(b"graph")
    (folder / ".env").write_text("secret")
    manifest = {"source": {"model": "/home/me/secret/my-model"}, "files": {"decoder.onnx": {}}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_the_files_of_the_export_go_up_as_one_commit(tmp_path: Path) -> None:
    api = Hub()
    assert check_target(TARGET, api) == "me"  # type: ignore[arg-type]
    address = push_folder(export_folder(tmp_path), TARGET, api)  # type: ignore[arg-type]
    assert address == "https://huggingface.co/me/my-export/commit/1"
    assert [name for name, _ in api.asked] == ["whoami", "create_repo", "create_commit"]
    assert api.asked[1][1] == {"repo": "me/my-export", "private": True, "exist_ok": True}
    added = {op.path_in_repo: op.path_or_fileobj for op in api.asked[2][1]["operations"]}
    assert added.keys() == {"decoder.onnx", "manifest.json"}
    assert json.loads(added["manifest.json"])["source"]["model"] == "my-model"
    assert "/home/me" in (tmp_path / "manifest.json").read_text()  # here nothing changes


def test_no_path_of_this_machine_goes_up(tmp_path: Path) -> None:
    home = "/home/me/secret"
    manifest = {
        "source": {"model": f"{home}/my-model", "lora": {"path": f"{home}/my adapter", "rank": 8}},
        "calibration": {
            "recipe": {"source": f"{home}/pictures"},
            "skipped": [f"could not read {home}/a.png: no picture"],
        },
        "results": {
            "verify": {
                "runtime": {"reference": f"{home}/my-model", "library": "onnxruntime 1.31"},
                "details": {
                    "answers": [{"images": [f"{home}/b.png", "C:\\Users\\secret\\c.png"], "text": "1/2 and/or 3"}]
                },
            }
        },
        "notes": ["see https://huggingface.co/me/secret-free and ~/secret/notes.txt"],
        "files": {},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    api = Hub()
    push_folder(tmp_path, TARGET, api)  # type: ignore[arg-type]
    body = api.asked[-1][1]["operations"][0].path_or_fileobj.decode()
    assert "/home" not in body
    assert "secret/" not in body.replace("\\", "/")
    sent = json.loads(body)
    assert sent["source"] == {"model": "my-model", "lora": {"path": "my adapter", "rank": 8}}
    assert sent["calibration"] == {"recipe": {"source": "pictures"}, "skipped": ["could not read a.png: no picture"]}
    assert sent["results"]["verify"]["runtime"] == {"reference": "my-model", "library": "onnxruntime 1.31"}
    assert sent["results"]["verify"]["details"]["answers"] == [{"images": ["b.png", "c.png"], "text": "1/2 and/or 3"}]
    assert sent["notes"] == ["see https://huggingface.co/me/secret-free and notes.txt"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/a b/model", "model"),
        ("~/models/mine", "mine"),
        ("../secret/mine", "mine"),
        ("C:\\Users\\me\\x.png", "x.png"),
        ("\\\\server\\share\\x.png", "x.png"),
        ("read /home/me/x.png and C:\\me\\y.png", "read x.png and y.png"),
        ("model.layers.0/attn, 3/4 and https://host/a/b", "model.layers.0/attn, 3/4 and https://host/a/b"),
        ("re:.*\\.mlp\\..*", "re:.*\\.mlp\\..*"),
        ("\\frac{1}{2}", "\\frac{1}{2}"),
        ("owner/model", "owner/model"),
    ],
)
def test_a_path_is_its_last_name_and_other_text_stays(text: str, shown: str) -> None:
    assert without_local_paths({text: [text]}) == {shown: [shown]}


def test_what_an_earlier_export_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    api, old = Hub(), tmp_path / "old.json"
    old.write_text(json.dumps({"created_by": {"vlmexport": "0"}, "files": {"decoder.onnx": {}, "onnx/old.onnx": {}}}))
    (tmp_path / "other.json").write_text(
        json.dumps({"created_by": {"vlmexport": "0"}, "files": {"model.safetensors": {}}})
    )
    api.there = {
        "manifest.json": old, "decoder.onnx": old, "onnx/old.onnx": old, "notes.md": old,
        "vlmexport_quantization.json": tmp_path / "other.json", "model.safetensors": old,
    }  # fmt: skip
    push_folder(export_folder(tmp_path), TARGET, api)  # type: ignore[arg-type]
    operations = api.asked[-1][1]["operations"]
    assert [op.path_in_repo for op in operations if type(op).__name__ == "CommitOperationDelete"] == ["onnx/old.onnx"]
    old.write_text("[]")  # a manifest.json of somebody else's
    push_folder(tmp_path, TARGET, api)  # type: ignore[arg-type]
    operations = api.asked[-1][1]["operations"]
    assert not [op for op in operations if type(op).__name__ == "CommitOperationDelete"]


def test_a_folder_that_cannot_be_pushed_makes_no_repository(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {"../x": {}}}))
    api = Hub()
    with pytest.raises(VlmExportError, match="outside"):
        push_folder(tmp_path, TARGET, api)  # type: ignore[arg-type]
    assert not api.asked


def test_a_token_that_may_only_read_and_a_foreign_owner_are_refused_before_any_work() -> None:
    api = Hub()
    with pytest.raises(BadInputError, match=r"you are me, and them is none of \['me', 'ours'\]"):
        check_target(HubTarget("them/x"), api)  # type: ignore[arg-type]
    assert check_target(HubTarget("ours/x"), api) == "me"  # type: ignore[arg-type]
    api.role = "read"
    with pytest.raises(BadInputError, match="may only read"):
        check_target(TARGET, api)  # type: ignore[arg-type]


@pytest.mark.parametrize("repo", ["a b/c", "me/", "just-a-name", "me/../x"])
def test_a_name_that_the_hub_does_not_take_is_refused_before_it_is_asked(repo: str) -> None:
    api = Hub()
    with pytest.raises(BadInputError, match=r"give owner/name"):
        check_target(HubTarget(repo), api)  # type: ignore[arg-type]
    assert not api.asked


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (LocalTokenNotFoundError(), BadInputError, "needs a token of the hub"),
        (http_error(403), BadInputError, r"refuses me/my-export \(403\): no; does the token"),
        (http_error(500), NotPossibleHereError, r"did not take me/my-export \(500\): no"),
        (ConnectionError("Name or service not known"), NotPossibleHereError, "cannot be reached: Name or service"),
    ],
)
def test_what_the_hub_says_becomes_one_line(error: Exception, kind: type[VlmExportError], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_target(TARGET, Hub(error))  # type: ignore[arg-type]


def test_without_a_token_nothing_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_api", lambda api: Hub(LocalTokenNotFoundError()))
    assert run(["onnx", "--model", "demo", "--out", str(tmp_path / "out"), "--push-to-hub", "me/x"]) == 2
    assert not list(tmp_path.iterdir())


def test_private_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gguf", "--model", "demo", "--out", str(tmp_path / "out"), "--private"]) == 2
    assert "--private is for --push-to-hub REPO" in capsys.readouterr().err


@pytest.mark.slow
def test_an_export_is_pushed_and_an_unjudged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Hub()
    monkeypatch.setattr(hub, "_api", lambda given: api)
    out = tmp_path / "out"
    fast = ["onnx", "--model", "demo", "--out", str(out), "--quant", "rtn", "--group-size", "32", "--no-verify"]
    assert run([*fast, "--push-to-hub", "me/x"]) == 2
    assert "--push-to-hub needs the gate" in capsys.readouterr().err
    assert not api.asked
    assert run(fast) == 0
    assert "The gate has not judged this export" in (out / "README.md").read_text()
    assert run(["push", str(out), "me/x"]) == 2
    assert "has not been judged" in capsys.readouterr().err
    assert run(["push", str(out), "me/x", "--unverified"]) == 0
    assert "Pushed to https://huggingface.co/me/my-export/commit/1" in capsys.readouterr().out
    sent = api.asked[-1][1]["operations"][-1].path_or_fileobj.decode()
    assert str(tmp_path) not in sent
    (out / "README.md").write_text("changed")
    assert run(["push", str(out), "me/x", "--unverified"]) == 2
    assert "was changed after the export" in capsys.readouterr().err


def test_the_proof_takes_its_place_in_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("\n".join(["before", *proof_section(None), "after"]))
    assert "has not judged" in (tmp_path / "README.md").read_text()
    for _ in range(2):
        write_proof(tmp_path, REPORT)
    text = (tmp_path / "README.md").read_text()
    assert "**passed** (1 checks passed, 1 not run)" in text
    assert "| same top token as the original model | 99.1 % |" in text
    assert "Not run: `runtime/provider`." in text
    assert "accuracy on the questions" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert text.count("## Proof") == 1
    json.dumps(REPORT)


def test_the_proof_of_several_precisions_has_a_row_for_each() -> None:
    other = {"status": "failed", "lowering": {"max_abs_logit": 0.5}, "quantization": {"kl": None, "top1": 0.5}}
    report = {**REPORT, "runtime": {"variants": {"q4": {k: REPORT[k] for k in other}, "int8": other}}}
    lines = proof_section(report)
    assert "| `q4` | passed | 2.3e-05 | 0.006 | 99.1 % |" in lines
    assert "| `int8` | failed | 0.5 |  | 50.0 % |" in lines


def test_lineage_is_valid_yaml_of_the_source(tmp_path: Path) -> None:
    header = "license: other\nlicense_name: x\nlanguage:\n- en\n- de\nbase_model: a/b\ntags:\n- secret\n"
    (tmp_path / "README.md").write_text(f"---\n{header}---\n# Hello\n")
    found = yaml.safe_load("\n".join(lineage(tmp_path / "README.md", str(tmp_path))))
    assert found == {"license": "other", "license_name": "x", "language": ["en", "de"], "base_model": "a/b"}
    found = yaml.safe_load("\n".join(lineage(tmp_path / "README.md", "owner/model@main")))
    assert (found["base_model"], found["base_model_relation"]) == ("owner/model", "quantized")
    (tmp_path / "README.md").write_text(f"---\n{header}---\n", encoding="utf-8-sig")
    assert yaml.safe_load("\n".join(lineage(tmp_path / "README.md", str(tmp_path))))["license"] == "other"
    (tmp_path / "README.md").write_text("---\n: : [\n---\n")
    assert lineage(tmp_path / "README.md", "demo") == []


def test_the_hub_reads_the_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n")
    data = ModelCard(card(tmp_path)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("onnx", "image-text-to-text", "apache-2.0")
    assert data.base_model == "some/model"
    assert {"onnx", "vlmexport"} <= set(data.tags)
