"""The build scripts, run: with stand-ins for trtexec and nvidia-smi, and with TensorRT for RTX itself."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lower.tensorrt.graphs import DecoderShape, part_of, write_decoder
from vlmexport.engines import EngineSpec, Sidecar, TrtLimits, decoder_profiles, graph_digests
from vlmexport.errors import ArtifactError
from vlmexport.gpu import Gpu
from vlmexport.lower.tensorrt.script import VERSIONS, write_build_scripts
from vlmexport.manifest import Manifest, PartFile, open_artifact, write_manifest

LIMITS = TrtLimits(2, 48, 1)
MODEL = {"gpu": "a100-80", "limits": {"max_batch": 2, "max_seq": 48, "max_images": 1}}
A100 = Gpu("a100-80", "NVIDIA A100 80 GB", "", (), "8.0", 80 << 30, 2e12, 3e14, False, "SM80", ("fp16",), {}, "here")
H100 = Gpu("h100", "NVIDIA H100", "", (), "9.0", 80 << 30, 3e12, 9e14, False, "", ("fp16",), {}, "here")
# It records its arguments, one line each, and writes what it was asked to save.
TRTEXEC = """#!/bin/bash
echo '&&&& RUNNING TensorRT.trtexec [TensorRT v{number}] [b{build}] # trtexec'
[[ "$1" == --help ]] && exit 0
printf '%s\\n' "$@" >> "$RECORD"
echo "$CUDA_DEVICE_ORDER $CUDA_VISIBLE_DEVICES" > "$RECORD.gpu"
for a in "$@"; do [[ "$a" == --saveEngine=* ]] && printf engine > "${{a#--saveEngine=}}"; done
exit {status}
"""


def export(folder: Path, gpu: Gpu = A100) -> tuple[EngineSpec, PartFile]:
    part = part_of(write_decoder(folder, DecoderShape(layers=1)))
    spec = EngineSpec("decoder", "decoder", decoder_profiles(part, LIMITS))
    assert write_build_scripts(folder, MODEL, {"decoder": part}, [spec], gpu) == (
        "build_engines.sh",
        "build_engines.py",
        "engines.json",
    )
    return spec, part


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export under a name that a careless script breaks on."""
    return tmp_path / 'it\'s $(odd) "é" = name'


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    return tools_at(tmp_path / "bin")


def tools_at(folder: Path, number: int = 110400, build: int = 106, capability: str = "8.0", status: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    smi = f'#!/bin/bash\nprintf \'%s\\n\' "$@" > "$RECORD.smi"\necho {capability}\n'
    for name, text in (("trtexec", TRTEXEC.format(number=number, build=build, status=status)), ("nvidia-smi", smi)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def run_sh(folder: Path, tools: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        **more,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "RECORD": str(tools / "record"),
        "PYTHON": sys.executable,
    }
    return subprocess.run(
        ["bash", str(folder / "build_engines.sh"), *arguments], env=env, capture_output=True, text=True, check=False
    )


def run_py(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "build_engines.py"), *arguments]
    return subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=False)


def recorded(tools: Path) -> list[str]:
    return (tools / "record").read_text().splitlines()


def test_trtexec_gets_the_profiles_of_the_specification(folder: Path, tools: Path) -> None:
    spec, part = export(folder)
    done = run_sh(folder, tools, "--device", "3")
    assert done.returncode == 0, done.stderr
    arguments = recorded(tools)
    engine = folder / "engines" / "a100-80" / "decoder.engine"
    assert arguments[:5] == [
        f"--onnx={folder / 'decoder.onnx'}",
        f"--saveEngine={engine}",
        f"--timingCacheFile={engine.with_name('timing.cache')}",
        "--skipInference",
        "--device=0",
    ]
    assert parsed_profiles(arguments[5:]) == [p.shapes for p in spec.profiles]
    assert gpus(tools) == ("3", "PCI_BUS_ID 3")
    assert not any(a.startswith(("--fp16", "--int8", "--stronglyTyped", "--precision")) for a in arguments)
    assert {t.name for t in part.inputs} == spec.profiles[0].shapes.keys()


