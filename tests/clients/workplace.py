"""Where the JavaScript clients run: their packages come by `npm ci` into a cache, once for each lock file."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmexport.runtime.protocol import ModelInputs

HERE = Path(__file__).parent
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# The scripts that npm packages run when they are installed would load libraries of GPUs; none is needed.
_INSTALL = ("ci", "--ignore-scripts", "--no-audit", "--no-fund")
_PIXEL_MASK_DIMS = 4  # [prompts, pictures, height, width]


@dataclass(frozen=True)
class Clients:
    """A folder with the client scripts and their packages."""

    folder: Path

    def node(self, jobs: Path) -> list[dict[str, Any]]:
        """What Node made of each job: its ``results``, or an ``error``."""
        return self._run("node.mjs", jobs, jobs.with_name("node.json"))

    def browser(self, jobs: Path) -> dict[str, Any]:
        """What a headless Chromium made of each job (``results``), and the requests to other places (``foreign``)."""
        return self._run("browser.mjs", jobs, jobs.with_name("browser.json"), browser())

    def web(self, job: Path) -> dict[str, Any]:
        """What the page of `vlmexport web` showed for each of the `asks` (``results``), its requests and its errors."""
        result: dict[str, Any] = self._run("web.mjs", job, job.with_name("web.json"), browser())
        return result

    @property
    def transformersjs(self) -> Path:
        """Folder of the npm package."""
        return self.folder / "node_modules" / "@huggingface" / "transformers"

    def _run(self, script: str, jobs: Path, out: Path, *more: str) -> Any:
        command = ["node", script, str(jobs), str(out), *more]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, f"{script}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return json.loads(out.read_text(encoding="utf-8"))


def browser() -> str:
    """A Chromium of this machine: the one in VLMEXPORT_CHROMIUM or on the path; "" for the one of the npm packages."""
    named = os.environ.get("VLMEXPORT_CHROMIUM")
    return named or next((found for name in _BROWSERS if (found := shutil.which(name))), "")


def install(cache: Path) -> Clients:
    """The clients below `cache`, installed now where they are not yet; several processes may ask at once."""
    lock_file = (HERE / "package-lock.json").read_bytes()
    folder = cache / hashlib.sha256(lock_file).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        for file in [*HERE.glob("*.mjs"), *HERE.glob("*.json"), *HERE.glob("*.html")]:
            shutil.copyfile(file, folder / file.name)
        if not (folder / "node_modules" / ".finished").is_file():
            done = subprocess.run(["npm", *_INSTALL], cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"npm ci: {done.stderr[-4000:]}"
            (folder / "node_modules" / ".finished").touch()
    return Clients(folder)


@dataclass(frozen=True)
class Case:
    """A question about pictures (files in the job's folder), with what Python's processor made of it."""

    text: str
    images: tuple[Path, ...]
    inputs: ModelInputs


def write_jobs(root: Path, folder: Path, jobs: Sequence[dict[str, Any]], cases: Sequence[Case], *, tokens: int) -> Path:
    """A file of `jobs` (``model``, a folder in `root`, and ``dtype``), each of which answers all of `cases`."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = [_case(folder, index, case) for index, case in enumerate(cases)]
    whole = [{**job, "max_new_tokens": tokens, "cases": asked} for job in jobs]
    file = folder / "jobs.json"
    file.write_text(json.dumps({"root": str(root), "folder": str(folder), "jobs": whole}), encoding="utf-8")
    return file


def _case(folder: Path, index: int, case: Case) -> dict[str, Any]:
    images = []
    for place, image in enumerate(case.images):
        images.append(f"{index}.{place}{image.suffix}")
        shutil.copyfile(image, folder / images[-1])
    ids = case.inputs.input_ids
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), **case.inputs.pixel_inputs}
    inputs = []
    for name, array in arrays.items():
        # Masks of pixels are booleans there, masks of patches are numbers.
        is_mask = name == "pixel_attention_mask" and array.ndim == _PIXEL_MASK_DIMS
        dtype = "float32" if name == "pixel_values" else "bool" if is_mask else "int64"
        made = np.ascontiguousarray(array, dtype)
        file = f"{index}.{name}.bin"
        (folder / file).write_bytes(made.tobytes())
        inputs.append({"name": name, "dtype": dtype, "dims": list(made.shape), "file": file})
    return {"text": case.text, "images": images, "inputs": inputs}
