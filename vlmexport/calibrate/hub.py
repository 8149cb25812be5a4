"""Datasets of the Hugging Face hub, streamed: images and conversations from columns of the usual names."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmexport.calibrate.conversation import Row, Turn, read_turns
from vlmexport.calibrate.recipe import Recipe
from vlmexport.errors import BadInputError, NotPossibleHereError

_IMAGE_COLUMNS = ("images", "image")
_TALK_COLUMNS = ("messages", "conversation", "conversations", "question")
_CAPTION_COLUMNS = ("caption", "captions", "text")
# Rows held while shuffling: a stream is never read to its end.
_SHUFFLE_ROWS = 1000


@dataclass(frozen=True)
class HubDataset:
    """A streamed part of a dataset; `revision` is the commit that was read (``""`` when the hub does not tell)."""

    recipe: Recipe
    revision: str
    stream: Iterable[Mapping[str, Any]]

    def rows(self) -> Iterator[Row]:
        """The rows with their images undecoded.

        Raises `BadInputError` naming the columns of a row without a known image column or conversation, and
        `NotPossibleHereError` when the hub goes out of reach.
        """
        try:
            for index, data in enumerate(self.stream):
                yield hub_row(data, f"{self.recipe.source}[{self.recipe.split}:{index}]", self.recipe.prompt)
        except (_http_error(), OSError) as error:
            raise NotPossibleHereError(_unreachable(self.recipe)) from error


def open_dataset(recipe: Recipe) -> HubDataset:
    """Open ``recipe.source`` at ``recipe.revision`` for streaming, shuffled by ``recipe.seed``.

    Raises `NotPossibleHereError` when the package `datasets` is missing or the hub cannot be reached, `BadInputError`
    when there is no such dataset, revision or split.
    """
    try:
        datasets: Any = importlib.import_module("datasets")  # optional, so type checkers need not find it
    except ImportError as error:
        raise NotPossibleHereError(
            f"--calibration {recipe.source}: hub datasets need the package `datasets`, which is not installed: "
            "pip install 'vlmexport[datasets]'"
        ) from error
    revision = _commit(recipe)
    try:
        stream = datasets.load_dataset(
            recipe.source, split=recipe.split, revision=revision or recipe.revision or None, streaming=True
        )
        shuffled = stream.decode(False).shuffle(seed=recipe.seed, buffer_size=_SHUFFLE_ROWS)
    except (_http_error(), ConnectionError) as error:
        raise NotPossibleHereError(_unreachable(recipe)) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise BadInputError(f"calibration dataset {recipe.source}: {' '.join(str(error).split())[:200]}") from error
    return HubDataset(recipe, revision, shuffled)


def _commit(recipe: Recipe) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = recipe.source
    try:
        return HfApi().dataset_info(name, revision=recipe.revision or None).sha or ""
    except GatedRepoError as error:
        raise BadInputError(f"{name} is gated on the hub: accept its terms there and run `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise BadInputError(f"dataset {name} has no revision {recipe.revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInputError(f"no such file or folder, and no such dataset on the hub: {name}") from error
    except (_http_error(), OSError) as error:
        raise NotPossibleHereError(_unreachable(recipe)) from error


def _http_error() -> type[Exception]:
    """The base of what the hub client's transport raises; which library that is, the client decides."""
    transport: Any = importlib.import_module("huggingface_hub.utils").httpx
    error: type[Exception] = transport.HTTPError
    return error


def _unreachable(recipe: Recipe) -> str:
    return f"no such file or folder: {recipe.source}; as a hub dataset it cannot be fetched, the hub is out of reach"


def hub_row(data: Mapping[str, Any], where: str, prompt: str) -> Row:
    """One row: images from ``image``/``images``, turns from a conversation, a question, or a caption after `prompt`.

    Raises `BadInputError` listing the row's columns when it has none of these.
    """
    column = next((name for name in _IMAGE_COLUMNS if data.get(name) is not None), None)
    if column is None:
        raise BadInputError(f"{where}: no column {' or '.join(_IMAGE_COLUMNS)}; it has {', '.join(data)}")
    found = data[column]
    images = tuple(_image(image, where) for image in (found if isinstance(found, list) else [found]))
    if any(data.get(name) is not None for name in _TALK_COLUMNS):
        present = {name: value for name, value in data.items() if value is not None}
        return Row(images, read_turns(present, where), where)
    caption = next((_caption(data[name]) for name in _CAPTION_COLUMNS if data.get(name)), None)
    if caption is None:
        wanted = ", ".join((*_TALK_COLUMNS, *_CAPTION_COLUMNS))
        raise BadInputError(f"{where}: none of the columns {wanted} holds a text; it has {', '.join(data)}")
    return Row(images, (Turn("user", prompt), Turn("assistant", caption)), where)


def _caption(value: Any) -> str | None:
    first = value[0] if isinstance(value, list) else value
    return first if isinstance(first, str) and first.strip() else None


def _image(image: Any, where: str) -> Path | bytes:
    """An undecoded image: its bytes, or where the file is."""
    if isinstance(image, dict) and isinstance(image.get("bytes"), bytes):
        return bytes(image["bytes"])
    path = image.get("path") if isinstance(image, dict) else None
    if isinstance(path, str):
        return Path(path)
    raise BadInputError(f"{where}: the image column holds {type(image).__name__}, not an image")
