"""What the export of each family's tiny checkpoint costs: CPU seconds of the split and of FP32 ONNX graphs, by family.

    python benchmarks/family_cost.py [FAMILY ...]

All families run in one process, so that imports are paid once (they are printed on a line of their own). The bar is
`BAR` CPU seconds a family. It counts what this process computed, and a busy machine adds to it: run it alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BAR = 15.0


def main() -> int:
    """Print a line for each family, the slowest last, and how many are within the bar."""
    import torch

    from tests.zoo import registry

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", help="those of `vlmexport families`; all by default")
    chosen = parser.parse_args().family or list(registry.entries())
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _measure(chosen[0], Path(folder) / "first")
        print(f"imports and tables that are made once: {time.process_time():.1f} CPU s", flush=True)
        found = {family: _measure(family, Path(folder) / family) for family in chosen}
    for family, costs in sorted(found.items(), key=lambda item: sum(item[1] or ())):
        print(f"{family:24s} {_line(costs)}")
    measured = [sum(costs) for costs in found.values() if costs]
    print(f"{sum(cost <= BAR for cost in measured)} of {len(measured)} within {BAR:.0f} CPU s")
    return 0


def _measure(family: str, folder: Path) -> tuple[float, float] | None:
    """CPU seconds of the split and of the export; None for a family that is refused."""
    from tests.zoo import registry
    from tests.zoo.measure import with_its_form
    from tests.zoo.proof import FLOATS, Zooed
    from vlmexport.errors import UnsupportedModelError
    from vlmexport.split.capture import split_model

    vlm, examples = registry.make(family, folder / "model")
    start = time.process_time()
    try:
        zooed = Zooed(vlm, split_model(vlm, examples), examples)
        split = time.process_time()
        with_its_form(zooed, FLOATS, folder / "onnx")
    except UnsupportedModelError:
        return None
    return split - start, time.process_time() - split


def _line(costs: tuple[float, float] | None) -> str:
    if costs is None:
        return "refused"
    return f"split {costs[0]:5.1f}  export {costs[1]:5.1f}  {'' if sum(costs) <= BAR else f'over {BAR:.0f}'}".rstrip()


if __name__ == "__main__":
    raise SystemExit(main())
