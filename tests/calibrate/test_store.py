"""Finished steps survive, half-written ones do not, and another calibration's are not taken for one's own."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmexport.calibrate.store import Step, StepStore
from vlmexport.quantize.fold import Fold
from vlmexport.quantize.nf4 import quantize_nf4
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme, make_scheme

SHAPES = [torch.Size([1, 3, 4]), torch.Size([2, 2, 4])]


def made_step() -> Step:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    codes = {
        "a.weight": quantize_rtn(weight, QuantScheme(bits=4, group_size=32)),
        "b.weight": quantize_rtn(weight, QuantScheme(bits=8, group_size=16, symmetric=False)),
        "c.weight": quantize_nf4(weight, make_scheme("nf4"), "c"),
    }
    folds = {
        "norm.weight": Fold(rows=torch.rand(8), offset=1.0),
        "a.weight": Fold(rows=torch.rand(8), columns=torch.rand(64)),
    }
    return Step(codes, folds, {"layer": "x", "weights": {}})


def test_a_step_is_read_back_as_it_was(tmp_path: Path) -> None:
    store, step = StepStore(tmp_path / "new", "one"), made_step()
    assert store.open() is None
    store.begin({"returns_tuple": [False]})
    store.write(0, step)
    again = StepStore(tmp_path / "new", "one")
    assert again.open() == {"returns_tuple": [False]}
    assert again.finished() == 1
    codes = again.codes(1)
    assert list(codes) == list(step.codes)
    assert {n: codes[n].digest() for n in codes} == {n: t.digest() for n, t in step.codes.items()}
    assert (codes["c.weight"].codebook is None, codes["a.weight"].zero_point) == (False, None)
    folds = again.folds(1)
    assert folds["norm.weight"].offset == 1.0
    assert folds["norm.weight"].columns is None
    assert torch.equal(folds["a.weight"].columns, step.folds["a.weight"].columns)
    assert again.report(0) == step.report


def test_another_fingerprint_starts_afresh(tmp_path: Path) -> None:
    store = StepStore(tmp_path, "one")
    store.begin({})
    store.new_hidden(0, SHAPES)
    store.write(0, made_step())
    (tmp_path / "of-the-user").write_text("kept")
    other = StepStore(tmp_path, "two")
    assert other.open() is None
    assert other.finished() == 0
    assert [f.name for f in tmp_path.iterdir()] == ["of-the-user"]


def test_hidden_states_become_final_with_their_step(tmp_path: Path) -> None:
    store = StepStore(tmp_path, "one")
    store.begin({})
    for step in range(2):
        hidden = store.new_hidden(step, SHAPES)
        for index, shape in enumerate(SHAPES):
            hidden[index] = torch.full(shape, 10.0 * step + index)
        store.write(step, made_step())
    assert torch.equal(store.hidden(1, SHAPES)[1], torch.full(SHAPES[1], 11.0))
    assert not list(tmp_path.glob("hidden-0000*"))


def test_what_a_killed_run_left_half_written_does_not_count(tmp_path: Path) -> None:
    store = StepStore(tmp_path, "one")
    store.begin({})
    store.write(0, made_step())
    (tmp_path / "step-0001.safetensors.partial").write_bytes(b"half")
    (tmp_path / "hidden-0001.f32.partial").write_bytes(b"half of something longer than the real one" * 99)
    again = StepStore(tmp_path, "one")
    assert again.finished() == 1
    hidden = again.new_hidden(1, SHAPES)
    assert torch.equal(hidden[0], torch.zeros(SHAPES[0]))


def test_a_damaged_note_starts_afresh(tmp_path: Path) -> None:
    store = StepStore(tmp_path, "one")
    store.begin({})
    (tmp_path / "state.json").write_text("{")
    assert StepStore(tmp_path, "one").open() is None
