from pathlib import Path

import pytest

from vlmexport.cli.main import run


@pytest.fixture(scope="session")
def tiny_export(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished export of a tiny model; copy it before changing it."""
    out = tmp_path_factory.mktemp("export") / "tiny"
    assert run(["onnx", "--model", str(tiny_idefics3), "--out", str(out), "--quant", "rtn", "--no-verify", "-q"]) == 0
    return out
