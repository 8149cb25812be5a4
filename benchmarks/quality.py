"""What each quantization method costs the bundled model and its outlier variant, on the frozen questions.

    python benchmarks/quality.py [--questions 300]

Teacher-forced in PyTorch (tests/quality.py): KL from the original per answer token, answers that are right from the
first token to the last, and CPU seconds of quantizing. Then the same with text-only calibration. See README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

METHODS = ("rtn", "hqq", "awq", "gptq", "awq+gptq")
FORMS = ((128, True), (32, True), (32, False))
TEXT_ONLY = ("awq", "gptq", "awq+gptq")


def main() -> int:
    """Measure both models and print one table each."""
    from tests.quality import Judge
    from vlmexport import demo
    from vlmexport.demo.variants import make_outlier_variant

    args = _arguments()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        variant = make_outlier_variant(demo.model_dir(), Path(folder) / "outlier")
        for name, model in (("bundled model", demo.model_dir()), ("outlier variant", variant)):
            judge = Judge(model, args.questions)
            report[name] = [measure(judge, *case) for case in _cases()]
            print_table(name, judge.original().accuracy, report[name])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


def _cases() -> list[tuple[str, int, bool, bool]]:
    cases = [(method, group, symmetric, False) for group, symmetric in FORMS for method in METHODS]
    cases = [case for case in cases if not (case[0] == "hqq" and case[2])]
    for method in ("nf4", "fp8", "smoothquant"):
        cases.append((method, 0, True, False))
    return cases + [(method, 128, True, True) for method in TEXT_ONLY]


def measure(judge: Any, method: str, group: int, symmetric: bool, text_only: bool) -> dict[str, Any]:
    """Quality and cost of one method; group 0 is the method's own."""
    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.quantize.scheme import QuantScheme, make_scheme

    scheme = make_scheme(method) if not group else QuantScheme(4, symmetric, group, method)
    start = time.process_time()
    weights = judge.weights(scheme, CalibrationOptions(text_only=text_only))
    cpu_s = time.process_time() - start
    form = f"{scheme.bits}-bit g{scheme.group_size} {'sym' if scheme.symmetric else 'asym'}"
    quality = asdict(judge.judge(weights))
    return {"method": method, "form": form, "text_only": text_only, "cpu_s": cpu_s, **quality}


def print_table(name: str, accuracy: float, rows: list[dict[str, Any]]) -> None:
    """One row per method."""
    print(f"\n{name}, original: {accuracy:.2%} right")
    print(f"{'method':22}{'form':18}{'KL':>12}{'top-1':>9}{'right':>9}{'CPU s':>8}")
    for row in rows:
        method = row["method"] + (" (text only)" if row["text_only"] else "")
        print(
            f"{method:22}{row['form']:18}{row['kl']:12.2e}{row['top1']:9.2%}{row['accuracy']:9.2%}{row['cpu_s']:8.1f}"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, help="about so many of the 1,300 (default: all)")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
