"""`bench_artifact`: the export and PyTorch measured in one run, alternated, each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.bench.gguf import save_question
from vlmexport.bench.memory import folder_bytes
from vlmexport.bench.process import Worker, started, worker_command
from vlmexport.bench.timing import Round, summarise
from vlmexport.bench.worker import Contender, save_inputs
from vlmexport.cpu import available_cores
from vlmexport.engines import ENGINES_FOLDER, TENSORRT_LAYOUT
from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.manifest import Artifact, Manifest, open_artifact
from vlmexport.model.checkpoint import read_checkpoint
from vlmexport.model.lora_files import read_adapter
from vlmexport.model.source import resolve_source
from vlmexport.progress import Progress, SilentProgress
from vlmexport.runtime.generate import GGUF_LAYOUT
from vlmexport.runtime.prompt import load_image
from vlmexport.runtime.text_only import require_text

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_PROMPT = "What is in the picture?"
REFERENCES = {"pytorch_fp32": "float32", "pytorch_bf16": "bfloat16"}
_RUNTIMES = {GGUF_LAYOUT: "llama.cpp", TENSORRT_LAYOUT: "ONNX Runtime on the CPU; no engine was run"}
# What is built beside the graphs of an export and is not run here.
_NOT_RUN = (f"{ENGINES_FOLDER}/", "triton/")


@dataclass(frozen=True)
class BenchReport:
    """What was measured; the keys of each contender are in docs of ``bench --json``.

    `runtime`: what ran the export. `ratios` are all "more is better for the export": speed over the reference's,
    reference's bytes over the export's. `settings` says how it was measured.
    """

    runtime: str
    artifact: dict[str, float]
    references: dict[str, dict[str, float]]
    ratios: dict[str, float]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report as ``bench --json`` writes it."""
        return asdict(self)


