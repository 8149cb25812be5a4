"""Measure every family on every target and write ``vlmexport/families/support.json`` (about 10 minutes on 2 cores).

``python tools/measure_families.py [FAMILY...]``: all of them, or the named ones, the others staying as they are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.zoo.measure import FAMILIES, measure  # noqa: E402

TABLE = ROOT / "vlmexport" / "families" / "support.json"


def main(names: list[str]) -> None:
    """Write the table after every family, so that an interruption keeps what was measured."""
    for family in names or FAMILIES:
        with tempfile.TemporaryDirectory(prefix="vlmexport-") as folder:
            verdicts = measure(family, Path(folder))
        print(family, {target: verdict["state"] for target, verdict in verdicts.items()}, flush=True)
        table = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.is_file() else {}
        table = {name: known for name, known in {**table, family: verdicts}.items() if name in FAMILIES}
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
