from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.runtime.mock_export import mock_export
from vlmexport.manifest import Artifact
from vlmexport.model.load import VLM, load_vlm
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.torch import TorchRunner


@pytest.fixture(scope="session")
def mock_artifact(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return mock_export(tiny_idefics3, tmp_path_factory.mktemp("mock") / "export")


@pytest.fixture(scope="session")
def vlm(tiny_idefics3: Path) -> VLM:
    loaded = load_vlm(str(tiny_idefics3))
    loaded.model.float()
    return loaded


@pytest.fixture
def onnx_runner(mock_artifact: Artifact) -> OnnxRunner:
    return OnnxRunner(mock_artifact, threads=1)


@pytest.fixture
def torch_runner(vlm: VLM) -> TorchRunner:
    return TorchRunner(vlm)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(1)
    paths = []
    for index, size in enumerate([(40, 30), (24, 48)]):
        pixels: Any = generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(folder / f"{index}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths
