"""The wheel has one top-level package, all of it, and the data it needs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    # From a copy: a `build` folder left in the checkout would leak old files into the wheel.
    source = tmp_path_factory.mktemp("source")
    for folder in ("vlmexport", "targets", "calibration"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, source / file)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_only_vlmexport_is_at_the_top(names: set[str]) -> None:
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"vlmexport"}


def test_every_module_is_inside(names: set[str]) -> None:
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vlmexport").rglob("*.py")}
    assert modules - names == set(), "add the package to `packages` in pyproject.toml"


def test_profiles_are_inside(names: set[str]) -> None:
    folder = ROOT / "targets"
    profiles = {f"vlmexport/targets/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.toml")}
    assert {"vlmexport/targets/cpu.toml", "vlmexport/targets/trt/a100-80.toml"} <= profiles
    assert profiles <= names


def test_what_an_export_copies_into_its_folder_is_inside(names: set[str]) -> None:
    templates = ROOT / "vlmexport" / "lower" / "tensorrt" / "templates"
    files = {p.relative_to(ROOT).as_posix() for p in templates.iterdir() if p.suffix in (".sh", ".md", ".py")}
    assert "vlmexport/lower/tensorrt/templates/build_engines.sh" in files
    assert files <= names


def test_the_pages_are_inside(names: set[str]) -> None:
    folders = (ROOT / "vlmexport" / room / "static" for room in ("serve", "web"))
    files = {p.relative_to(ROOT).as_posix() for folder in folders for p in folder.iterdir()}
    assert {"vlmexport/serve/static/page.html", "vlmexport/web/static/worker.js"} <= files
    assert files <= names


def test_the_bundled_model_and_its_questions_are_inside(names: set[str]) -> None:
    demo = ROOT / "vlmexport" / "demo"
    data = {p.relative_to(ROOT).as_posix() for p in demo.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert {"vlmexport/demo/model/model.safetensors", "vlmexport/demo/model/config.json"} <= data
    assert data - names == set()


def test_types_and_licence_are_inside(names: set[str]) -> None:
    assert "vlmexport/py.typed" in names
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
