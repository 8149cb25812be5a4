"""`python -m tools.train_fixture OUT` trains the bundled model by the fixed schedule."""

from __future__ import annotations

import argparse
from pathlib import Path

from tools.train_fixture.design import Schedule
from tools.train_fixture.train import train


def main() -> None:
    """Parse the output folder and, for trials, another number of steps."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("--rows", type=int, default=Schedule.rows)
    options = parser.parse_args()
    train(Schedule(steps=options.steps, rows=options.rows), options.out)


if __name__ == "__main__":
    main()
