"""Our exported decoder against what a user would pick instead, on a random model of SmolVLM-256M's text dimensions.

    python benchmarks/decode_vs_genai.py --threads 2

Opponents: the INT4 graph of onnxruntime-genai's builder and PyTorch (FP32 and BF16) on the same weights. All take turns
in one run, each in its own process. See README.md for the bars.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from genai import NotRun, build
from models import ROOT, SMALL, make_models

HERE = Path(__file__).resolve().parent
BARS = (
    ("decode_tok_s", "genai", 0.97),
    ("decode_tok_s", "pytorch_fp32", 4.0),
    ("prefill_tok_s", "genai", 1.15),
)


def main() -> int:
    """Build what is missing, measure, print the table and the ratios; 1 when a bar is missed with --strict."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    models = make_models(SMALL, args.work)
    specs = {
        "vlmexport": {"kind": "vlmexport", "path": str(_export(models.vlm, args.work / "export-256m"))},
        "pytorch_fp32": {"kind": "pytorch", "path": str(models.llama), "dtype": "float32"},
        "pytorch_bf16": {"kind": "pytorch", "path": str(models.llama), "dtype": "bfloat16"},
    }
    try:
        graph = build(args.work, models.llama, args.work / "genai-256m")
        specs["genai"] = {"kind": "genai", "path": str(graph)}
    except NotRun as reason:
        print(f"genai: not run: {reason}")
    common = {"threads": args.threads, "prompt": args.prompt, "tokens": args.tokens}
    results = measure({name: {**spec, **common} for name, spec in specs.items()}, args.rounds)
    print_table(results, args)
    verdicts = judge(results)
    if args.json:
        args.json.write_text(json.dumps({"results": results, "bars": verdicts, "settings": common}, indent=1))
    return int(args.strict and any(v["passed"] is False for v in verdicts))


def measure(specs: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians per contender; one warm-up round each, then `rounds` rounds in turn."""
    from vlmexport.bench.process import started

    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    script = str(HERE / "decoder_worker.py")
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(started([sys.executable, script, json.dumps(spec)]))
            for name, spec in specs.items()
        }
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in specs}
        for number in range(rounds + 1):
            for name, worker in workers.items():
                answer = worker.ask("round")
                if number:
                    found[name].append(answer)
        peaks = {name: worker.ask("end")["peak_rss"] for name, worker in workers.items()}
    return {name: _summary(found[name], specs[name]["prompt"], peaks[name]) for name in specs}


def _summary(rounds: list[dict[str, Any]], prompt: int, peak: int) -> dict[str, float]:
    return {
        "prefill_tok_s": 1000 * prompt / median(r["prefill_ms"] for r in rounds),
        "decode_tok_s": 1000 / median(ms for r in rounds for ms in r["decode_ms"]),
        "peak_rss_mb": peak / 1e6,
    }


def print_table(results: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    """One row per contender."""
    load = os.getloadavg()[0]
    print(f"prompt {args.prompt}, {args.tokens} steps, {args.threads} threads, {args.rounds} rounds, load {load:.1f}")
    print(f"{'':14}{'prefill tok/s':>15}{'decode tok/s':>15}{'peak RSS MB':>15}")
    for name, values in results.items():
        print(f"{name:14}" + "".join(f"{values[k]:15.1f}" for k in ("prefill_tok_s", "decode_tok_s", "peak_rss_mb")))


def judge(results: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Every bar with its ratio; `passed` is None where the opponent was not run."""
    verdicts: list[dict[str, Any]] = []
    for key, opponent, bar in BARS:
        ratio = results["vlmexport"][key] / results[opponent][key] if opponent in results else None
        passed = None if ratio is None else ratio >= bar
        verdicts.append({"bar": f"{key} vs {opponent}", "ratio": ratio, "at_least": bar, "passed": passed})
        word = {None: "not run", True: "ok", False: "MISSED"}[passed]
        print(f"{key} vs {opponent}: {'-' if ratio is None else f'{ratio:.2f}x'} (bar {bar}x) {word}")
    return verdicts


def _export(vlm: Path, out: Path) -> Path:
    if not (out / "manifest.json").is_file():
        options = ["--model", str(vlm), "--out", str(out), "--no-verify", "--quant", "rtn", "--quiet", "--force"]
        subprocess.run([sys.executable, "-m", "vlmexport", "onnx", *options], check=True, cwd=ROOT)
    return out


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "benchmarks", help="models and exports are kept here"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, help="prompt length in tokens")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps per round")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
