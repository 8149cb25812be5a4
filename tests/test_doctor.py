import importlib.metadata

import pytest

from vlmexport import doctor
from vlmexport.doctor import Finding, examine, provider_fix, provider_runs
from vlmexport.quantize.ggml import library
from vlmexport.target import target_names


def by_name(kind: str) -> dict[str, Finding]:
    return {f.name: f for f in examine().findings if f.kind == kind}


def test_every_target_has_a_finding_and_the_cpu_works() -> None:
    targets = by_name("targets")
    assert sorted(targets) == target_names()
    assert targets["cpu"].works
    assert all(f.works or f.fix for f in targets.values())


def test_a_provider_counts_when_it_computes() -> None:
    assert provider_runs("CPUExecutionProvider")


def test_a_provider_that_falls_back_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "onnxruntime_providers", lambda: ("CUDAExecutionProvider", "CPUExecutionProvider"))
    monkeypatch.setattr(doctor, "provider_runs", lambda provider: provider == "CPUExecutionProvider")
    cuda = by_name("targets")["cuda"]
    assert not cuda.works
    assert "no device or driver" in cuda.detail


def test_the_gpu_wheel_is_installed_last() -> None:
    fix = provider_fix("CUDAExecutionProvider")
    assert fix.startswith("pip install 'vlmexport[gpu]'")
    assert "--force-reinstall --no-deps 'onnxruntime-gpu" in fix.split("&&")[1]


def test_a_missing_package_has_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    finding = by_name("packages")["safetensors"]
    assert (finding.works, finding.fix) == (False, "pip install vlmexport")


def test_llama_cpp_of_another_version_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert by_name("targets")["llamacpp"].works
    monkeypatch.setattr(library, "_installed_version", lambda: "2026.1.1")
    finding = by_name("targets")["llamacpp"]
    assert (finding.works, finding.fix) == (False, "pip install 'vlmexport[gguf]'")
    assert "xllamacpp 2026.1.1 is installed" in finding.detail
    assert not by_name("extras")["gguf"].works


def test_cpu_flags_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "cpu_flags", lambda: frozenset({"avx2", "fpu"}))
    accelerators = by_name("accelerators")
    assert "avx2" in accelerators
    assert "fpu" not in accelerators
