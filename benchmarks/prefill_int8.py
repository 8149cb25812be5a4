"""Prompts by INT8 products (``--prefill int8``) against the plain INT4 export, genai's INT4 graph and PyTorch BF16.

    python benchmarks/prefill_int8.py --threads 2

The model and the opponents are those of decode_vs_genai.py. All take turns in one run, each in its own process, and
every ratio is the median over neighbouring rounds. See README.md for the bars.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from decode_vs_genai import measure
from genai import NotRun, build
from models import ROOT, SMALL, make_models

# What is measured, against whom, and the least ratio of ours to theirs (speeds: more is better).
BARS = (
    ("prefill_tok_s", "genai", 2.5),
    ("prefill_tok_s", "pytorch_bf16", 1 / 1.4),
    ("prefill_tok_s", "int4", 1.0),
    ("decode_tok_s", "int4", 0.92),
)


def main() -> int:
    """Build what is missing, measure, print the table and the ratios; 1 when a bar is missed with --strict."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    models = make_models(SMALL, args.work)
    specs = {
        "int8": {"kind": "vlmexport", "path": str(_export(models.vlm, args.work / "export-256m-prefill", "int8"))},
        "int4": {"kind": "vlmexport", "path": str(_export(models.vlm, args.work / "export-256m", "same"))},
    }
    try:
        specs["genai"] = {"kind": "genai", "path": str(build(args.work, models.llama, args.work / "genai-256m"))}
    except NotRun as reason:
        print(f"genai: not run: {reason}")
    specs["pytorch_bf16"] = {"kind": "pytorch", "path": str(models.llama), "dtype": "bfloat16"}
    common = {"threads": args.threads, "prompt": args.prompt, "tokens": args.tokens}
    results = measure({name: {**spec, **common} for name, spec in specs.items()}, args.rounds)
    _print_table(results, args)
    verdicts = judge(results)
    if args.json:
        args.json.write_text(json.dumps({"results": results, "bars": verdicts, "settings": common}, indent=1))
    return int(args.strict and any(v["passed"] is False for v in verdicts))


def judge(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every bar with its ratio, round against neighbouring round; `passed` is None where the opponent was not run."""
    verdicts: list[dict[str, Any]] = []
    for key, opponent, bar in BARS:
        ratio = None
        if opponent in results:
            pairs = zip(results["int8"][key], results[opponent][key], strict=True)
            ratio = median(ours / theirs for ours, theirs in pairs)
        passed = None if ratio is None else ratio >= bar
        verdicts.append({"bar": f"{key} vs {opponent}", "ratio": ratio, "at_least": bar, "passed": passed})
        word = {None: "not run", True: "ok", False: "MISSED"}[passed]
        print(f"{key} vs {opponent}: {'-' if ratio is None else f'{ratio:.2f}x'} (bar {bar:.2f}x) {word}")
    return verdicts


def _print_table(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    print(f"prompt {args.prompt}, {args.tokens} steps, {args.threads} threads, {args.rounds} rounds")
    print(f"{'':14}{'prefill tok/s':>15}{'decode tok/s':>15}{'peak RSS MB':>15}")
    for name, values in results.items():
        prefill, decode = median(values["prefill_tok_s"]), median(values["decode_tok_s"])
        print(f"{name:14}{prefill:15.1f}{decode:15.1f}{values['peak_rss_mb']:15.1f}")


def _export(vlm: Path, out: Path, prefill: str) -> Path:
    if not (out / "manifest.json").is_file():
        options = ["--model", str(vlm), "--out", str(out), "--no-verify", "--quant", "rtn", "--quiet", "--force"]
        command = [sys.executable, "-m", "vlmexport", "onnx", *options, "--prefill", prefill]
        subprocess.run(command, check=True, cwd=ROOT)
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "benchmarks", help="models and exports are kept here"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512, help="prompt length in tokens")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps per round")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
