"""What a GGUF export costs beside llama.cpp's own tools, whole processes, in turns in the same run.

    python benchmarks/gguf_cost.py --llama-cpp SOURCES --llama-quantize BINARY [--size 256m --size 1.2b] [--rounds 3]

`SOURCES` is a llama.cpp checkout (convert_hf_to_gguf.py), `BINARY` its llama-quantize (see README.md for how they are
built). Both sides write the text model as Q4_K_M without an importance matrix, and the vision side as F16: the
opponent in three commands with an F16 file in between, vlmexport in one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from models import LARGE, ROOT, SMALL, TextSize

SIZES = {size.name: size for size in (SMALL, LARGE)}
# SmolVLM's tower: 12 layers of 768, 512 px in patches of 16, 93 M values.
TOWER = {"vision_hidden": 768, "vision_layers": 12, "vision_heads": 12, "image_size": 512, "patch_size": 16}
MEMORY_BARS = {"256m": 1.0, "1.2b": 0.5}
PYTHON = sys.executable


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds of all processes, and the largest resident size of any of them in MB."""

    cpu_s: float
    wall_s: float
    peak_mb: float

    def then(self, other: Cost) -> Cost:
        """The cost of this, then `other`."""
        return Cost(self.cpu_s + other.cpu_s, self.wall_s + other.wall_s, max(self.peak_mb, other.peak_mb))


def main() -> int:
    """Measure both sides of every size; print the medians, the ratios and the bars."""
    args = _arguments()
    install_peer_packages(args.work / "peer-packages")
    report = {}
    for name in args.size or list(SIZES):
        model = make_model(SIZES[name], args.work)
        rounds: dict[str, list[Cost]] = {"vlmexport": [], "converter": [], "llama-quantize": [], "mmproj": []}
        for _ in range(args.rounds):
            rounds["vlmexport"].append(_vlmexport(model, args.work / "gguf-ours"))
            for step, cost in _llama_cpp(model, args, args.work / "gguf-theirs").items():
                rounds[step].append(cost)
        medians = {who: _median(costs) for who, costs in rounds.items()}
        report[name] = {who: asdict(cost) for who, cost in medians.items()}
        print_costs(name, medians)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


def install_peer_packages(folder: Path) -> None:
    """What the converter imports beyond our own dependencies, in a folder of its own that only it sees."""
    if not folder.is_dir():
        pip = [PYTHON, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "sentencepiece"]
        subprocess.run(pip, check=True)


def make_model(size: TextSize, work: Path) -> Path:
    """A random Idefics3 with the text dimensions of `size` and SmolVLM's tower, in bfloat16; kept in `work`."""
    path = work / f"gguf-{size.name}"
    if not path.is_dir():
        # In a process of its own: a child's peak starts at the size of the process that started it.
        maker = multiprocessing.get_context("spawn").Process(target=_make_model, args=(size, path))
        maker.start()
        maker.join()
    return path


def _make_model(size: TextSize, path: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from tests.tiny import make_tiny

    building = path.with_suffix(".part")
    shutil.rmtree(building, ignore_errors=True)
    make_tiny(
        "idefics3", building, dtype="bfloat16", hidden=size.hidden, layers=size.layers, heads=size.heads,
        kv_heads=size.kv_heads, head_dim=size.head_dim, intermediate=size.intermediate, vocab=size.vocab,
        vision={"intermediate_size": 3072}, **TOWER,
    )  # fmt: skip
    config = json.loads((building / "config.json").read_text())
    config["text_config"]["architectures"] = ["LlamaForCausalLM"]  # the converter asks for it
    (building / "config.json").write_text(json.dumps(config, indent=1))
    building.rename(path)


def _vlmexport(model: Path, out: Path) -> Cost:
    shutil.rmtree(out, ignore_errors=True)
    options = ["--quant", "Q4_K_M", "--imatrix", "none", "--no-verify", "--quiet", "--threads", "2"]
    cost = run([PYTHON, "-m", "vlmexport", "gguf", "--model", str(model), "--out", str(out), *options])
    shutil.rmtree(out)
    return cost


def _llama_cpp(model: Path, args: argparse.Namespace, out: Path) -> dict[str, Cost]:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    convert = [PYTHON, str(ROOT / "benchmarks" / "peer_convert_hf.py"), str(args.llama_cpp), str(model)]
    text, small = out / "text-f16.gguf", out / "text-q4.gguf"
    packages = args.work / "peer-packages"
    costs = {
        "converter": run([*convert, "--outtype", "f16", "--outfile", str(text)], packages),
        "llama-quantize": run([str(args.llama_quantize), str(text), str(small), "Q4_K_M", "2"], packages),
        "mmproj": run([*convert, "--mmproj", "--outtype", "f16", "--outfile", str(out / "mmproj.gguf")], packages),
    }
    shutil.rmtree(out)
    return costs


def run(command: list[str], packages: Path = ROOT) -> Cost:
    """Run `command` to its end; raises RuntimeError with its last words when it fails."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": f"{ROOT}:{packages}"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[:3]} failed: {output[-500:]}")
    peak = usage.ru_maxrss / 1024 if sys.platform == "linux" else usage.ru_maxrss / resource.getpagesize()
    return Cost(usage.ru_utime + usage.ru_stime, time.perf_counter() - start, peak)


def _median(costs: list[Cost]) -> Cost:
    fields = ((c.cpu_s, c.wall_s, c.peak_mb) for c in costs)
    return Cost(*(statistics.median(column) for column in zip(*fields, strict=True)))


def print_costs(name: str, costs: dict[str, Cost]) -> None:
    """One row per step, then the ratios beside their bars."""
    print(f"\n{name:16}{'CPU s':>10}{'wall s':>10}{'peak RSS MB':>14}")
    for who, cost in costs.items():
        print(f"{who:16}{cost.cpu_s:10.1f}{cost.wall_s:10.1f}{cost.peak_mb:14.0f}")
    ours = costs["vlmexport"]
    theirs = costs["converter"].then(costs["llama-quantize"]).then(costs["mmproj"])
    cpu, memory = ours.cpu_s / theirs.cpu_s, ours.peak_mb / costs["converter"].peak_mb
    bar = MEMORY_BARS[name]
    print(f"CPU: {cpu:.2f}x of the three commands (bar 1.0x) {'ok' if cpu <= 1 else 'MISSED'}")
    print(f"peak memory: {memory:.2f}x of the converter's (bar {bar}x) {'ok' if memory <= bar else 'MISSED'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's sources")
    parser.add_argument("--llama-quantize", type=Path, required=True, help="the tool built from them")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks", help="models are kept here")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
