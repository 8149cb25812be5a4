"""Freeze the held-out questions as PNG and JSON Lines, from the test seeds only."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

from PIL import Image

from tools.train_fixture.design import PHASES, check_seeds
from vlmexport.calibrate.synthetic import TASKS, TEST_SEEDS, TRAIN_SEEDS, scene

PER_TASK = 130


def freeze(out: Path, tasks: tuple[str, ...], per_task: int) -> int:
    """Write `questions.jsonl` and `images/` to `out` and return the number of questions.

    Pictures are kept in seed order while one of their tasks lacks questions. A picture that training has drawn pixel
    for pixel is left out.
    """
    check_seeds()
    trained = trained_pictures()
    shutil.rmtree(out, ignore_errors=True)
    (out / "images").mkdir(parents=True)
    wanted = Counter(dict.fromkeys(tasks, per_task))
    lines: list[str] = []
    for number, seed in enumerate(TEST_SEEDS):
        if not any(wanted.values()):
            break
        picture = scene(seed)
        if fingerprint(picture.image) in trained:
            continue
        found = [question for question in picture.questions if wanted[question.task] > 0]
        if not found:
            continue
        name = f"images/{number:04d}.png"
        picture.image.save(out / name, optimize=True)
        for question in found:
            if wanted[question.task] > 0:
                wanted[question.task] -= 1
                entry = {"image": name, "task": question.task, "question": question.text, "answers": [question.answer]}
                lines.append(json.dumps(entry))
    (out / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def trained_pictures() -> set[bytes]:
    """Return the fingerprints of every picture that training can draw."""
    found = set()
    for phase in PHASES:
        per_step = 2 * phase.ranks * phase.rows
        seeds = TRAIN_SEEDS[phase.first_step * per_step : (phase.first_step + phase.steps) * per_step]
        found |= {fingerprint(scene(seed, phase.mix).image) for seed in seeds}
    return found


def fingerprint(image: Image.Image) -> bytes:
    """Return a digest of size and pixels."""
    return hashlib.blake2b(image.tobytes(), digest_size=12, salt=f"{image.width}x{image.height}".encode()).digest()


def main() -> None:
    """Freeze the questions into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--per-task", type=int, default=PER_TASK)
    options = parser.parse_args()
    print(freeze(options.out, tuple(options.tasks), options.per_task), "questions")


if __name__ == "__main__":
    main()
