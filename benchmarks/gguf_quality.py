"""What the types of a GGUF export cost the bundled model and its outlier variant, in the real llama.cpp.

    python benchmarks/gguf_quality.py [--questions 300]

Every row is exported by ``vlmexport gguf`` and answers the frozen questions with their pictures, teacher-forced
(tests/gguf_quality.py): KL from the PyTorch model in float32 per answer token with its standard error (a few tokens
make most of it) and median, answers that are right from the first token to the last, bits per weight of the text file
and CPU seconds of the export with its calibration. See README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Measure both models and print one table each."""
    from tests.gguf_quality import LlamaJudge
    from vlmexport import demo
    from vlmexport.demo.variants import make_outlier_variant

    args = _arguments()
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        variant = make_outlier_variant(demo.model_dir(), Path(folder) / "outlier")
        for name, model in (("bundled model", demo.model_dir()), ("outlier variant", variant)):
            judge = LlamaJudge(model, args.questions)
            print(f"\n{name}: PyTorch has {judge.original().accuracy:.2%} of {len(judge.items)} questions right")
            print(f"{'export':36}{'KL':>11}{'+-':>10}{'median':>10}{'top-1':>9}{'right':>9}{'bits':>7}{'CPU s':>8}")
            report[name] = [measure(judge, title, *case) for title, case in _cases().items()]
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


def _cases() -> dict[str, tuple[Any, Any]]:
    """Options of the export and of its calibration, by what the table calls them."""
    from tests.gguf_quality import coded
    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.gguf_options import GgufOptions

    text_only = CalibrationOptions(text_only=True)
    return {
        "F32": (GgufOptions("F32", "F32", "none"), None),
        "F16": (GgufOptions("F16", imatrix="none"), None),
        "Q4_0 of ggml": (GgufOptions("Q4_0", imatrix="none"), None),
        "Q4_0, our imatrix": (GgufOptions("Q4_0"), None),
        "Q4_0 by rtn": (coded("rtn"), None),
        "Q4_0 by gptq": (coded("gptq"), None),
        "Q4_0 by awq+gptq": (coded("awq+gptq"), None),
        "Q4_1 by rtn": (coded("rtn", False), None),
        "Q4_1 by awq+gptq": (coded("awq+gptq", False), None),
        "Q8_0 by awq+gptq": (coded("awq+gptq", bits=8), None),
        "Q4_K_M, no imatrix": (GgufOptions(imatrix="none"), None),
        "Q4_K_M, our imatrix": (GgufOptions(), None),
        "Q4_K_M, imatrix of text alone": (GgufOptions(), text_only),
        "Q4_K_M --smooth awq, no imatrix": (GgufOptions(smooth="awq", imatrix="none"), None),
        "Q4_K_M --smooth awq, our imatrix": (GgufOptions(smooth="awq"), None),
    }


def measure(judge: Any, title: str, options: Any, calibration: Any) -> dict[str, Any]:
    """Export, judge and print one row."""
    start = time.process_time()
    made = judge.export(options, calibration)
    row = {
        "export": title,
        "kl": made.quality.kl,
        "kl_error": float(made.kl.std() / len(made.kl) ** 0.5),
        "kl_median": float(sorted(made.kl)[len(made.kl) // 2]),
        "top1": made.quality.top1,
        "accuracy": made.quality.accuracy,
        "bits_per_weight": made.bits,
        "cpu_s": made.export_cpu_s,
        "cpu_s_with_answers": time.process_time() - start,
    }
    print(
        f"{title:36}{row['kl']:11.2e}{row['kl_error']:10.1e}{row['kl_median']:10.1e}{row['top1']:9.2%}"
        f"{row['accuracy']:9.2%}{row['bits_per_weight']:7.2f}{row['cpu_s']:8.1f}",
        flush=True,
    )
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, help="about so many of the 1,300 (default: all)")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