def bench_artifact(
    path: Path,
    *,
    model: str | None = None,
    lora: str | None = None,
    prompt: str = DEFAULT_PROMPT,
    images: Sequence[Path] = (),
    tokens: int = 64,
    rounds: int = 3,
    threads: int = 0,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> BenchReport:
    """Measure the export in `path` and, in the same run, PyTorch with `model` (default: what it was made from).

    `images` default to a drawn picture. Each contender answers the prompt with `tokens` decode steps, once to warm up
    and `rounds` times for the record, taking turns. `threads` 0 = all that this process may use; PyTorch and llama.cpp
    get one instead where that is faster for them. When `model` is not given and the original is gone, there are no
    references and ``settings["references"]`` says why.
    """
    artifact = open_artifact(path)
    require_text(artifact)
    threads = threads or available_cores()
    pictures = [load_image(image) for image in images] or [_drawn_picture()]
    with tempfile.TemporaryDirectory(prefix="vlmexport-bench-") as folder:
        base = Contender("artifact", str(path), "float32", threads, "", tokens, trust_remote_code)
        asked = _Question(prompt, pictures, Path(folder))
        contenders, note = _contenders(artifact, model, lora, base, asked)
        measured, prompt_tokens = _measure(contenders, rounds, progress or SilentProgress())
    ours = _with_size(measured.pop("artifact"), run_bytes(artifact.manifest))
    size = folder_bytes(Path(contenders["pytorch_fp32"].path), _is_weights) if measured else 0
    references = {name: _with_size(values, size) for name, values in measured.items()}
    settings = {
        "threads": threads,
        "rounds": rounds,
        "decode_tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "images": len(pictures),
        "references": note,
    }
    runtime = _RUNTIMES.get(artifact.manifest.layout, "ONNX Runtime on the CPU")
    return BenchReport(runtime, ours, references, _ratios(ours, references), settings)


def run_bytes(manifest: Manifest) -> int:
    """Bytes of an export's files without engines and what serves them: what a bench runs."""
    return sum(file.bytes for name, file in manifest.files.items() if not name.startswith(_NOT_RUN))


def _drawn_picture() -> Image:
    """A picture that every run and machine draws alike: two shapes on a colour ramp."""
    from PIL import Image, ImageDraw

    picture = Image.linear_gradient("L").resize((384, 288)).convert("RGB")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((40, 60, 160, 180), fill=(200, 30, 40))
    draw.ellipse((220, 90, 340, 210), fill=(30, 60, 200))
    return picture


@dataclass(frozen=True)
class _Question:
    """What is asked, and the folder for the files in which the workers find it."""

    prompt: str
    pictures: Sequence[Image]
    folder: Path


def _contenders(
    artifact: Artifact, model: str | None, lora: str | None, base: Contender, asked: _Question
) -> tuple[dict[str, Contender], str]:
    """All contenders by name, their inputs written, and what to say about the references."""
    made_from = artifact.manifest.source
    source = model or str(made_from.get("model", ""))
    adapter = lora or (made_from.get("lora") or {}).get("path")
    ours = _contender(artifact, base, asked)
    try:
        original = resolve_source(source, trust_remote_code=base.trust_remote_code)
        read_checkpoint(original, trust_remote_code=base.trust_remote_code)
        if adapter is not None:
            read_adapter(adapter)
        base = replace(base, inputs=_prepared(base, artifact, asked))
    except (BadInputError, NotPossibleHereError) as error:
        if model or lora:
            raise
        return {"artifact": ours}, f"not measured: {error}"
    made = {name: _reference(base, original, adapter, dtype) for name, dtype in REFERENCES.items()}
    return {"artifact": ours, **made}, f"PyTorch with {source}" + (f" and {adapter}" if adapter else "")


def _contender(artifact: Artifact, base: Contender, asked: _Question) -> Contender:
    """The export itself, with the question in the form that its runtime takes."""
    if artifact.manifest.layout != GGUF_LAYOUT:
        return replace(base, inputs=_prepared(base, artifact, asked))
    folder = asked.folder / "question"
    save_question(artifact.path, asked.prompt, asked.pictures, folder)
    return replace(base, kind="gguf", inputs=str(folder))


def _prepared(base: Contender, artifact: Artifact, asked: _Question) -> str:
    """The file of what the model's own processor makes of the question."""
    from vlmexport.runtime.prompt import PromptBuilder

    file = asked.folder / "inputs.npz"
    if not file.is_file():
        try:
            builder = PromptBuilder(artifact.path, trust_remote_code=base.trust_remote_code)
        except ImportError as error:  # torchvision, for some image processors
            raise NotPossibleHereError(f"{artifact.path}: the processor does not load here: {error}") from error
        save_inputs(builder.build(asked.pictures, asked.prompt), file)
    return str(file)


def _reference(base: Contender, original: Path, lora: str | None, dtype: Any) -> Contender:
    trust = base.trust_remote_code
    return Contender("pytorch", str(original), dtype, base.threads, base.inputs, base.tokens, trust, lora)


def _measure(
    contenders: dict[str, Contender], rounds: int, progress: Progress
) -> tuple[dict[str, dict[str, float]], int]:
    """Speed, load time and memory of every contender, and the prompt tokens of the export.

    Rounds alternate so that a busy moment hits all of them.
    """
    with ExitStack() as stack, progress.stage("bench", len(contenders) * (rounds + 1)) as stage:
        workers = {name: stack.enter_context(started(worker_command(c))) for name, c in contenders.items()}
        done: dict[str, list[Round]] = {name: [] for name in contenders}
        for number in range(rounds + 1):
            for name, worker in workers.items():
                measured = Round.from_dict(worker.ask("round"))
                if number:  # the first is the warm-up
                    done[name].append(measured)
                stage.advance(description=f"{name}, round {number}" if number else f"{name}, warm-up")
        figures = {name: _figures(done[name], worker) for name, worker in workers.items()}
        return figures, done["artifact"][0].prompt_tokens


def _figures(rounds: list[Round], worker: Worker) -> dict[str, float]:
    speed = summarise(rounds)
    peak = worker.ask("end")["peak_rss"]
    per_gb = speed["decode_tok_s"] / (peak / 1e9)
    return {**speed, "tok_s_per_gb": per_gb, "peak_rss_bytes": peak, "load_s": worker.load_s}


def _with_size(values: dict[str, float], size: int) -> dict[str, float]:
    return {**values, "size_bytes": size}


def _is_weights(file: Path) -> bool:
    return file.suffix == ".safetensors"


def _ratios(ours: dict[str, float], references: dict[str, dict[str, float]]) -> dict[str, float]:
    more = {"decode": "decode_tok_s", "prefill": "prefill_tok_s"}
    less = {"ttft": "ttft_ms", "load": "load_s", "memory": "peak_rss_bytes", "size": "size_bytes"}
    ratios: dict[str, float] = {}
    for name, theirs in references.items():
        ratios |= {f"{label}_vs_{name}": ours[key] / theirs[key] for label, key in more.items()}
        ratios |= {f"{label}_vs_{name}": theirs[key] / ours[key] for label, key in less.items() if ours[key]}
    return ratios