def gpus(tools: Path) -> tuple[str, str]:
    """The GPU that nvidia-smi was asked about, and what trtexec could see."""
    (asked,) = [w for w in (tools / "record.smi").read_text().split() if w.startswith("--id=")]
    return asked.removeprefix("--id="), (tools / "record.gpu").read_text().strip()


def test_the_gpu_that_is_visible_is_checked_and_built_for(folder: Path, tools: Path) -> None:
    export(folder)
    for visible, asked in (("2,5", "2"), ("GPU-12ab", "GPU-12ab"), ("", "0")):
        assert run_sh(folder, tools, CUDA_VISIBLE_DEVICES=visible).returncode == 0
        assert gpus(tools) == (asked, f"PCI_BUS_ID {asked}")
    assert run_sh(folder, tools, "--device", "1", CUDA_VISIBLE_DEVICES="2").returncode == 0
    assert gpus(tools) == ("1", "PCI_BUS_ID 1")


def test_the_python_script_builds_on_the_gpu_that_it_checks(folder: Path, tmp_path: Path, tools: Path) -> None:
    export(folder)
    shim = tmp_path / "shim"
    shim.mkdir()
    seen = "os.environ['CUDA_DEVICE_ORDER'], os.environ['CUDA_VISIBLE_DEVICES']"
    (shim / "tensorrt.py").write_text(
        f"import os\nopen(os.environ['RECORD'] + '.gpu', 'w').write(' '.join(({seen})))\n__version__ = '10.0'\n"
    )
    env = {"PYTHONPATH": str(shim), "PATH": f"{tools}:{os.environ['PATH']}", "RECORD": str(tools / "record")}
    assert "TensorRT 10.0 is older" in run_py(folder, "--device", "3", **env).stderr
    assert (tools / "record.gpu").read_text() == "PCI_BUS_ID 3"
    (shim / "tensorrt.py").write_text((shim / "tensorrt.py").read_text().replace("10.0", "11.4"))
    run_py(folder, CUDA_VISIBLE_DEVICES="4,5", **env)
    assert gpus(tools) == ("4", "PCI_BUS_ID 4")


def parsed_profiles(arguments: list[str]) -> list[dict[str, Any]]:
    """The shapes as trtexec reads them: after ``--profile=N`` one option each for smallest, usual and largest."""
    profiles = []
    for index in range(0, len(arguments), 4):
        marker, *rest = arguments[index : index + 4]
        assert marker == f"--profile={index // 4}"
        columns = []
        for option, text in zip(("--minShapes=", "--optShapes=", "--maxShapes="), rest, strict=True):
            assert text.startswith(option)
            pairs = [pair.rpartition(":") for pair in text.removeprefix(option).split(",")]
            columns.append({name: tuple(map(int, dims.split("x"))) for name, _, dims in pairs})
        profiles.append({name: tuple(c[name] for c in columns) for name in columns[0]})
    return profiles


def test_the_sidecar_after_trtexec_is_one_that_the_loader_reads(folder: Path, tools: Path) -> None:
    spec, _ = export(folder)
    done = run_sh(folder, tools)
    assert "warning" not in done.stderr
    assert "built, not run" in done.stdout
    engine = folder / "engines" / "a100-80" / "decoder.engine"
    sidecar = Sidecar.read(engine)
    assert sidecar.flavour == "trt"
    assert sidecar.version == VERSIONS["trt"] == "11.4.0.106"
    assert (sidecar.compute_capabilities, sidecar.gpu, sidecar.bytes) == (("8.0",), "a100-80", 6)
    assert sidecar.spec == spec
    assert sidecar.graph == graph_digests(folder / "decoder.onnx")
    sidecar.write(engine)
    assert Sidecar.read(engine) == sidecar


