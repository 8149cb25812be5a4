"""The hint about pages: it changes no value, and other systems are left alone."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator

import pytest
import torch

from vlmexport.model import paging


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    paging._madvise.cache_clear()
    yield
    paging._madvise.cache_clear()


def test_the_content_stays() -> None:
    tensor = torch.arange(100_000)
    paging.drop_pages(tensor)
    assert torch.equal(tensor, torch.arange(100_000))


def test_elsewhere_than_on_linux_no_library_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: None) -> None:
        raise TypeError("what ctypes.CDLL(None) raises on Windows")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(sys, "platform", "win32")
    paging.drop_pages(torch.zeros(100_000))
    monkeypatch.setattr(sys, "platform", "linux")
    paging._madvise.cache_clear()
    with pytest.raises(TypeError, match="Windows"):
        paging.drop_pages(torch.zeros(100_000))
