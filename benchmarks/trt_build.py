"""What building a decoder's engine costs, without a GPU, by TensorRT for RTX: seconds, CPU seconds, peak memory.

    python benchmarks/trt_build.py [--size 256m --size 0.5b] [--weights int4 --weights fp16] [--rounds 3] [--peer]

The decoders are random, in the dialect of ``vlmexport trt`` with a static cache of 2048 tokens and both profiles in one
engine. `--peer` also builds the FP16 decoder that ``torch.onnx.export`` makes of a Llama of that shape. See README.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models import ROOT

sys.path.insert(0, str(ROOT))

from tests.lower.tensorrt.graphs import DecoderShape, part_of, write_decoder
from vlmexport.engines import Dims, EngineSpec, ShapeProfile, TrtLimits, decoder_profiles
from vlmexport.lower.tensorrt.build import BuildResult, build_engine, require_rtx
from vlmexport.manifest import TensorSpec

CACHE = 2048
LIMITS = TrtLimits(max_batch=4, max_seq=CACHE, max_images=1)
SIZES = {
    "256m": DecoderShape(576, 30, 9, 3, 64, 1536, 49280, CACHE, group=64),  # SmolVLM-256M's text model
    "0.5b": DecoderShape(896, 24, 14, 2, 64, 4864, 151936, CACHE, group=128),  # Qwen2.5-0.5B's
}
WEIGHTS = ("int4", "fp16")
PEER = "torch.onnx fp16"
# Seconds and bytes of resident memory.
BARS = {("0.5b", "int4"): (20.0, 2e9)}


@dataclass(frozen=True)
class Cost:
    """Medians over the rounds: wall and CPU seconds and peak resident bytes of the building process."""

    seconds: float
    cpu_seconds: float
    peak_rss: float
    engine_bytes: int
    layers: int

    @staticmethod
    def of(rounds: list[BuildResult]) -> Cost:
        """The medians of `rounds`."""
        columns = ([r.seconds for r in rounds], [r.cpu_seconds for r in rounds], [r.peak_rss for r in rounds])
        return Cost(*map(statistics.median, columns), rounds[0].bytes, rounds[0].layers)


def main() -> int:
    """Build every engine in turns; print the medians and the bars. Exit code 1 for a missed bar with `--strict`."""
    args = _arguments()
    print(f"TensorRT for RTX {require_rtx()}, {args.target}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    kinds = [*(args.weights or WEIGHTS), *([PEER] if args.peer else [])]
    cases = {(size, kind): make_graph(args.work, size, kind) for size in args.size or SIZES for kind in kinds}
    rounds: dict[tuple[str, str], list[BuildResult]] = {case: [] for case in cases}
    out = args.work / "trt-build" / "decoder.engine"
    for _ in range(args.rounds):
        for case, graph in cases.items():
            rounds[case].append(build_engine(graph, make_spec(graph, case[1]), [args.target], out))
            out.unlink()
    costs = {case: Cost.of(results) for case, results in rounds.items()}
    met = print_costs(costs)
    if args.json:
        args.json.write_text(json.dumps({" ".join(case): asdict(cost) for case, cost in costs.items()}, indent=1))
    return 0 if met or not args.strict else 1


def make_graph(work: Path, size: str, kind: str) -> Path:
    """The decoder's graph, made once and kept in `work`; in a process of its own, which takes the weights along."""
    folder = work / f"trt-{size}-{kind.replace(' ', '-')}"
    graph, done = folder / "decoder.onnx", folder / "done"
    if done.is_file():
        return graph
    folder.mkdir(parents=True, exist_ok=True)
    if kind == PEER:
        script = str(ROOT / "benchmarks" / "peer_trt_graph.py")
        subprocess.run([sys.executable, script, json.dumps(asdict(SIZES[size])), str(graph)], check=True)
    else:
        maker = multiprocessing.get_context("spawn").Process(target=write_decoder, args=(folder, SIZES[size], kind))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError(f"the graph of {size} in {kind} could not be made (exit code {maker.exitcode})")
    done.touch()
    return graph


def make_spec(graph: Path, kind: str) -> EngineSpec:
    """Both profiles of the decoder: prompts of up to the cache's length, and one token."""
    part = part_of(graph)
    if kind != PEER:
        return EngineSpec("decoder", "decoder", decoder_profiles(part, LIMITS))
    profiles = (
        ShapeProfile(name, {tensor.name: _peer_shapes(tensor, usual, longest) for tensor in part.inputs})
        for name, usual, longest in (("prefill", 512, CACHE), ("decode", 1, 1))
    )
    return EngineSpec("decoder", "decoder", tuple(profiles))


def _peer_shapes(tensor: TensorSpec, usual: int, longest: int) -> tuple[Dims, Dims, Dims]:
    """Shapes of an input of the peer's graph for `usual` and `longest` new tokens, and 1, 512 or most cached ones."""
    made: Callable[[int, int, int], Any] = {
        "inputs_embeds": lambda batch, new, past: (batch, new, tensor.dims[2]),
        "attention_mask": lambda batch, new, past: (batch, new + past),
    }.get(tensor.name, lambda batch, new, past: (batch, tensor.dims[1], past, tensor.dims[3]))
    return made(1, 1, 1), made(1, usual, 512), made(LIMITS.max_batch, longest, CACHE - 1)


def print_costs(costs: dict[tuple[str, str], Cost]) -> bool:
    """One row per engine, the peer's ratios and the bars; True when every bar is met."""
    print(f"\n{'decoder':22}{'wall s':>9}{'CPU s':>9}{'peak RSS MB':>13}{'engine MB':>11}{'layers':>8}")
    for (size, kind), cost in costs.items():
        numbers = (
            f"{cost.seconds:9.1f}{cost.cpu_seconds:9.1f}{cost.peak_rss / 1e6:13.0f}{cost.engine_bytes / 1e6:11.0f}"
        )
        print(f"{f'{size} {kind}':22}{numbers}{cost.layers:8}")
    for size in dict.fromkeys(size for size, _ in costs):
        ours, theirs = costs.get((size, "fp16")), costs.get((size, PEER))
        if ours and theirs:
            print(
                f"{size} fp16 / {PEER}: CPU {ours.cpu_seconds / theirs.cpu_seconds:.2f}x, "
                f"memory {ours.peak_rss / theirs.peak_rss:.2f}x, layers {ours.layers / theirs.layers:.2f}x"
            )
    met = True
    for case, (seconds, memory) in BARS.items():
        if case in costs:
            cost = costs[case]
            good = cost.seconds <= seconds and cost.peak_rss <= memory
            met = met and good
            found = (
                f"{cost.seconds:.1f} s (bar {seconds:.0f} s), {cost.peak_rss / 1e9:.2f} GB (bar {memory / 1e9:.0f} GB)"
            )
            print(f"{' '.join(case)}: {found} {'ok' if good else 'MISSED'}")
    return met


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "benchmarks", help="graphs are kept here")
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: both")
    parser.add_argument("--weights", action="append", choices=WEIGHTS, help="default: both")
    parser.add_argument("--target", default="SM80", help="TensorRT for RTX's name of an architecture")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also build what torch.onnx.export makes")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a bar is missed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