def test_another_tensorrt_is_warned_about_and_recorded(folder: Path, tmp_path: Path) -> None:
    export(folder)
    done = run_sh(folder, tools_at(tmp_path / "bin", 110501, 7))
    assert done.returncode == 0
    assert "11.5.1.7 is not 11.4.0.106" in done.stderr
    assert Sidecar.read(folder / "engines" / "a100-80" / "decoder.engine").version == "11.5.1.7"


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"number": 101400}, "TensorRT 10.14.0.106 is older than 11.0"),
        ({"capability": "9.0"}, "compute capability 9.0, this export was made for NVIDIA A100 80 GB (8.0)"),
    ],
)
def test_the_wrong_machine_is_refused_before_the_build(
    folder: Path, tmp_path: Path, tool: dict[str, Any], message: str
) -> None:
    export(folder)
    tools = tools_at(tmp_path / "bin", **tool)
    done = run_sh(folder, tools)
    assert done.returncode == 1
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not (tools / "record").exists()


def test_the_gpu_check_can_be_skipped(folder: Path, tmp_path: Path) -> None:
    export(folder)
    assert run_sh(folder, tools_at(tmp_path / "bin", capability="9.0"), "--skip-gpu-check").returncode == 0


def test_a_failed_trtexec_leaves_no_sidecar(folder: Path, tmp_path: Path) -> None:
    export(folder)
    assert run_sh(folder, tools_at(tmp_path / "bin", status=7)).returncode == 7
    assert not list(folder.rglob("*.engine.json"))


