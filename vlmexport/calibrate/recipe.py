"""`CalibrationOptions` and `Recipe`: which samples the calibrated algorithms look at."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from vlmexport.errors import BadInputError

RECIPE_VERSION = 1
DEFAULT_SAMPLES = 128
NEUTRAL_PROMPT = "Describe the image in detail."

_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:@(?P<revision>[\w./-]+))?")
_FILE_SUFFIXES = {".toml", ".jsonl", ".json", ".csv", ".parquet", ".zip"}

Kind = Literal["procedural", "jsonl", "folder", "hub"]


@dataclass(frozen=True)
class CalibrationOptions:
    """The choices of ``--calibration``; None means the recipe's own value.

    `source` is the name of a bundled recipe (``calibration/*.toml``), a recipe file, a JSON Lines file of images and
    conversations, a folder of images, or a dataset of the hub (``name/dataset@revision``). `samples` is how many are
    taken, `seed` which; `text_only` leaves every image out (worse for a vision-language model: it warns);
    `skip_unreadable` leaves out images that cannot be read instead of refusing them.
    """

    source: str = "synthetic"
    samples: int | None = None
    seed: int | None = None
    text_only: bool = False
    skip_unreadable: bool = False


@dataclass(frozen=True)
class Recipe:
    """What to calibrate on, complete and checked.

    `kind` says where the samples come from: drawn here (`tasks` of `vlmexport.calibrate.synthetic`, all when empty), or
    read from `source`: a JSON Lines file, a folder of images (each with `prompt`), or a hub dataset's part `split` at
    `revision`.
    `samples` are taken in an order that `seed` decides (a larger number continues a smaller one's list); `batch_size`
    samples go through the vision side at once; a sample of more than `max_tokens` tokens loses its last turns.

    Raises `BadInputError` naming the value that cannot be used.
    """

    name: str
    kind: Kind = "procedural"
    source: str = ""
    revision: str = ""
    split: str = "train"
    prompt: str = NEUTRAL_PROMPT
    tasks: tuple[str, ...] = ()
    samples: int = DEFAULT_SAMPLES
    seed: int = 0
    batch_size: int = 8
    max_tokens: int = 2048
    text_only: bool = False
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(self.name, field.name, getattr(self, field.name))
        if self.kind not in get_args(Kind):
            choices = ", ".join(get_args(Kind))
            raise BadInputError(f"calibration recipe {self.name}: kind is {self.kind!r}; choose one of {choices}")
        if self.tasks:
            _check_tasks(self.name, self.tasks)
        for key, least in (("samples", 1), ("seed", 0), ("batch_size", 1), ("max_tokens", 1)):
            if getattr(self, key) < least:
                raise BadInputError(
                    f"calibration recipe {self.name}: {key} is {getattr(self, key)}; the least is {least}"
                )
        if self.kind != "procedural" and not self.source:
            raise BadInputError(f"calibration recipe {self.name}: kind {self.kind!r} needs a source")

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON data, with its version: what the manifest records."""
        data = {**dataclasses.asdict(self), "tasks": list(self.tasks)}
        return {"version": RECIPE_VERSION, **data}


_INTEGERS = {"samples", "seed", "batch_size", "max_tokens"}
_SWITCHES = {"text_only", "skip_unreadable"}


def _check_type(recipe: str, key: str, value: object) -> None:
    if key == "tasks":
        fits, wanted = isinstance(value, tuple) and all(isinstance(v, str) for v in value), "a list of texts"
    elif key in _INTEGERS:
        fits, wanted = isinstance(value, int) and not isinstance(value, bool), "an integer"
    elif key in _SWITCHES:
        fits, wanted = isinstance(value, bool), "true or false"
    else:
        fits, wanted = isinstance(value, str), "a text"
    if not fits:
        raise BadInputError(f"calibration recipe {recipe}: {key} is {value!r}; it must be {wanted}")


def _check_tasks(recipe: str, tasks: tuple[str, ...]) -> None:
    from vlmexport.calibrate.synthetic import TASKS  # imports Pillow, which `--help` does without

    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise BadInputError(f"calibration recipe {recipe}: unknown tasks {unknown}; choose of {', '.join(TASKS)}")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))


def resolve_recipe(options: CalibrationOptions) -> Recipe:
    """The recipe that `options` ask for.

    Raises `BadInputError` for a source that is none of the five kinds (listing the bundled recipes), for a path that
    does not exist, and for a recipe file with unknown keys or values that cannot be used.
    """
    given = {"samples": options.samples, "seed": options.seed}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for switch in sorted(_SWITCHES):
        if getattr(options, switch):
            changes[switch] = True
    return dataclasses.replace(_find(options.source), **changes)


def _find(source: str) -> Recipe:
    if source in recipe_names():
        return read_recipe((_folder() / f"{source}.toml").read_text(encoding="utf-8"), source, None)
    path = Path(source)
    if path.is_dir():
        return Recipe(name=path.name or "folder", kind="folder", source=source)
    if path.suffix == ".toml" and path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BadInputError(f"--calibration {source}: not a readable text file: {error}") from error
        return read_recipe(text, source, path.parent)
    if path.suffix == ".jsonl" and path.is_file():
        return Recipe(name=path.stem, kind="jsonl", source=source)
    if path.is_file():
        raise BadInputError(
            f"--calibration {source}: a file must be a recipe (.toml) or images with conversations (.jsonl)"
        )
    return _hub_recipe(source)


def _hub_recipe(source: str) -> Recipe:
    """A source that is no path here: ``name/dataset`` or ``name/dataset@revision``, if it looks like one."""
    match = _HUB_ID.fullmatch(source)
    if match is None or Path(source).parent.is_dir() or Path(source).suffix in _FILE_SUFFIXES:
        raise BadInputError(
            f"--calibration {source}: no such file or folder, nor a recipe; choose {', '.join(recipe_names())}, "
            "a recipe file, a .jsonl file, a folder of images, or a hub dataset (name/dataset@revision)"
        )
    return Recipe(name=match["name"], kind="hub", source=match["name"], revision=match["revision"] or "")


def read_recipe(text: str, origin: str, folder: Path | None) -> Recipe:
    """Parse a recipe file's TOML strictly; `origin` names it in errors, relative sources are relative to `folder`.

    Raises `BadInputError` for what is not TOML, unknown keys, another version, and values of the wrong type.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInputError(f"calibration recipe {origin} is not valid TOML: {error}") from error
    version = data.pop("version", None)
    if version != RECIPE_VERSION:
        raise BadInputError(f"calibration recipe {origin} has version {version}; this vlmexport reads {RECIPE_VERSION}")
    known = {f.name for f in dataclasses.fields(Recipe)}
    unknown = sorted(data.keys() - known)
    if unknown or "name" not in data:
        missing = [] if "name" in data else ["name"]
        raise BadInputError(
            f"calibration recipe {origin}: unknown keys {unknown}, missing keys {missing}; known: {sorted(known)}"
        )
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    recipe = Recipe(**values)
    if folder is None or recipe.kind not in ("jsonl", "folder"):
        return recipe
    return dataclasses.replace(recipe, source=str(folder / recipe.source))


def _folder() -> Any:
    try:
        return resources.files("vlmexport.calibration")
    except ModuleNotFoundError as error:
        raise BadInputError("the calibration recipes are not installed; run `pip install -e .`") from error
