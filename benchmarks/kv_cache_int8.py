"""``--kv-cache int8`` against the plain cache: what it costs in quality and what it gains in speed and memory.

    python benchmarks/kv_cache_int8.py --threads 2

Quality: the gate's report on the bundled model and its outlier variant, weights unquantized so that the cache is the
only loss. Speed: a random model of SmolVLM-256M's text dimensions with INT4 weights, both caches in turns in one run,
each in its own process. See README.md for the bars.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from decode_vs_genai import measure
from models import ROOT, SMALL, make_models

CACHES = ("same", "int8")
KL_BAR = 1e-3  # nats per token
ACCURACY_BAR = 0.01
MEMORY_BAR = 0.26  # of the bytes of FP32
SPEED_BAR = 1.0


def main() -> int:
    """Measure both questions, print them; 1 when a bar is missed with --strict."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"quality": quality(args.work), "speed": speed(args)}
    verdicts = judge(found)
    if args.json:
        args.json.write_text(json.dumps({**found, "bars": verdicts}, indent=1))
    return int(args.strict and not all(v["passed"] for v in verdicts))


def quality(work: Path) -> list[dict[str, Any]]:
    """One row per model and cache: KL in nats per token, share of equal top tokens, accuracy on all questions."""
    from vlmexport.demo import model_dir
    from vlmexport.demo.variants import make_outlier_variant

    outlier = work / "outlier"
    if not (outlier / "config.json").is_file():
        make_outlier_variant(model_dir(), outlier)
    rows = []
    print(f"{'model':10}{'cache':8}{'KL':>12}{'top1':>10}{'accuracy':>10}{'original':>10}")
    for name, model in (("bundled", model_dir()), ("outlier", outlier)):
        for cache in CACHES:
            row = {"model": name, "cache": cache, **_gate(model, cache)}
            rows.append(row)
            print(
                f"{name:10}{cache:8}{row['kl']:12.2e}{row['top1']:10.4f}"
                f"{_share(row['accuracy']):>10}{_share(row['reference_accuracy']):>10}"
            )
    return rows


def _gate(model: Path, cache: str) -> dict[str, Any]:
    """The quantization numbers of an export with unquantized weights; questions are the bundled model's own."""
    from vlmexport.demo import questions_file

    with tempfile.TemporaryDirectory() as folder:
        out, report = Path(folder) / "export", Path(folder) / "report.json"
        _run("onnx", "--model", str(model), "--out", str(out), "--quant", "none", "--kv-cache", cache, "--no-verify")
        _run("verify", str(out), "--samples", str(questions_file()), "--json", str(report))
        found: dict[str, Any] = json.loads(report.read_text())["quantization"]
    return found


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Decode rounds of both caches after a prompt of ``args.prompt`` tokens, and the cache's bytes per token."""
    model = make_models(SMALL, args.work).vlm
    specs, per_token = {}, {}
    for cache in CACHES:
        out = args.work / f"export-256m-kv-{cache}"
        if not (out / "manifest.json").is_file():
            _run(
                *("onnx", "--model", str(model), "--out", str(out), "--quant", "rtn", "--bits", "4"),
                *("--kv-cache", cache, "--calibration-samples", "4", "--no-verify", "--force"),
            )
        kv = json.loads((out / "manifest.json").read_text())["model"]["kv"]
        per_token[cache] = kv["bytes_per_token"]
        specs[cache] = {
            "kind": "vlmexport",
            "path": str(out),
            "threads": args.threads,
            "prompt": args.prompt,
            "tokens": args.tokens,
        }
    rounds = measure(specs, args.rounds)
    print(f"context {args.prompt}, {args.threads} threads, {args.rounds} rounds, load {os.getloadavg()[0]:.1f}")
    for cache in CACHES:
        decode, prefill = (median(rounds[cache][key]) for key in ("decode_tok_s", "prefill_tok_s"))
        peak = rounds[cache]["peak_rss_mb"]
        print(
            f"{cache:8}{decode:10.1f} tok/s decode{prefill:10.1f} tok/s prefill"
            f"{per_token[cache]:8} bytes a token{peak:10.1f} MB peak"
        )
    return {"context": args.prompt, "rounds": rounds, "bytes_per_token": per_token}


def judge(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar with its number."""
    rows = {(r["model"], r["cache"]): r for r in found["quality"]}
    verdicts = []
    for model in dict.fromkeys(r["model"] for r in found["quality"]):
        plain, int8 = rows[model, "same"], rows[model, "int8"]
        verdicts.append(_at_most(f"{model}: KL of the cache", int8["kl"] - plain["kl"], KL_BAR))
        drop = plain["accuracy"] - int8["accuracy"]
        verdicts.append(_at_most(f"{model}: accuracy lost", drop, ACCURACY_BAR))
    rounds, bytes_ = found["speed"]["rounds"], found["speed"]["bytes_per_token"]
    ratios = [b / a for a, b in zip(rounds["int8"]["decode_tok_s"], rounds["same"]["decode_tok_s"], strict=True)]
    verdicts.append(_at_most("decode time over the plain cache's", median(ratios), SPEED_BAR))
    verdicts.append(_at_most("bytes over the plain cache's", bytes_["int8"] / bytes_["same"], MEMORY_BAR))
    return verdicts


def _at_most(what: str, value: float, bar: float) -> dict[str, Any]:
    passed = value <= bar
    print(f"{what}: {value:.3g} (bar {bar:g}) {'ok' if passed else 'MISSED'}")
    return {"bar": what, "value": value, "at_most": bar, "passed": passed}


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _run(*arguments: str) -> None:
    """Run the command line; exit code 3 (the gate is red) is a result and not a failure here."""
    command = [sys.executable, "-m", "vlmexport", *arguments, "--quiet"]
    code = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=False).returncode
    if code not in (0, 3):
        raise SystemExit(f"{' '.join(command)}: exit code {code}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "benchmarks", help="models and exports are kept here"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=1900, help="context in tokens (the random model takes 2048)")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps per round")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
