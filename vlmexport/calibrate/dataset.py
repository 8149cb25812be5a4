"""Calibration samples: pictures with conversations, from the five kinds of source that a recipe may name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from vlmexport.calibrate.conversation import Turn
from vlmexport.calibrate.recipe import Recipe
from vlmexport.errors import BadInputError
from vlmexport.runtime.prompt import load_image, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class CalibrationSample:
    """Pictures and the conversation about them; the pictures stand first in the first user turn.

    `images` are files, the bytes of files, or drawn pictures: a large set is decoded one batch at a time.
    `source` names the sample in errors and reports.
    """

    images: tuple[Path | bytes | Image, ...]
    messages: tuple[Turn, ...]
    source: str

    def pictures(self) -> list[Image]:
        """The pictures as upright RGB; raises `BadInputError` naming the one that cannot be read."""
        return [_open(image, self.source) for image in self.images]


@dataclass(frozen=True)
class CalibrationSet:
    """The samples that a recipe gives; `skipped` names those with unreadable images, `revision` is the hub's commit.

    `notes` are lines for people: what differs from what was asked for.
    """

    recipe: Recipe
    samples: tuple[CalibrationSample, ...]
    skipped: tuple[str, ...] = ()
    revision: str = ""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What the manifest records of the samples."""
        return {
            "recipe": self.recipe.to_dict(),
            "samples": len(self.samples),
            "skipped": list(self.skipped),
            "revision": self.revision,
            "notes": list(self.notes),
        }


def load_samples(recipe: Recipe) -> CalibrationSet:
    """The samples of `recipe`, checked: every image was decoded once.

    All there are when there are fewer than asked for (a note says so). Raises `BadInputError` for an empty set, an
    unreadable image (unless the recipe skips them), a line or a dataset of an unknown shape, and
    `NotPossibleHereError` when a hub dataset cannot be fetched here.
    """
    revision = ""
    if recipe.kind == "procedural":
        candidates: Iterator[CalibrationSample] = draw_samples(recipe)
    elif recipe.kind == "hub":
        from vlmexport.calibrate.hub import open_dataset

        dataset = open_dataset(recipe)
        revision = dataset.revision
        candidates = (CalibrationSample(row.images, row.messages, row.source) for row in dataset.rows())
    else:
        candidates = iter(_shuffled(_files(recipe), recipe.seed))
    samples, skipped = _readable(candidates, recipe)
    if not samples:
        reason = f"all {len(skipped)} have unreadable images" if skipped else "it holds none"
        raise BadInputError(f"calibration source {recipe.source or recipe.name} gives no samples: {reason}")
    return CalibrationSet(recipe, tuple(samples), tuple(skipped), revision, tuple(_notes(recipe, samples, skipped)))


def draw_samples(recipe: Recipe) -> Iterator[CalibrationSample]:
    """Endless drawn samples: of each scene the question whose task has come up least so far, with its answer."""
    from vlmexport.calibrate.synthetic import CALIBRATION_SEEDS, TASKS, scene

    tasks = recipe.tasks or TASKS
    drawn: Counter[str] = Counter()
    start = Random(f"calibration {recipe.seed}").randrange(len(CALIBRATION_SEEDS))
    for step in range(len(CALIBRATION_SEEDS)):
        seed = CALIBRATION_SEEDS[(start + step) % len(CALIBRATION_SEEDS)]
        picture = scene(seed)
        asked = [question for question in picture.questions if question.task in tasks]
        if not asked:
            continue
        chosen = min(asked, key=lambda question: drawn[question.task])
        drawn[chosen.task] += 1
        turns = (Turn("user", chosen.text), Turn("assistant", chosen.answer))
        yield CalibrationSample((picture.image,), turns, f"{recipe.name}[{seed}]")


def _files(recipe: Recipe) -> list[CalibrationSample]:
    if recipe.kind == "folder":
        return _folder_samples(recipe)
    from vlmexport.calibrate.conversation import read_json_lines

    return [CalibrationSample(row.images, row.messages, row.source) for row in read_json_lines(Path(recipe.source))]


def _folder_samples(recipe: Recipe) -> list[CalibrationSample]:
    folder = Path(recipe.source)
    if not folder.is_dir():
        raise BadInputError(f"calibration recipe {recipe.name}: no such folder: {folder}")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise BadInputError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [CalibrationSample((file,), (Turn("user", recipe.prompt),), str(file)) for file in files]


def _shuffled(samples: Sequence[CalibrationSample], seed: int) -> list[CalibrationSample]:
    """The samples in the order of `seed`, the same whatever number is taken of them."""
    return Random(f"calibration {seed}").sample(list(samples), len(samples))


def _readable(candidates: Iterator[CalibrationSample], recipe: Recipe) -> tuple[list[CalibrationSample], list[str]]:
    """The first ``recipe.samples`` whose images can be read, and the names of those left out on the way."""
    samples: list[CalibrationSample] = []
    skipped: list[str] = []
    for sample in candidates:
        try:
            if not recipe.text_only:
                sample.pictures()
        except BadInputError as error:
            fault = str(error) if sample.source in str(error) else f"{sample.source}: {error}"
            if not recipe.skip_unreadable:
                raise BadInputError(f"{fault}; --skip-unreadable leaves such images out of the calibration") from error
            skipped.append(fault)
            continue
        samples.append(sample)
        if len(samples) == recipe.samples:
            break
    return samples, skipped


def _notes(recipe: Recipe, samples: Sequence[CalibrationSample], skipped: Sequence[str]) -> Iterator[str]:
    if len(samples) < recipe.samples:
        yield f"{recipe.samples} calibration samples were asked for; there are {len(samples)}, and all are used"
    if skipped:
        yield f"{len(skipped)} calibration samples were left out because an image cannot be read: {skipped[0]}"
    if recipe.text_only:
        yield "calibrated on text only: what image tokens need was not seen, so answers about images suffer most"


def _open(image: Path | bytes | Image, source: str) -> Image:
    if isinstance(image, Path):
        return load_image(image)
    if isinstance(image, bytes):
        return read_image(BytesIO(image), source)
    return image
