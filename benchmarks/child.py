"""The measured side of `cost.py`: import, say so, wait, then run a module as ``python -m`` would.

Uses the standard library only: opponents run it with their own interpreter. SPEC is JSON: ``preload`` (modules to
import first), ``module`` or ``script``, and ``argv``.
"""

import importlib
import json
import runpy
import sys


def main() -> None:
    """Import what the program would import, report ready, and run it when told."""
    spec = json.loads(sys.argv[1])
    sys.path[:0] = spec.get("path", [])
    for name in spec["preload"]:
        importlib.import_module(name)
    print("ready", file=sys.stderr, flush=True)
    sys.stdin.readline()
    sys.argv = [spec.get("module") or spec["script"], *spec["argv"]]
    if spec.get("module"):
        runpy.run_module(spec["module"], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(spec["script"], run_name="__main__")


if __name__ == "__main__":
    main()
