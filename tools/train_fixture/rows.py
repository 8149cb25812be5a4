"""Training rows: a picture (or two), then several questions that share it and do not see each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from PIL import Image
from transformers import Idefics3Processor

from tools.train_fixture.design import TILE, Schedule
from vlmexport.calibrate.synthetic import TRAIN_SEEDS, Question, Scene, scene

IGNORED = -100
LINE_LENGTH = 192
VALIDATION_SEEDS = TRAIN_SEEDS[-10_000:]


@dataclass(frozen=True)
class Batch:
    """Tensors of B lines, each holding one or more rows that do not see each other, padded to L tokens.

    Attributes:
        ids: int64 [B, L]; padding tokens look at nothing but themselves.
        positions: int64 [B, L]; every question restarts behind the pictures.
        labels: int64 [B, L], the token that follows, `IGNORED` outside answers.
        mask: float32 [B, 1, L, L], 0 where a token may look, else the lowest float.
        pixels: float32 [T, 3, 32, 32], all tiles of all rows in order.
        answers: per question (line, first position, last position + 1, task) of its labels.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    pixels: torch.Tensor
    answers: list[tuple[int, int, int, str]]


@dataclass(frozen=True)
class Row:
    """One row before packing; `segment` is 0 for the shared prefix, then 1, 2, … per question."""

    ids: list[int]
    positions: list[int]
    labels: list[int]
    segment: list[int]
    tiles: list[np.ndarray]
    answers: list[tuple[int, int, str]]


class RowMaker:
    """Turns scenes into rows with the same tokens and pixels that the processor gives."""

    def __init__(self, processor: Idefics3Processor, schedule: Schedule) -> None:
        self._tokenizer = processor.tokenizer
        self._schedule = schedule
        self._opening = self._encode("<|im_start|>User:")
        self._blocks = {size: self._encode(self._block(processor, *size)) for size in ((1, 2), (2, 1), (2, 2))}

    def batch(self, step: int, rank: int) -> Batch:
        """Return the rows of this step and process; no seed is ever used twice."""
        plan = self._schedule
        first = TRAIN_SEEDS.start + (step * plan.ranks + rank) * plan.rows * 2
        return self.collate([self._row(first + 2 * index) for index in range(plan.rows)])

    def validation(self, count: int) -> Batch:
        """Return `count` single-picture rows with all their questions, from seeds that are never trained on."""
        return self.collate(
            [self._single(scene(seed, self._schedule.mix), 99, Random(seed)) for seed in VALIDATION_SEEDS[:count]]
        )

    def _row(self, seed: int) -> Row:
        rng = Random(f"row {seed} {self._schedule.seed}")
        mix = self._schedule.mix
        if rng.random() < self._schedule.pair_share:
            return self._pair(scene(seed, mix), scene(seed + 1, mix), rng)
        return self._single(scene(seed, mix), self._schedule.questions_per_row, rng)

    def _single(self, picture: Scene, limit: int, rng: Random) -> Row:
        return self.row([picture.image], _pick(picture, limit, rng, ""))

    def _pair(self, first: Scene, second: Scene, rng: Random) -> Row:
        asked = _pick(first, 2, rng, "First image: ") + _pick(second, 2, rng, "Second image: ")
        return self.row([first.image, second.image], asked)

    def row(self, images: list[Image.Image], asked: list[Question]) -> Row:
        """Return the row of these pictures (native sizes only) and questions."""
        ids = list(self._opening)
        tiles: list[np.ndarray] = []
        for image in images:
            ids += self._blocks[(image.height // TILE, image.width // TILE)]
            tiles += cut_tiles(image)
        shared = len(ids)
        row = Row(ids, list(range(shared)), [IGNORED] * shared, [0] * shared, tiles, [])
        for number, question in enumerate(asked, start=1):
            ask = self._encode(f"{question.text}<end_of_utterance>\nAssistant:")
            reply = self._encode(f"{question.answer}<end_of_utterance>")
            start = len(row.ids) + len(ask) - 1
            # The last token of an answer predicts nothing, so it is not fed.
            row.ids.extend(ask + reply[:-1])
            row.labels.extend([IGNORED] * (len(ask) - 1) + reply)
            row.positions.extend(range(shared, shared + len(ask) + len(reply) - 1))
            row.segment.extend([number] * (len(ask) + len(reply) - 1))
            row.answers.append((start, start + len(reply), question.task))
        return row

    def collate(self, rows: list[Row]) -> Batch:
        """Pack rows into lines and pad those on the right to a multiple of eight tokens."""
        lines = pack(rows, max(LINE_LENGTH, *(len(row.ids) for row in rows)))
        length = -(-max(sum(len(row.ids) for row in line) for line in lines) // 8) * 8
        owner = _lay(length, -1, [[[number] * len(row.ids) for number, row in enumerate(line)] for line in lines])
        segment = _lay(length, -1, [[row.segment for row in line] for line in lines])
        visible = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
        visible &= (owner[:, :, None] == owner[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
        mask = torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)
        return Batch(
            ids=_lay(length, self._tokenizer.pad_token_id, [[row.ids for row in line] for line in lines]),
            positions=_lay(length, 0, [[row.positions for row in line] for line in lines]),
            labels=_lay(length, IGNORED, [[row.labels for row in line] for line in lines]),
            mask=mask[:, None],
            pixels=torch.from_numpy(np.stack([tile for line in lines for row in line for tile in row.tiles])),
            answers=[answer for number, line in enumerate(lines) for answer in _located(number, line)],
        )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    @staticmethod
    def _block(processor: Idefics3Processor, rows: int, columns: int) -> str:
        return processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)


def cut_tiles(image: Image.Image) -> list[np.ndarray]:
    """Return the tiles of a picture and, last, its overview: float32 [3, 32, 32] in -1..1, as the processor does."""
    boxes = [
        (left, top, left + TILE, top + TILE)
        for top in range(0, image.height, TILE)
        for left in range(0, image.width, TILE)
    ]
    parts = [image.crop(box) for box in boxes]
    parts.append(image.resize((TILE, TILE), Image.Resampling.LANCZOS))
    return [np.asarray(part, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1 for part in parts]


def _pick(picture: Scene, limit: int, rng: Random, opening: str) -> list[Question]:
    chosen = rng.sample(picture.questions, min(limit, len(picture.questions)))
    return [Question(question.task, opening + question.text, question.answer) for question in chosen]


def pack(rows: list[Row], length: int) -> list[list[Row]]:
    """Put rows into as few lines of at most `length` tokens as first-fit by falling length finds."""
    lines: list[list[Row]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        fitting = next((index for index, free in enumerate(room) if free >= len(row.ids)), None)
        if fitting is None:
            lines.append([])
            room.append(length)
            fitting = len(lines) - 1
        lines[fitting].append(row)
        room[fitting] -= len(row.ids)
    return lines


def _located(number: int, line: list[Row]) -> Iterator[tuple[int, int, int, str]]:
    start = 0
    for row in line:
        yield from ((number, start + first, start + stop, task) for first, stop, task in row.answers)
        start += len(row.ids)


def _lay(length: int, fill: int, lines: list[list[list[int]]]) -> torch.Tensor:
    """Return int64 [lines, length]: each line's parts end to end, then `fill`."""
    flat = [[value for part in line for value in part] for line in lines]
    return torch.tensor([values + [fill] * (length - len(values)) for values in flat])
