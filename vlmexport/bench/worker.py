"""One contender in its own process, so that its peak memory is its own: ``python -m vlmexport.bench.worker SPEC``.

Reads one word per line: ``round`` runs one answer and prints it as JSON, ``end`` prints the memory and leaves. The
first line it prints says how long loading took. SPEC is the JSON of a `Contender`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from vlmexport.bench.gguf import load_gguf
from vlmexport.bench.memory import read_memory
from vlmexport.bench.timing import Round, measure_round
from vlmexport.errors import VlmExportError
from vlmexport.runtime.protocol import ModelInputs, Runner

if TYPE_CHECKING:
    from numpy.typing import NDArray

Measure: TypeAlias = Callable[[], Round]  # one measured answer
Ready: TypeAlias = Callable[[], Measure]  # a loaded contender, before it has seen its inputs


@dataclass(frozen=True)
class Contender:
    """Who is measured: an export (`path` is its folder) or PyTorch on `path` in `dtype`; on which inputs, how long.

    `inputs`: the file of `save_inputs`; of a ``gguf`` export, the folder of `save_question`. `lora` is an adapter that
    PyTorch's model is given.
    """

    kind: Literal["artifact", "gguf", "pytorch"]
    path: str
    dtype: Literal["float32", "bfloat16"]
    threads: int
    inputs: str
    tokens: int
    trust_remote_code: bool = False
    lora: str | None = None


def save_inputs(inputs: ModelInputs, path: Path) -> None:
    """Write prepared inputs for `load_inputs`: workers measure models and need no processor."""
    arrays: dict[str, NDArray[np.int64]] = {f"pixel.{name}": value for name, value in inputs.pixel_inputs.items()}
    np.savez(path, allow_pickle=False, input_ids=inputs.input_ids, **arrays)


def load_inputs(path: Path) -> ModelInputs:
    """Read what `save_inputs` wrote."""
    with np.load(path) as file:
        pixels = {n.removeprefix("pixel."): file[n] for n in file.files if n.startswith("pixel.")}
        return ModelInputs(file["input_ids"], pixels)


def serve(contender: Contender, commands: IO[str], replies: IO[str]) -> None:
    """Load the contender and answer `commands` until ``end``; every reply is one JSON line."""
    start = time.perf_counter()
    ready = _LOADERS[contender.kind](contender)
    _reply(replies, {"load_s": time.perf_counter() - start})
    measure = ready()
    for command in commands:
        if command.strip() == "end":
            break
        _reply(replies, measure().to_dict())
    _reply(replies, asdict(read_memory()))


def _artifact(contender: Contender) -> Ready:
    from vlmexport.manifest import open_artifact
    from vlmexport.runtime.ort import OnnxRunner

    runner = OnnxRunner(open_artifact(Path(contender.path), check_hashes=False), threads=contender.threads)
    runner.load()
    return lambda: _rounds(runner, contender)


def _gguf(contender: Contender) -> Ready:
    return load_gguf(Path(contender.path), Path(contender.inputs), contender.tokens, contender.threads)


def _pytorch(contender: Contender) -> Ready:
    import torch

    from vlmexport.model.load import load_vlm
    from vlmexport.runtime.torch import TorchRunner

    torch.set_num_threads(contender.threads)
    vlm = load_vlm(contender.path, lora=contender.lora, trust_remote_code=contender.trust_remote_code)
    torch.nn.Module.to(vlm.model, getattr(torch, contender.dtype))
    runner = TorchRunner(vlm)

    def settled() -> Measure:
        _settle_threads(runner, load_inputs(Path(contender.inputs)), contender.threads)
        return _rounds(runner, contender)

    return settled


_LOADERS: dict[str, Callable[[Contender], Ready]] = {"artifact": _artifact, "gguf": _gguf, "pytorch": _pytorch}


def _rounds(runner: Runner, contender: Contender) -> Measure:
    inputs = load_inputs(Path(contender.inputs))
    return lambda: measure_round(runner, inputs, contender.tokens)


def _settle_threads(runner: Runner, inputs: ModelInputs, most: int) -> None:
    """Give PyTorch the faster of one and `most` threads: on a busy machine a small model waits at every OpenMP barrier.

    A reference that is slowed down by its own threads would flatter the export.
    """
    import torch

    seconds: dict[int, float] = {}
    for threads in sorted({1, most}):
        torch.set_num_threads(threads)
        measure_round(runner, inputs, 1)
        seconds[threads] = sum(measure_round(runner, inputs, 4).decode_ms)
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))


def _reply(stream: IO[str], data: dict[str, object]) -> None:
    stream.write(json.dumps(data) + "\n")
    stream.flush()


def main() -> int:
    """Serve on standard input and output; an error of ours is one JSON line with its message and exit code."""
    try:
        serve(Contender(**json.loads(sys.argv[1])), sys.stdin, sys.stdout)
    except VlmExportError as error:
        _reply(sys.stdout, {"error": str(error), "exit_code": error.exit_code})
    return 0


if __name__ == "__main__":
    sys.exit(main())
