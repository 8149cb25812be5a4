"""How builds end, with a stand-in for NVIDIA's module (`fakes`): crashes, signals, hangs, and TensorRT itself."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from vlmexport.engines import EngineSpec, ShapeProfile
from vlmexport.errors import BadInputError, NotPossibleHereError, UnsupportedModelError, VlmExportError
from vlmexport.gpu import load_gpu
from vlmexport.lower.tensorrt import build as building
from vlmexport.lower.tensorrt.build import build_engine, build_engines, require_rtx, rtx_version
from vlmexport.lower.tensorrt.worker import Request, build, one_line
from vlmexport.progress import SilentProgress
from vlmexport.runtime.tensorrt import cuda

FAKES = Path(__file__).parent / "fakes"
CACHE = ((1, 2, 48, 16),) * 3
PROFILE = ShapeProfile("prefill", {"inputs_embeds": ((1, 1, 8), (1, 4, 8), (1, 48, 8)), "past": CACHE})
SPEC = EngineSpec("decoder", "decoder", (PROFILE,))


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an engine would go; workers find the stand-in."""
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    (tmp_path / "decoder.onnx").write_bytes(b"graph")
    return tmp_path / "sm80" / "decoder.engine"


def run(out: Path, target: str = "SM80", **kwargs: Any) -> Any:
    return build_engine(out.parents[1] / "decoder.onnx", SPEC, [target], out, **kwargs)


def refusal(out: Path, kind: type[VlmExportError], target: str = "SM80", **kwargs: Any) -> str:
    """The one line of the error; nothing is left in the engine's folder."""
    with pytest.raises(kind) as caught:
        run(out, target, **kwargs)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    assert list(out.parent.iterdir()) == []
    return str(caught.value)


def test_an_engine_is_built_by_the_worker_in_its_own_process(out: Path) -> None:
    result = run(out)
    assert out.read_bytes() == b"SM80 ((1, 1, 8), (1, 4, 8), (1, 48, 8))"
    assert (result.version, result.bytes, result.layers) == ("9.9.9", out.stat().st_size, 7)
    assert list(out.parent.iterdir()) == [out]


def test_no_target_means_all_portable_ones(out: Path) -> None:
    with pytest.raises(NotPossibleHereError, match="builds nothing for SM86"):  # the stand-in has two
        build_engine(out.parents[1] / "decoder.onnx", SPEC, [], out)


def test_an_older_engine_survives_a_failed_build(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(out)
    before = out.read_bytes()
    monkeypatch.setenv("FAKE_TRT", "abort")
    with pytest.raises(VlmExportError):
        run(out)
    assert (out.read_bytes(), list(out.parent.iterdir())) == (before, [out])


@pytest.mark.parametrize(
    ("ending", "kind", "words"),
    [
        ("refuse", UnsupportedModelError, "cannot build decoder.onnx for SM80: no kernel for it"),
        ("silent", NotPossibleHereError, "cannot build decoder.onnx for SM80 and does not say why"),
        ("crash", NotPossibleHereError, "for SM80, its compiler crashed: MyelinCheckException: a.cpp:1: CHECK(0) fai"),
        ("unread", UnsupportedModelError, "cannot read decoder.onnx and does not say why"),
        ("abort", NotPossibleHereError, "the library died of SIGABRT; its last word: bad optional access"),
        ("raise", VlmExportError, "exit status 1; its last word: TypeError: incompatible function arguments"),
        ("kill", NotPossibleHereError, "was killed at 0.0 GB, most often because the machine ran out of memory"),
        ("profile", BadInputError, "profile 'prefill' of decoder.onnx: its shapes do not fit the graph's inputs"),
        ("broken", NotPossibleHereError, "cannot load TensorRT for RTX: libtensorrt_rtx.so.1: cannot open shared"),
    ],
)
def test_every_end_of_a_build_is_one_line(
    out: Path, monkeypatch: pytest.MonkeyPatch, ending: str, kind: type[VlmExportError], words: str
) -> None:
    monkeypatch.setenv("FAKE_TRT", ending)
    assert words in refusal(out, kind)


def test_the_return_value_of_set_compute_capability_is_checked(out: Path) -> None:
    assert "builds nothing for SM90" in refusal(out, NotPossibleHereError, "SM90")


def test_a_build_that_hangs_is_stopped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_TRT", "hang")
    assert "stopped after 0.5 seconds" in refusal(out, NotPossibleHereError, timeout=0.5)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_worker_and_leaves_nothing(out: Path, monkeypatch: pytest.MonkeyPatch, sent: int) -> None:
    monkeypatch.setenv("FAKE_TRT", "hang")
    script = (
        "from tests.lower.tensorrt.test_worker import run; from pathlib import Path; import signal, sys\n"
        # What a shell starts in the background ignores Ctrl-C, and so would everything below it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "run(Path(sys.argv[1]))"
    )  # fmt: skip
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKES), root])}
    with subprocess.Popen([sys.executable, "-c", script, str(out)], env=environment, stderr=subprocess.PIPE) as parent:
        worker = _wait_for_child(parent.pid)
        parent.send_signal(sent)
        parent.communicate(timeout=20)
    assert parent.returncode != 0
    _wait_until_gone(worker)
    assert list(out.parent.iterdir()) == []


def test_an_engine_that_cannot_be_written_says_so(out: Path) -> None:
    out.parent.write_bytes(b"a file where the folder would be")
    with pytest.raises(NotPossibleHereError, match=r"cannot write .*sm80: File exists"):
        run(out)


