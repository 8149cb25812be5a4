"""onnxruntime-genai's model builder, in a virtual environment of its own: an optional opponent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REQUIREMENTS = (
    "onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnx-ir==1.1.0", "torch==2.13.0",
    "transformers==5.23.0",
)  # fmt: skip
BUILD_OPTIONS = ("-p", "int4", "-e", "cpu", "--extra_options", "int4_block_size=32", "int4_accuracy_level=4")


class NotRun(Exception):  # noqa: N818 (a result, not an error)
    """The opponent cannot be measured here; the message says why."""


def genai_python(folder: Path) -> Path:
    """The interpreter of a virtual environment with the builder, made below `folder` when needed."""
    environment = folder / "genai-venv"
    python = environment / "bin" / "python"
    if not python.is_file():
        _run([sys.executable, "-m", "venv", str(environment)], "its virtual environment cannot be made")
    if subprocess.run([python, "-c", "import onnxruntime_genai"], capture_output=True, check=False).returncode:
        _run([str(python), "-m", "pip", "install", "-q", *REQUIREMENTS], "it cannot be installed")
    return python


def builder_arguments(llama: Path, out: Path) -> list[str]:
    """Arguments of ``python -m onnxruntime_genai.models.builder``."""
    return ["-m", str(llama), "-o", str(out), *BUILD_OPTIONS]


def build(folder: Path, llama: Path, out: Path) -> Path:
    """The builder's graph of `llama`; built once. Raises `NotRun` when that is not possible."""
    graph = out / "model.onnx"
    if not graph.is_file():
        command = [str(genai_python(folder)), "-m", "onnxruntime_genai.models.builder"]
        _run([*command, *builder_arguments(llama, out)], "its builder failed")
    return graph


def _run(command: list[str], problem: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NotRun(f"{problem}: {last}")
