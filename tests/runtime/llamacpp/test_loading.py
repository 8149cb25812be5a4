"""Files that do not load, wheels that are not ours: one line each, with the reason."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import gguf as gguf_py
import numpy as np
import pytest

from tests.runtime.llamacpp.conftest import Files
from vlmexport.errors import ArtifactError, BadInputError, NotPossibleHereError
from vlmexport.quantize.ggml import library as wheel
from vlmexport.runtime.llamacpp import bindings
from vlmexport.runtime.llamacpp.bindings import LOG, Log, check_defaults, llama
from vlmexport.runtime.llamacpp.runner import LlamaCppRunner
from vlmexport.runtime.llamacpp.structs import Batch, ContextParams, ModelParams, MtmdParams


def test_sizes_of_the_structs_on_this_abi() -> None:
    sizes = {s.__name__: ctypes.sizeof(s) for s in (ModelParams, ContextParams, MtmdParams, Batch)}
    assert sizes == {"ModelParams": 80, "ContextParams": 168, "MtmdParams": 96, "Batch": 56}


def test_a_library_with_other_defaults_is_refused() -> None:
    real = llama()

    class Moved:
        def __getattr__(self, name: str) -> object:
            return getattr(real, name)

        def llama_context_default_params(self) -> ContextParams:
            params = real.llama_context_default_params()
            params.n_batch, params.n_ubatch = params.n_ubatch, params.n_batch
            return params

    check_defaults(real)
    with pytest.raises(NotPossibleHereError, match=r"n_batch is 512 instead of 2048\); pip install 'vlmexport"):
        check_defaults(Moved())


def test_a_library_without_a_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bindings._PROTOTYPES, "llama_does_not_exist", (None, ()))
    with pytest.raises(NotPossibleHereError, match=r"it has no llama_does_not_exist"):
        bindings._library.__wrapped__()


def test_another_version_of_the_wheel_is_refused(monkeypatch: pytest.MonkeyPatch, gguf: Files) -> None:
    monkeypatch.setattr(wheel, "_installed_version", lambda: "2030.1.1")
    with pytest.raises(NotPossibleHereError, match=r"xllamacpp 2030\.1\.1 .*pip install 'vlmexport\[gguf\]'"):
        bindings._library.__wrapped__()


def test_a_missing_file(gguf: Files, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no such file: .*gone\.gguf"):
        LlamaCppRunner(tmp_path / "gone.gguf", None)
    with pytest.raises(BadInputError, match=r"no such file: .*gone\.gguf"):
        LlamaCppRunner(gguf.text, tmp_path / "gone.gguf")


def test_not_a_gguf_file(gguf: Files, tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"x\.gguf is not a GGUF file"):
        LlamaCppRunner(file, None)


def test_a_file_cut_short(gguf: Files, tmp_path: Path) -> None:
    for name, whole in zip(("text", "mmproj"), gguf, strict=True):
        cut = tmp_path / f"{name}.gguf"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        files = (cut, None) if name == "text" else (gguf.text, cut)
        with pytest.raises(ArtifactError, match=rf"llama\.cpp does not load .*{name}\.gguf: \w+") as caught:
            LlamaCppRunner(*files)
        assert "\n" not in str(caught.value)


def test_halves_given_the_wrong_way_round(gguf: Files) -> None:
    with pytest.raises(ArtifactError, match=r"does not load .*mmproj\.gguf: .*CLIP cannot be used as main model"):
        LlamaCppRunner(gguf.mmproj, gguf.text)
    with pytest.raises(ArtifactError, match=r"does not load .*text\.gguf: \w+"):
        LlamaCppRunner(gguf.text, gguf.text)


def test_another_log_in_the_process_does_not_keep_the_reason(gguf: Files) -> None:
    library = bindings.llama()
    library.llama_log_set(None, None)  # as xllamacpp.Server does with its own
    library.mtmd_helper_log_set(None, None)
    with pytest.raises(ArtifactError, match="CLIP cannot be used as main model"):
        LlamaCppRunner(gguf.mmproj, gguf.text)


def test_halves_of_different_models(gguf: Files, tmp_path: Path) -> None:
    other = _narrower(gguf.mmproj, tmp_path / "other.gguf")
    with pytest.raises(ArtifactError, match=r"does not load .*other\.gguf: mismatch .* \(n_embd = 256\)"):
        LlamaCppRunner(gguf.text, other)


def test_an_adapter_that_is_none(gguf: Files) -> None:
    with pytest.raises(ArtifactError, match=r"does not load .*mmproj\.gguf: \w+"):
        LlamaCppRunner(gguf.text, None, lora=gguf.mmproj)


def test_an_adapter_changes_the_logits(gguf: Files, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter.gguf", hidden=256)
    with LlamaCppRunner(gguf.text, None, threads=1, context=256) as base:
        plain = base.prompt_logits(base.prompt("What is this?"))
    with LlamaCppRunner(gguf.text, None, threads=1, context=256, lora=adapter) as tuned:
        changed = tuned.prompt_logits(tuned.prompt("What is this?"))
    assert np.abs(changed - plain).max() > 1e-2


def test_an_adapter_of_another_model(gguf: Files, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"does not load .*adapter\.gguf: \w+"):
        LlamaCppRunner(gguf.text, None, lora=_adapter(tmp_path / "adapter.gguf", hidden=192))


def test_the_log_keeps_errors_only_and_says_each_once() -> None:
    log = Log()
    for level, text in (
        (2, b"info\n"),
        (4, b"load_model: error: no "),
        (5, b"tensor\n"),
        (3, b"warn\n"),
        (4, b"f: no tensor\n"),
    ):
        log._add(level, text, None)
    assert log.message() == "no tensor"
    log.clear()
    assert log.message("nothing said") == "nothing said"


def test_nothing_is_written_to_the_terminal(gguf: Files, capfd: pytest.CaptureFixture[str]) -> None:
    LOG.clear()
    with LlamaCppRunner(*gguf, threads=1, context=256) as made:
        made.greedy(made.prompt("What?"), 1)
    assert capfd.readouterr() == ("", "")


def _narrower(source: Path, out: Path) -> Path:
    """The vision half with a projector of half the width."""
    reader = gguf_py.GGUFReader(source)
    writer = gguf_py.GGUFWriter(out, "clip")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, sub_type=field.types[-1] if len(field.types) > 1 else None
        )
    for tensor in reader.tensors:
        shape = tuple(int(d) for d in reversed(tensor.shape))
        values = np.array(tensor.data, np.float32).reshape(shape)
        writer.add_tensor(tensor.name, values[: len(values) // 2].copy() if tensor.name.startswith("mm.") else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _adapter(out: Path, hidden: int, rank: int = 4) -> Path:
    writer = gguf_py.GGUFWriter(out, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    draw = np.random.default_rng(0)
    writer.add_tensor("blk.0.attn_output.weight.lora_a", draw.normal(size=(rank, hidden)).astype(np.float32))
    writer.add_tensor("blk.0.attn_output.weight.lora_b", draw.normal(size=(hidden, rank)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_a_failed_allocation_is_told(monkeypatch: pytest.MonkeyPatch, gguf: Files) -> None:
    from vlmexport.runtime.llamacpp import decoder

    real = llama()
    fake = SimpleNamespace(
        llama_context_default_params=real.llama_context_default_params, llama_init_from_model=lambda model, params: None
    )
    with LlamaCppRunner(gguf.text, None, threads=1, context=256) as made:
        prompt = made.prompt("What?")
        monkeypatch.setattr(decoder, "llama", lambda: fake)
        with pytest.raises(BadInputError, match=r"llama\.cpp makes no context of 256 tokens"):
            made.greedy(prompt, 1)