def test_profiles_name_the_graphs_inputs(fake: ModuleType, tmp_path: Path) -> None:
    profile = ShapeProfile("prefill", {"past": CACHE, "mask": CACHE})
    request = Request("rtx", "decoder.onnx", str(tmp_path / "e"), ("SM80",), (profile,))
    with pytest.raises(BadInputError, match=r"no shapes for the inputs \['inputs_embeds'\].*no input \['mask'\]"):
        build(request, fake, lambda line: None)


def test_shapes_that_the_module_refuses_at_once_are_named(fake: ModuleType, tmp_path: Path) -> None:
    profile = ShapeProfile("prefill", {**PROFILE.shapes, "past": ((1, 2, 47, 16),) * 3})
    request = Request("rtx", "decoder.onnx", str(tmp_path / "e"), ("SM80",), (profile,))
    with pytest.raises(BadInputError, match="input 'past' cannot have the shapes 1x2x47x16, 1x2x47x16 and 1x2x47x16"):
        build(request, fake, lambda line: None)


@pytest.fixture
def fake() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fake_tensorrt_rtx", FAKES / "tensorrt_rtx.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def a10(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu_status", lambda: cuda.GpuStatus("NVIDIA A10", "8.6", 24 << 30))


def _proper(tmp_path: Path, capability: str) -> Request:
    return Request("trt", "decoder.onnx", str(tmp_path / "e"), (capability,), (PROFILE,))


@pytest.mark.usefixtures("a10")
def test_tensorrt_itself_builds_for_the_gpu_that_is_there(fake: ModuleType, tmp_path: Path) -> None:
    said: list[str] = []
    built = build(_proper(tmp_path, "8.6"), fake.TensorRT, said.append)
    assert (tmp_path / "e").read_bytes() == b"here ((1, 1, 8), (1, 4, 8), (1, 48, 8))"
    assert built.version == "11.4.0.106"
    assert said == ["W a warning"]


@pytest.mark.usefixtures("a10")
def test_tensorrt_itself_refuses_another_gpu(fake: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(NotPossibleHereError, match=r"NVIDIA A10 with compute capability 8\.6, not 8\.0"):
        build(_proper(tmp_path, "8.0"), fake.TensorRT, lambda line: None)


def test_tensorrt_itself_needs_a_gpu(fake: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "gpu_status", lambda: cuda.GpuStatus(reason="no driver"))
    with pytest.raises(NotPossibleHereError, match=r"there is none here \(no driver\): run build_engines\.sh"):
        build(_proper(tmp_path, "8.0"), fake.TensorRT, lambda line: None)


def test_engines_of_tensorrt_itself_lie_under_the_gpus_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.lower.tensorrt.graphs import part_of, write_decoder

    asked: list[Any] = []

    def build_engine(graph: Path, spec: EngineSpec, targets: Any, path: Path, **options: Any) -> Any:
        asked.append((graph.name, targets, options["flavour"]))
        path.parent.mkdir(parents=True)
        path.write_bytes(b"engine")
        return building.BuildResult("11.4.0.106", 1.0, 1.0, 1, 6, 7)

    monkeypatch.setattr(building, "build_engine", build_engine)
    parts = {"decoder": part_of(write_decoder(tmp_path))}
    (built,) = build_engines(tmp_path, [SPEC], parts, load_gpu("a10"), SilentProgress(), flavour="trt")
    assert asked == [("decoder.onnx", ("8.6",), "trt")]
    assert built.path == tmp_path / "engines" / "a10" / "decoder.engine"
    assert (built.sidecar.flavour, built.sidecar.compute_capabilities, built.sidecar.gpu) == ("trt", ("8.6",), "a10")


def test_tensorrt_itself_builds_nothing_portable(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="TensorRT builds no portable engines"):
        build_engines(tmp_path, [SPEC], {}, None, SilentProgress(), flavour="trt")


def test_without_the_package_the_install_line_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert rtx_version() is None
    for gpu in (None, load_gpu("a100")):
        with pytest.raises(NotPossibleHereError, match=r"pip install 'vlmexport\[rtx\]'"):
            build_engines(tmp_path, [SPEC], {}, gpu, SilentProgress())
    with pytest.raises(NotPossibleHereError, match="needs TensorRT for RTX"):
        require_rtx()


def test_asking_for_the_version_does_not_load_the_library() -> None:
    script = (
        "import sys; from vlmexport.lower.tensorrt.build import rtx_version; rtx_version()\n"
        "assert not [m for m in sys.modules if m.startswith(('tensorrt', 'torch', 'onnx'))], 'loaded'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ('!hasPrecision && "Setting it is not supported."', "Setting it is not supported."),
        ("Assertion failed: creator && kind(x) == Kind::kV3: NonZero was not found.", "NonZero was not found."),
        ("IBuilder::build: Error Code 1: Myelin ([a.cpp:1: f] no int4. In g at /_src/b.cpp:2012)", "no int4."),
        ("IBuilder::build: Error Code 4: API Usage Error (No (such) input. In g at /_src/b.cpp:2)", "No (such) input."),
        ("No module named 'x' (really)", "No module named 'x' (really)"),
        ("two\n  lines", "two lines"),
    ],
)
def test_messages_of_the_library_become_one_line(message: str, said: str) -> None:
    assert one_line(message) == said


def _wait_for_child(pid: int) -> int:
    """The process id of the worker that `pid` started, once it hangs in its build."""
    for _ in range(400):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children and b"worker" in Path(f"/proc/{children[0]}/cmdline").read_bytes():
            time.sleep(0.3)
            return int(children[0])
        time.sleep(0.05)
    raise AssertionError("no worker was started")


def _wait_until_gone(pid: int) -> None:
    for _ in range(400):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} still runs")
