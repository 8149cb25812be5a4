"""Which of NVIDIA's modules are here: installed, an installer without its libraries, or nothing."""

import sys
from types import SimpleNamespace

import pytest

from vlmexport.runtime.tensorrt.bindings import Library, installed_flavours, load_library, this_machine


@pytest.fixture
def modules(monkeypatch):
    def put(**modules):
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, modules.get(name))

    return put


def test_the_versions_of_what_imports(modules):
    modules(tensorrt=SimpleNamespace(__version__="11.4.0.106"), tensorrt_rtx=SimpleNamespace(__version__="1.7.1.116"))
    assert installed_flavours() == {"rtx": "1.7.1.116", "trt": "11.4.0.106"}
    assert load_library("trt") == Library("trt", "11.4.0.106", sys.modules["tensorrt"])


def test_what_does_not_import_is_not_there(modules):
    modules(tensorrt=SimpleNamespace())
    assert installed_flavours() == {}
    assert load_library("rtx") is None


def test_a_module_whose_libraries_are_missing_is_not_there(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert load_library("trt") is None


def test_this_machine_says_why_it_has_no_gpu():
    machine = this_machine()
    assert machine.gpu.present == (machine.gpu.reason == "")
    assert machine.gpu.present == bool(machine.gpu.compute_capability)
