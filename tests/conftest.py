"""Tiny checkpoints shared by all tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tiny_idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("idefics3", tmp_path_factory.mktemp("tiny") / "idefics3")


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava", tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="session")
def tiny_vipllava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("vipllava", tmp_path_factory.mktemp("tiny") / "vipllava")
