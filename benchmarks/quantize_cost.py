"""What calibrated quantization costs a layer: CPU seconds and peak memory, against llmcompressor and gptqmodel.

    python benchmarks/quantize_cost.py [--method gptq --method awq]

Every contender quantizes the same random decoder (1.2B dimensions) with 2 and with 4 layers on the same number of
calibration tokens; the difference of the two runs, halved, is the cost of a layer, free of imports, loading and
writing. The opponents get the text model alone and live in environments of their own; one that cannot be installed is
reported as not run. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cost import Cost, measure
from genai import NotRun
from models import ROOT, Models, TextSize, make_models

LAYERS = (2, 4)
SAMPLES, GROUP = 16, 32
PYTHON = Path(sys.executable)
OURS = ["torch", "transformers", "transformers.models.llama.modeling_llama", "vlmexport.cli.main",
        "transformers.models.idefics3.modeling_idefics3", "transformers.models.idefics3.processing_idefics3",
        "vlmexport.calibrate.loop", "vlmexport.split.capture"]  # fmt: skip
PEERS = {
    "llmcompressor": (
        ["torch==2.13.0", "llmcompressor==0.14.0.1"],
        ["torch", "transformers", "datasets", "llmcompressor", "llmcompressor.modifiers.quantization"],
    ),
    "gptqmodel": (
        ["torch==2.13.0", "transformers==5.23.0", "gptqmodel==7.7.0"],
        ["torch", "transformers", "gptqmodel", "gptqmodel.quantization"],
    ),
}
# gptqmodel asks for a torch that has no CPU wheel here; it works with 2.13, so it is installed without its pins.
_UNPINNED = ("gptqmodel",)
_GPTQMODEL_NEEDS = [
    "accelerate",
    "datasets",
    "defuser",
    "device-smi",
    "dill",
    "logbar",
    "maturin",
    "ninja",
    "protobuf",
    "pyarrow",
    "pypcre",
    "requests",
    "safetensors",
    "threadpoolctl",
    "tokenicer",
    "torchao",
    "pillow",
]


@dataclass(frozen=True)
class LayerCost:
    """CPU seconds a layer costs, and anonymous memory over the imports of the larger run in GB."""

    cpu_s: float
    anon_gb: float


def main() -> int:
    """Measure every contender and method; print the costs and the ratios."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    report = {}
    for method in args.method or ["gptq", "awq"]:
        costs = measure_method(method, args.work, args.peer or list(PEERS))
        report[method] = {who: asdict(cost) for who, cost in costs.items()}
        print_costs(method, costs)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


def measure_method(method: str, work: Path, peers: list[str]) -> dict[str, LayerCost]:
    """Costs by contender; ours runs first, because it says how many tokens its samples are."""
    models = {n: make_models(TextSize(f"1.2b-{n}layers", 2048, n, 32, 8, 8192, "bfloat16", vocab=512), work)
              for n in LAYERS}  # fmt: skip
    out = work / "cost-quantize"
    tokens: list[int] = []
    contenders: dict[str, Callable[[Models], Cost]] = {
        "vlmexport": lambda m: _vlmexport(m, out, method, tokens),
        "llmcompressor": lambda m: _peer("llmcompressor", m, out, method, tokens, work),
        "gptqmodel": lambda m: _peer("gptqmodel", m, out, method, tokens, work),
    }
    costs = {}
    for name in ("vlmexport", *peers):
        run = contenders[name]
        try:
            few, many = (run(models[n]) for n in LAYERS)
            costs[name] = LayerCost((many.cpu_s - few.cpu_s) / (LAYERS[1] - LAYERS[0]), many.anon_gb)
            print(f"{method}: {name} {costs[name].cpu_s:.1f} CPU s a layer, {many.cpu_s:.1f} in all", flush=True)
        except (NotRun, RuntimeError) as reason:
            print(f"{name} ({method}): not run: {reason}", flush=True)
        finally:
            shutil.rmtree(out, ignore_errors=True)
    return costs


def _vlmexport(models: Models, out: Path, method: str, tokens: list[int]) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    argv = ["quantize", "--model", str(models.vlm), "--out", str(out), "--format", "compressed-tensors",
            "--quant", method, "--group-size", str(GROUP), "--calibration-samples", str(SAMPLES), "--no-verify",
            "--quiet"]  # fmt: skip
    cost = measure(PYTHON, OURS, argv, cwd=ROOT, module="vlmexport")
    tokens[:] = [json.loads((out / "vlmexport_quantization.json").read_text())["calibration"]["tokens"]]
    return cost


def _peer(name: str, models: Models, out: Path, method: str, tokens: list[int], work: Path) -> Cost:
    if not tokens:
        raise NotRun("our own run, which says how many tokens to use, failed")
    if (name, method) == ("llmcompressor", "awq"):
        raise NotRun("llmcompressor's AWQ needs an accelerator (facts/quantization.md)")
    shutil.rmtree(out, ignore_errors=True)
    python = peer_python(name, work)
    length = -(-tokens[0] // SAMPLES)
    argv = [str(models.llama), str(out), str(SAMPLES), str(length), method]
    script = str(ROOT / "benchmarks" / f"peer_{name}.py")
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # it refuses to start on two cores without
    os.environ["HF_HUB_OFFLINE"] = "1"
    return measure(python, PEERS[name][1], argv, cwd=work, script=script)


def peer_python(name: str, work: Path) -> Path:
    """The interpreter of the opponent's environment, made when it is not there; raises `NotRun` with the reason."""
    folder = work / f"{name}-venv"
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    install = [str(python), "-m", "pip", "install", "-q"]
    packages = PEERS[name][0]
    steps = [[str(PYTHON), "-m", "venv", str(folder)], [*install, *packages]]
    if name in _UNPINNED:
        steps = [steps[0], [*install, *packages[:-1], *_GPTQMODEL_NEEDS], [*install, "--no-deps", packages[-1]]]
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            raise NotRun((done.stderr.strip().splitlines() or ["pip failed"])[-1])
    return python


def print_costs(method: str, costs: dict[str, LayerCost]) -> None:
    """One row per contender, then the ratios."""
    print(f"\n{method:14}{'CPU s a layer':>16}{'anon GB over imports':>24}")
    for who, cost in costs.items():
        print(f"{who:14}{cost.cpu_s:16.1f}{cost.anon_gb:24.2f}")
    ours = costs.get("vlmexport")
    for who, cost in costs.items():
        if ours is not None and who != "vlmexport":
            verdict = "ok" if ours.cpu_s <= cost.cpu_s else "MISSED"
            print(f"vlmexport / {who}: CPU {ours.cpu_s / cost.cpu_s:.2f}x (bar 1.0) {verdict}, "
                  f"memory {ours.anon_gb / cost.anon_gb:.2f}x")  # fmt: skip
    weights = (2048 * 2048 * 2 + 2 * 512 * 2048 + 3 * 2048 * 8192) * 4 / 1e9
    hessians = (3 * 2048**2 + 8192**2) * 4 / 1e9
    print(f"memory bar: two layers {2 * weights:.2f} GB + second moments {hessians:.2f} GB + hidden states")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks", help="models are kept here")
    parser.add_argument("--method", action="append", choices=["gptq", "awq"], help="default: both")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="default: both")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
