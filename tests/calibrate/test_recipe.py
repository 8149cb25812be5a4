"""Recipes: what `--calibration` may name, and refusals of what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlmexport.calibrate.recipe import RECIPE_VERSION, CalibrationOptions, Recipe, recipe_names, resolve_recipe
from vlmexport.errors import BadInputError


def resolve(source: str | Path, **values: object) -> Recipe:
    return resolve_recipe(CalibrationOptions(source=str(source), **values))  # type: ignore[arg-type]


def test_the_default_is_the_bundled_recipe_of_all_tasks() -> None:
    recipe = resolve_recipe(CalibrationOptions())
    assert (recipe.name, recipe.kind, recipe.samples, recipe.text_only) == ("synthetic", "procedural", 128, False)
    assert {"describe", "word", "count", "bars"} <= set(recipe.tasks)
    assert "synthetic" in recipe_names()


def test_options_override_the_recipe() -> None:
    recipe = resolve("synthetic", samples=7, seed=3, text_only=True, skip_unreadable=True)
    assert (recipe.samples, recipe.seed, recipe.text_only, recipe.skip_unreadable) == (7, 3, True, True)


def test_kinds_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "talk.jsonl").write_text("{}")
    assert resolve(tmp_path / "pictures").kind == "folder"
    assert resolve(tmp_path / "talk.jsonl").kind == "jsonl"
    hub = resolve("lmms-lab/some.set-2@refs/pr/1")
    assert (hub.kind, hub.source, hub.revision) == ("hub", "lmms-lab/some.set-2", "refs/pr/1")


def test_a_recipe_file_names_its_source_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('version = 1\nname = "mine"\nkind = "jsonl"\nsource = "talk.jsonl"\nseed = 5\n')
    recipe = resolve(tmp_path / "mine.toml")
    assert (recipe.source, recipe.seed) == (str(tmp_path / "talk.jsonl"), 5)


def test_to_dict_holds_every_field_and_the_version() -> None:
    data = Recipe("x", tasks=("word",)).to_dict()
    assert data["version"] == RECIPE_VERSION
    assert data["tasks"] == ["word"]
    assert Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k != "version"}) == Recipe(
        "x", tasks=("word",)
    )


@pytest.mark.parametrize("source", ["nope", "gone.jsonl", "some/gone.jsonl", "/no/such", "a/b/c", "./a/b"])
def test_an_unknown_source_lists_the_choices(source: str) -> None:
    with pytest.raises(BadInputError, match=r"no such file or folder.*synthetic.*name/dataset@revision"):
        resolve(source)


def test_a_path_below_a_folder_that_exists_is_no_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInputError, match="no such file or folder"):
        resolve("data/pictures")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("version = 1\nname = [", "not valid TOML"),
        ('version = 2\nname = "x"', "version 2"),
        ('version = 1\nname = "x"\nsample = 3', r"unknown keys \['sample'\]"),
        ("version = 1", r"missing keys \['name'\]"),
        ('version = 1\nname = "x"\ntasks = ["paint"]', r"unknown tasks \['paint'\]; choose of shape"),
        ('version = 1\nname = "x"\nsamples = 0', "samples is 0"),
        ('version = 1\nname = "x"\nsamples = "many"', "samples is 'many'; it must be an integer"),
        ('version = 1\nname = "x"\ntext_only = 1', "text_only is 1; it must be true or false"),
        ('version = 1\nname = "x"\nkind = "tape"', "kind is 'tape'; choose one of procedural"),
        ('version = 1\nname = "x"\nkind = "folder"', "needs a source"),
    ],
)
def test_a_bad_recipe_file_is_refused_with_the_reason(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "bad.toml").write_text(text)
    with pytest.raises(BadInputError, match=fault):
        resolve(tmp_path / "bad.toml")


def test_a_recipe_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInputError, match="not a readable text file"):
        resolve(tmp_path / "bad.toml")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"")
    with pytest.raises(BadInputError, match=r"must be a recipe \(\.toml\)"):
        resolve(tmp_path / "photo.png")
