"""One typed function per command. The command line and notebooks call these, and nothing below them.

Everything heavy is imported inside the functions, so importing this module costs nothing. `lora` is a LoRA adapter in
PEFT's format (folder or hub id) that is merged into `model` before anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmexport.api_serving import check_hub as check_hub
from vlmexport.api_serving import check_pushable as check_pushable
from vlmexport.api_serving import make_server as make_server
from vlmexport.api_serving import make_site as make_site
from vlmexport.api_serving import make_site_server as make_site_server
from vlmexport.api_serving import production_lines as production_lines
from vlmexport.api_serving import push_to_hub as push_to_hub
from vlmexport.api_serving import write_site as write_site
from vlmexport.errors import BadInputError
from vlmexport.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from vlmexport.bench.run import BenchReport
    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.calibrate.sensitivity import Sensitivity
    from vlmexport.checkpoint_plan import CheckpointOptions
    from vlmexport.doctor import DoctorReport
    from vlmexport.gguf_options import GgufOptions, GgufPlan
    from vlmexport.gguf_pipeline import GgufResult
    from vlmexport.inspection import InspectReport
    from vlmexport.lower.gguf.adapter import AdapterGguf
    from vlmexport.pipeline import ExportResult
    from vlmexport.plan import ExportPlan, OnnxOptions
    from vlmexport.quantize.scheme import QuantScheme
    from vlmexport.quantize_pipeline import CheckpointResult
    from vlmexport.runtime.generate import Answer
    from vlmexport.runtime.sampling import Sampling
    from vlmexport.support import Support
    from vlmexport.trt_options import TrtOptions
    from vlmexport.trt_pipeline import TrtResult
    from vlmexport.trt_plan import TrtPlan
    from vlmexport.verify.result import ParityReport


def inspect_model(model: str, *, lora: str | None = None, trust_remote_code: bool = False) -> InspectReport:
    """Describe `model` (a folder, a hub id or ``demo``) without exporting anything."""
    from vlmexport.gguf_pipeline import gguf_vocabulary
    from vlmexport.inspection import inspect_vlm
    from vlmexport.model.load import load_vlm

    vlm = load_vlm(model, lora=lora, trust_remote_code=trust_remote_code, embeddings=True)
    return inspect_vlm(vlm, gguf_vocabulary)


def plan_onnx(
    model: str,
    options: OnnxOptions,
    *,
    calibration: CalibrationOptions | None = None,
    save_plan: Path | None = None,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> ExportPlan:
    """What `export_onnx` would do to every weight; nothing is exported.

    ``--quant auto`` measures and calibrates for that, on `calibration`'s samples; `save_plan` is a file for its choice.
    """
    import tempfile

    from vlmexport.calibrate.auto import settle_bits
    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.dtypes import settle_dtypes
    from vlmexport.pipeline import check_feeds, check_layout, load_and_split, preprocessing_graph
    from vlmexport.plan import check_options, plan_export
    from vlmexport.target import load_target

    watcher = progress or SilentProgress()
    target = load_target(options.target)
    options = settle_dtypes(options)
    check_options(options, target)
    preprocessor = preprocessing_graph(model, options, target, trust_remote_code)
    vlm, split = load_and_split(model, trust_remote_code, watcher, lora=lora, options=options)
    check_feeds(preprocessor, split)
    check_layout(vlm, split, options)
    with tempfile.TemporaryDirectory(prefix="vlmexport-") as work:
        chosen = calibration or CalibrationOptions()
        settled, quant_plan = settle_bits(vlm, split, target, options, chosen, Path(work), watcher)
    if quant_plan is not None and save_plan is not None:
        quant_plan.write(save_plan)
    return plan_export(vlm, split, target, settled)


def export_onnx(
    model: str,
    out: Path,
    options: OnnxOptions,
    *,
    calibration: CalibrationOptions | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> ExportResult:
    """Export `model` into the folder `out` and, with `verify`, judge the result by the gate.

    `calibration` says which samples the calibrated algorithms look at (default: the bundled recipe).

    Raises `BadInputError` when `out` exists and `force` is False.
    """
    from vlmexport import pipeline

    return pipeline.export_onnx(
        model,
        out,
        options,
        calibration=calibration,
        force=force,
        verify=verify,
        progress=progress or SilentProgress(),
        lora=lora,
        trust_remote_code=trust_remote_code,
    )


def families(family: str | None = None) -> tuple[Support, ...]:
    """Which families export to which target, as measured; of `family` (a ``model_type``) alone where it is given.

    Raises `BadInputError` for a family that is not in the table, with the closest names.
    """
    import difflib

    from vlmexport.support import support_table

    table = support_table()
    known = list(dict.fromkeys(entry.family for entry in table))
    if family is None:
        return table
    if family not in known:
        close = difflib.get_close_matches(family, known) or known
        raise BadInputError(
            f"family {family!r} is not in the table (a model of it may still export); known: {', '.join(close)}"
        )
    return tuple(entry for entry in table if entry.family == family)


def plan_trt(
    model: str,
    options: TrtOptions,
    *,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> TrtPlan:
    """What `export_trt` would do, whether the result fits the GPU, and the floors of its times; nothing is written.

    Raises `BadInputError` when it does not fit, naming the largest batch and length that do.
    """
    from vlmexport import trt_plan
    from vlmexport.lower.tensorrt.build import rtx_version
    from vlmexport.pipeline import load_and_split

    version = rtx_version()
    trt_plan.check_trt_options(options, version)
    vlm, split = load_and_split(model, trust_remote_code, progress or SilentProgress(), lora=lora)
    return trt_plan.plan_trt(vlm, split, options, version)


def export_trt(
    model: str,
    out: Path,
    options: TrtOptions,
    *,
    calibration: CalibrationOptions | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> TrtResult:
    """Export `model` for TensorRT into the folder `out`: graphs, engines where they can be built, build scripts.

    The gate (`verify`) judges the graphs in ONNX Runtime; engines that no GPU could run here are *not run*, and never
    passed.
    Raises as `vlmexport.trt_pipeline.export_trt`.
    """
    from vlmexport import trt_pipeline

    return trt_pipeline.export_trt(
        model,
        out,
        options,
        calibration=calibration,
        force=force,
        verify=verify,
        progress=progress or SilentProgress(),
        lora=lora,
        trust_remote_code=trust_remote_code,
    )


def quantize_checkpoint(
    model: str,
    out: Path,
    options: CheckpointOptions,
    *,
    calibration: CalibrationOptions | None = None,
    verify: bool = True,
    force: bool = False,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> CheckpointResult:
    """Write `model` into `out` as a Hugging Face checkpoint with a quantized decoder and, with `verify`, check it.

    Raises `BadInputError` when `out` exists and `force` is False.
    """
    from vlmexport import quantize_pipeline

    return quantize_pipeline.quantize_checkpoint(
        model,
        out,
        options,
        calibration=calibration,
        force=force,
        verify=verify,
        progress=progress or SilentProgress(),
        lora=lora,
        trust_remote_code=trust_remote_code,
    )


def plan_gguf(
    model: str,
    options: GgufOptions,
    *,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> GgufPlan:
    """What `export_gguf` would do to every weight; nothing is written.

    Raises what the export would raise before it starts to calibrate, but for missing packages that quantize.
    """
    from vlmexport.gguf_pipeline import gguf_vocabulary
    from vlmexport.gguf_plan import plan_gguf as plan
    from vlmexport.model.load import load_vlm

    with (progress or SilentProgress()).stage("load model"):
        vlm = load_vlm(model, lora=lora, trust_remote_code=trust_remote_code)
    made = plan(vlm, options)
    gguf_vocabulary(vlm, made)
    return made


def export_gguf(
    model: str,
    out: Path,
    options: GgufOptions,
    *,
    calibration: CalibrationOptions | None = None,
    verify: bool = True,
    threads: int = 0,
    force: bool = False,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> GgufResult:
    """Export `model` into `out` as two GGUF files for llama.cpp and, with `verify`, judge them there.

    `threads` quantize (0: all cores). Raises `BadInputError` when `out` exists and `force` is False.
    """
    from vlmexport import gguf_pipeline

    return gguf_pipeline.export_gguf(
        model,
        out,
        options,
        calibration=calibration,
        verify=verify,
        threads=threads,
        force=force,
        progress=progress or SilentProgress(),
        lora=lora,
        trust_remote_code=trust_remote_code,
    )


def export_lora(
    adapter: str,
    out: Path,
    *,
    base: str | None = None,
    outtype: str = "f32",
    force: bool = False,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
) -> AdapterGguf:
    """Write the LoRA `adapter` (PEFT's folder or a hub id) of the model `base` as the file `out`, for llama.cpp.

    `base` None is the folder that the adapter names; a hub id that it names is not fetched unasked.
    `outtype` is ``f32`` or ``f16``. Raises `BadInputError` for an adapter of another base, and one that does more than
    llama.cpp can apply at run time (vision modules, DoRA, replaced weights), with the reason.
    """
    from vlmexport.lower.gguf.adapter import export_adapter
    from vlmexport.model.lora_files import local_base

    return export_adapter(
        adapter, out, base or local_base(adapter), outtype, force, progress or SilentProgress(), trust_remote_code
    )


def measure_sensitivity(
    model: str,
    scheme: QuantScheme,
    *,
    calibration: CalibrationOptions | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> Sensitivity:
    """What quantizing each decoder module of `model` alone by `scheme` (data-free) does to its answers.

    `out` is a folder for the heat map (PNG and HTML) and the numbers (JSON).
    """
    from vlmexport.calibrate.heatmap import check_report_folder, write_report
    from vlmexport.calibrate.recipe import CalibrationOptions
    from vlmexport.calibrate.sensitivity import measure_sensitivity as measure
    from vlmexport.pipeline import load_and_split

    watcher = progress or SilentProgress()
    if out is not None:
        check_report_folder(out)
    vlm, split = load_and_split(model, trust_remote_code, watcher, lora=lora)
    found = measure(vlm, split, scheme, calibration or CalibrationOptions(), watcher)
    if out is not None:
        write_report(found, out)
    return found


def verify_artifact(
    path: Path,
    *,
    mmproj: Path | None = None,
    model: str | None = None,
    samples: Path | None = None,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Judge the export in `path` against `model` and `lora` (default: the model and adapter it was made from).

    `path` may be a text GGUF of any tool, with its vision half `mmproj`; then `model` has no default.
    `samples` is a JSONL file of the user's own questions (image path, question, accepted answers).
    """
    from vlmexport.verify.run import verify_artifact as run_gate
    from vlmexport.verify.run import verify_files

    if path.is_file() or mmproj is not None:
        return verify_files(
            path,
            mmproj,
            model=model,
            lora=lora,
            samples=samples,
            progress=progress or SilentProgress(),
            trust_remote_code=trust_remote_code,
        )
    return run_gate(
        path,
        model=model,
        lora=lora,
        samples=samples,
        progress=progress or SilentProgress(),
        trust_remote_code=trust_remote_code,
    )


def bench_artifact(
    path: Path,
    *,
    model: str | None = None,
    record: bool = False,
    progress: Progress | None = None,
    lora: str | None = None,
    trust_remote_code: bool = False,
) -> BenchReport:
    """Measure the export in `path` and, in the same run, PyTorch with the original model.

    `record` keeps the numbers in the export's manifest.
    """
    from vlmexport.bench.run import bench_artifact as run_bench
    from vlmexport.manifest import open_artifact, record_result

    watcher = progress or SilentProgress()
    report = run_bench(path, model=model, lora=lora, progress=watcher, trust_remote_code=trust_remote_code)
    if record:
        record_result(open_artifact(path, check_hashes=False), "bench", report.to_dict())
    return report


def answer_prompt(
    path: Path,
    images: Sequence[Path],
    prompt: str,
    sampling: Sampling,
    on_text: Callable[[str], None],
    *,
    dtype: str | None = None,
    video: Path | None = None,
    fps: float | None = None,
    trust_remote_code: bool = False,
) -> Answer:
    """Answer `prompt` about `images` from the exported files alone; `on_text` gets the text as it comes.

    `dtype` is the one to run of an export in several (None: its primary one). `video` is a folder of frames, of which
    there are `fps` a second, or an animated picture file (`runtime.video.load_video`). `trust_remote_code` lets the
    processor run code that came with the model. Raises `BadInputError` for pictures, videos and prompts that the export
    does not take.
    """
    from vlmexport.manifest import open_artifact
    from vlmexport.runtime.generate import answer
    from vlmexport.runtime.video import load_video
    from vlmexport.variants import as_variant

    artifact = open_artifact(path, check_hashes=False)
    artifact = artifact if dtype is None else as_variant(artifact, dtype)
    frames = None if video is None else load_video(video, fps)
    trust = trust_remote_code
    return answer(artifact, list(images), prompt, sampling, on_text, video=frames, trust_remote_code=trust)


def examine_machine() -> DoctorReport:
    """Which targets, runtimes and accelerators work here, with the fix for those that do not."""
    from vlmexport.doctor import examine

    return examine()
