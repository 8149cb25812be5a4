"""`python -m tools.train_fixture OUT` trains the bundled model by the fixed phases."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.train_fixture.design import PHASES
from tools.train_fixture.train import train


def main() -> None:
    """Train all phases, or the one asked for (from the checkpoint that is already at OUT), into a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--phase", type=int, choices=range(1, len(PHASES) + 1))
    options = parser.parse_args()
    numbers = [options.phase] if options.phase else range(1, len(PHASES) + 1)
    for number in numbers:
        train(PHASES[number - 1], options.out, start=options.out if number > 1 else None)


if __name__ == "__main__":
    main()
