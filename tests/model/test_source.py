from pathlib import Path

import pytest

from vlmexport.demo import model_dir
from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.model.source import resolve_source


def test_demo_is_the_bundled_model() -> None:
    assert resolve_source("demo") == model_dir()


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["/no/such/folder", "./nope", "nope", "a/b/c", "../x/y@z"])
def test_a_missing_folder_is_named(source: str) -> None:
    with pytest.raises(BadInputError, match="no such folder: " + source.replace(".", r"\.")):
        resolve_source(source)


def test_a_missing_child_of_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(BadInputError, match="no such folder: models/nope"):
        resolve_source("models/nope")


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(BadInputError, match="is a file"):
        resolve_source(str(file))


@pytest.mark.parametrize(("trust", "code"), [(False, False), (True, True)])
def test_the_hub_is_asked_for_data_files_only(monkeypatch: pytest.MonkeyPatch, trust: bool, code: bool) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def download(repo: str, **kwargs: object) -> str:
        asked.update(kwargs, repo=repo)
        return "/cache"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_source("org/model@v1.0", trust_remote_code=trust) == Path("/cache")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert (asked["repo"], asked["revision"]) == ("org/model", "v1.0")
    assert ("*.py" in patterns) == code
    assert not {"*.bin", "*.pt", "*.pth", "*"} & set(patterns)


def test_offline_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args: object, **_kwargs: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(NotPossibleHereError, match="hub cannot be reached"):
        resolve_source("org/model")
