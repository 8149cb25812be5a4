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
    specs = {"vlmexport": {"kind": "vlmexport", "path": str(_export(models.vlm, args.work / "export-256m"))}}
    try:
        graph = build(args.work, models.llama, args.work / "genai-256m")
        specs["genai"] = {"kind": "genai", "path": str(graph)}  # next to ours, where the comparison is closest
    except NotRun as reason:
        print(f"genai: not run: {reason}")
    for name, dtype in (("pytorch_fp32", "float32"), ("pytorch_bf16", "bfloat16")):
        specs[name] = {"kind": "pytorch", "path": str(models.llama), "dtype": dtype}
    common = {"threads": args.threads, "prompt": args.prompt, "tokens": args.tokens}
    results = measure({name: {**spec, **common} for name, spec in specs.items()}, args.rounds)
    print_table(results, args)
    verdicts = judge(results)
    if args.json:
        args.json.write_text(json.dumps({"results": results, "bars": verdicts, "settings": common}, indent=1))
    return int(args.strict and any(v["passed"] is False for v in verdicts))


def measure(specs: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Speed of every round and peak memory per contender; one warm-up round each, then `rounds` rounds in turn."""
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


def _summary(rounds: list[dict[str, Any]], prompt: int, peak: int) -> dict[str, Any]:
    return {
        "prefill_tok_s": [1000 * prompt / r["prefill_ms"] for r in rounds],
        "decode_tok_s": [1000 / median(r["decode_ms"]) for r in rounds],
        "peak_rss_mb": peak / 1e6,
    }


def print_table(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    """One row of medians per contender."""
    load = os.getloadavg()[0]
    print(f"prompt {args.prompt}, {args.tokens} steps, {args.threads} threads, {args.rounds} rounds, load {load:.1f}")
    print(f"{'':14}{'prefill tok/s':>15}{'decode tok/s':>15}{'peak RSS MB':>15}")
    for name, values in results.items():
        prefill, decode = median(values["prefill_tok_s"]), median(values["decode_tok_s"])
        print(f"{name:14}{prefill:15.1f}{decode:15.1f}{values['peak_rss_mb']:15.1f}")


def judge(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every bar with its ratio, the median over rounds; `passed` is None where the opponent was not run."""
    verdicts: list[dict[str, Any]] = []
    for key, opponent, bar in BARS:
        ratio = _ratio(results["vlmexport"][key], results[opponent][key]) if opponent in results else None
        passed = None if ratio is None else ratio >= bar
        verdicts.append({"bar": f"{key} vs {opponent}", "ratio": ratio, "at_least": bar, "passed": passed})
        word = {None: "not run", True: "ok", False: "MISSED"}[passed]
        print(f"{key} vs {opponent}: {'-' if ratio is None else f'{ratio:.2f}x'} (bar {bar}x) {word}")
    return verdicts


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Round against the neighbouring round: a machine that slows down for a while slows both."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


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
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512, help="prompt length in tokens")
    parser.add_argument("--tokens", type=int, default=32, help="decode steps per round")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a bar is missed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