def test_missing_trtexec_and_unknown_names_stop(folder: Path, tmp_path: Path, tools: Path) -> None:
    export(folder)
    missing = subprocess.run(
        ["bash", str(folder / "build_engines.sh")],
        env={**os.environ, "TRTEXEC": "no-such-trtexec", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (missing.returncode, "no-such-trtexec is not on PATH" in missing.stderr) == (1, True)
    done = run_sh(folder, tools, "encoder")
    assert (done.returncode, "there is no engine 'encoder'; this export has decoder" in done.stderr) == (1, True)
    assert run_sh(folder, tools, "--fp16").returncode == 1


def test_a_graph_of_fixed_shapes_gets_no_profile(folder: Path, tools: Path) -> None:
    spec, part = export(folder)
    job = json.loads((folder / "engines.json").read_text())
    assert [t.name for t in part.inputs if "batch_size" in t.dims] == job["engines"][0]["dynamic"]
    job["engines"][0]["dynamic"] = []
    (folder / "engines.json").write_text(json.dumps(job))
    run_sh(folder, tools)
    assert not any("Shapes" in a or "profile" in a for a in recorded(tools))
    assert spec.profiles


def test_the_shell_script_is_well_formed(folder: Path) -> None:
    export(folder)
    subprocess.run(["bash", "-n", str(folder / "build_engines.sh")], check=True)
    assert os.access(folder / "build_engines.sh", os.X_OK)
    assert os.access(folder / "build_engines.py", os.X_OK)


def test_the_python_script_needs_no_vlmexport(folder: Path) -> None:
    export(folder)
    text = (folder / "build_engines.py").read_text()
    assert "vlmexport" not in "".join(line for line in text.splitlines() if "import" in line)
    command = [sys.executable, "-I", "-S", str(folder / "build_engines.py"), "--names"]
    done = subprocess.run(command, capture_output=True, check=True, cwd="/")
    assert done.stdout == b"decoder\0"


def test_rtx_builds_and_its_sidecar_is_read(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    spec, _ = export(folder)
    done = run_py(folder, "--flavour", "rtx", "--only", "decoder")
    assert done.returncode == 0, done.stderr
    sidecar = Sidecar.read(folder / "engines" / "sm80" / "decoder.engine")
    assert (sidecar.flavour, sidecar.compute_capabilities, sidecar.gpu) == ("rtx", ("8.0",), "a100-80")
    assert sidecar.spec == spec
    assert sidecar.bytes > 1000
    assert "not run" in done.stdout


def test_an_engine_that_the_manifest_lists_is_replaced_in_it(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    _, part = export(folder)
    engine = folder / "engines" / "sm80" / "decoder.engine"
    engine.parent.mkdir(parents=True)
    engine.write_bytes(b"an older one")
    write_manifest(folder, Manifest("tensorrt", "tensorrt", {}, {}, {}, {}, {"decoder": part}, (), ()))
    assert run_py(folder, "--flavour", "rtx").returncode == 0
    manifest = open_artifact(folder).manifest
    assert manifest.files["engines/sm80/decoder.engine"].bytes == engine.stat().st_size
    assert "engines/sm80/decoder.engine.json" not in manifest.files


def test_tensorrt_itself_through_its_python_module(folder: Path, tmp_path: Path, tools: Path) -> None:
    """TensorRT for RTX stands in for TensorRT: their modules have the same names."""
    pytest.importorskip("tensorrt_rtx")
    spec, _ = export(folder)
    shim = tmp_path / "shim"
    shim.mkdir()
    (shim / "tensorrt.py").write_text("from tensorrt_rtx import *\n\n__version__ = '11.4.0.106'\n")
    env = {"PYTHONPATH": str(shim), "PATH": f"{tools}:{os.environ['PATH']}", "RECORD": str(tools / "record")}
    done = run_py(folder, "--timing-cache", str(tmp_path / "timings"), **env)
    assert done.returncode == 0, done.stderr
    sidecar = Sidecar.read(folder / "engines" / "a100-80" / "decoder.engine")
    assert (sidecar.flavour, sidecar.version, sidecar.compute_capabilities) == ("trt", "11.4.0.106", ("8.0",))
    assert sidecar.spec == spec
    assert (tmp_path / "timings").is_file()
    tools_at(tools, capability="8.6")
    assert "GPU 0 has compute capability 8.6" in run_py(folder, **env).stderr
    assert run_py(folder, "--compute-capability", "SM80", **env).returncode == 1
    assert run_py(folder, "--flavour", "rtx", "--timing-cache", "x").returncode == 2


def test_rtx_builds_for_the_capabilities_that_are_named(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    export(folder, H100)
    refused = run_py(folder, "--flavour", "rtx")
    assert (refused.returncode, "builds nothing for NVIDIA H100" in refused.stderr) == (1, True)
    done = run_py(folder, "--flavour", "rtx", "--compute-capability", "SM86", "--compute-capability", "SM120")
    assert done.returncode == 0, done.stderr
    sidecar = Sidecar.read(folder / "engines" / "portable" / "decoder.engine")
    assert (sidecar.compute_capabilities, sidecar.gpu) == (("8.6", "12.0"), "")
    for name in ("SM90", "9.0"):
        unknown = run_py(folder, "--flavour", "rtx", "--compute-capability", name)
        assert unknown.returncode == 1
        assert f"does not build for {name}, but for SM75, SM80" in unknown.stderr
    assert [p.name for p in (folder / "engines").iterdir()] == ["portable"]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_a_missing_library_is_one_line(folder: Path) -> None:
    export(folder)
    missing = run_py(folder, "--skip-gpu-check")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "NVIDIA's installation guide" in missing.stderr
    assert "pip install tensorrt" not in missing.stderr


def test_a_graph_that_the_parser_refuses_is_named(folder: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    export(folder)
    (folder / "decoder.onnx").write_bytes(b"no graph")
    refused = run_py(folder, "--flavour", "rtx")
    assert (refused.returncode, "decoder.onnx was refused" in refused.stderr) == (1, True)
    assert not (folder / "engines").exists()


def test_a_job_of_another_version_is_refused(folder: Path) -> None:
    export(folder)
    job = json.loads((folder / "engines.json").read_text())
    (folder / "engines.json").write_text(json.dumps({**job, "version": 9}))
    assert "use the script of its export" in run_py(folder, "--names").stderr


def test_data_outside_the_export_is_refused(tmp_path: Path) -> None:
    export(tmp_path / "whole")
    (tmp_path / "whole" / "decoder.onnx.data").unlink()
    part = part_of(tmp_path / "whole" / "decoder.onnx")
    spec = EngineSpec("decoder", "decoder", decoder_profiles(part, LIMITS))
    with pytest.raises(ArtifactError, match="missing"):
        write_build_scripts(tmp_path / "whole", MODEL, {"decoder": part}, [spec], A100)
