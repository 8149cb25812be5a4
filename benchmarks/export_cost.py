"""What an export costs: CPU seconds and peak memory of ``vlmexport onnx --no-verify`` and of its opponents.

    python benchmarks/export_cost.py [--size 256m --size 1.2b]

Opponents: onnxruntime-genai's builder, and torch.onnx.export (FP32 graph, the small model only). See README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cost import Cost, measure
from genai import NotRun, builder_arguments, genai_python
from models import LARGE, ROOT, SMALL, Models, TextSize, make_models

SIZES = {size.name: size for size in (SMALL, LARGE)}
# (CPU seconds, GB of anonymous memory over the imports)
BARS: dict[str, tuple[float | None, float]] = {"256m": (30.0, 0.6), "1.2b": (None, 1.0)}
PYTHON = Path(sys.executable)
HF = ["torch", "transformers", "transformers.models.llama.modeling_llama"]
OURS = [*HF, "transformers.models.idefics3.modeling_idefics3", "transformers.models.idefics3.processing_idefics3",
        "onnx", "onnx_ir", "onnxscript", "onnxruntime", "torch.onnx", "torch.export", "vlmexport.cli.main",
        "vlmexport.pipeline", "vlmexport.lower.onnx.layouts.split", "vlmexport.split.capture"]  # fmt: skip


def main() -> int:
    """Measure every contender once per size; print the costs, the ratios and the bars."""
    args = _arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    report = {}
    for name in args.size or list(SIZES):
        costs = measure_size(SIZES[name], args.work)
        report[name] = {who: asdict(cost) for who, cost in costs.items()}
        print_costs(name, costs)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


def measure_size(size: TextSize, work: Path) -> dict[str, Cost]:
    """Costs by contender; one that cannot run is printed with its reason and left out."""
    models = make_models(size, work)
    contenders: dict[str, Callable[[Path], Cost]] = {
        "vlmexport": lambda out: _vlmexport(models, out),
        "genai": lambda out: _genai(models, out, work),
    }
    if size is SMALL:
        contenders["torch.onnx"] = lambda out: _torch(models, out)
    costs = {}
    for name, run in contenders.items():
        out = work / f"cost-{name}-{size.name}"
        shutil.rmtree(out, ignore_errors=True)
        try:
            costs[name] = run(out)
        except (NotRun, RuntimeError) as reason:
            print(f"{name} ({size.name}): not run: {reason}")
        finally:
            shutil.rmtree(out, ignore_errors=True)
    return costs


def _vlmexport(models: Models, out: Path) -> Cost:
    argv = ["onnx", "--model", str(models.vlm), "--out", str(out), "--quant", "rtn", "--no-verify", "--quiet"]
    return measure(PYTHON, OURS, argv, cwd=ROOT, module="vlmexport")


def _genai(models: Models, out: Path, work: Path) -> Cost:
    preload = [*HF, "onnx_ir", "onnxruntime", "onnxruntime_genai"]
    argv = builder_arguments(models.llama, out)
    return measure(genai_python(work), preload, argv, cwd=work, module="onnxruntime_genai.models.builder")


def _torch(models: Models, out: Path) -> Cost:
    out.mkdir()
    script = str(ROOT / "benchmarks" / "torch_export.py")
    argv = [str(models.llama), str(out / "model.onnx")]
    return measure(PYTHON, [*HF, "onnxscript", "torch.onnx"], argv, cwd=ROOT, script=script)


def print_costs(name: str, costs: dict[str, Cost]) -> None:
    """One row per contender, then our bars."""
    print(f"\n{name}{'CPU s':>22}{'wall s':>9}{'anon GB over imports':>22}{'file-backed GB':>16}")
    for who, cost in costs.items():
        print(f"{who:14}{cost.cpu_s:12.1f}{cost.wall_s:9.1f}{cost.anon_gb:22.2f}{cost.file_gb:16.2f}")
    ours = costs.get("vlmexport")
    if ours is None:
        return
    for who, cost in costs.items():
        if who != "vlmexport":
            print(f"{who} / vlmexport: CPU {cost.cpu_s / ours.cpu_s:.2f}x, memory {cost.anon_gb / ours.anon_gb:.2f}x")
    cpu, memory = BARS[name]
    if cpu is not None:
        print(f"CPU {ours.cpu_s:.1f} s (bar {cpu:.0f} s) {'ok' if ours.cpu_s <= cpu else 'MISSED'}")
    print(f"memory {ours.anon_gb:.2f} GB (bar {memory} GB) {'ok' if ours.anon_gb <= memory else 'MISSED'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks", help="models are kept here")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: both")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
