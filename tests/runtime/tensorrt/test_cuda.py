"""The driver's library by ctypes, on a stand-in for it in C whose device memory is the host's. No GPU was ever used."""

import ctypes
import gc
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from vlmexport.errors import NotPossibleHereError
from vlmexport.runtime.tensorrt import cuda

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stand-in")


def compile_driver(folder: Path, devices: int) -> str:
    out = folder / "libcuda.so.1"
    source = str(HERE / "fake_driver.c")
    subprocess.run(["cc", "-shared", "-fPIC", f"-DDEVICES={devices}", "-o", str(out), source], check=True, timeout=60)
    return str(out)


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return compile_driver(tmp_path_factory.mktemp("driver"), 1)


@pytest.fixture
def fake(driver, monkeypatch):
    monkeypatch.setattr(cuda, "DRIVER", driver)
    return ctypes.CDLL(driver)


def test_the_gpu_is_described(fake):
    assert cuda.gpu_status() == cuda.GpuStatus("Fake GPU", "8.6", 6 << 32)
    assert cuda.gpu_status().present


def test_memory_is_written_and_read_at_its_address_and_given_back(fake):
    device = cuda.CudaDevice()
    buffer = cuda.DeviceBuffer(device, 48)
    assert buffer.address % 256 == 0
    values = np.arange(12, dtype=np.float32)
    device.upload(buffer.address, values)
    found = np.empty_like(values)
    device.download(found, buffer.address)
    device.synchronize()
    assert (found == values).all()
    device.zero(buffer.address, 24)
    device.download(found, buffer.address)
    assert found.tolist() == [0.0] * 6 + values[6:].tolist()
    before = fake.fake_live()
    del buffer
    gc.collect()
    assert fake.fake_live() == before - 1


def test_a_failed_call_is_named_with_the_drivers_words(fake):
    with pytest.raises(cuda.CudaError, match=r"cuMemAlloc_v2 failed with error 2 \(out of memory\)"):
        cuda.CudaDevice().allocate(1 << 41)


def test_bytes_that_are_not_in_one_piece_are_refused(fake):
    with pytest.raises(ValueError, match="not in one piece"):
        cuda.CudaDevice().upload(1, np.zeros((4, 4))[:, ::2])


def test_without_a_driver_the_reason_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "DRIVER", "libcuda-that-is-not-there.so.1")
    status = cuda.gpu_status()
    assert not status.present
    assert "there is no NVIDIA GPU driver here" in status.reason
    with pytest.raises(NotPossibleHereError, match="no NVIDIA GPU driver"):
        cuda.CudaDevice()


def test_a_library_without_the_functions_is_no_driver(monkeypatch):
    monkeypatch.setattr(cuda, "DRIVER", "libc.so.6")
    assert "cuInit" in cuda.gpu_status().reason


@pytest.mark.parametrize(("devices", "words"), [(0, "no GPU that this process may use"), (-1, r"cuInit failed")])
def test_a_driver_without_a_gpu_is_told(tmp_path, monkeypatch, devices, words):
    monkeypatch.setattr(cuda, "DRIVER", compile_driver(tmp_path, devices))
    status = cuda.gpu_status()
    assert not status.present
    assert words in status.reason
