"""What a calibration has finished, on disk: one file per step, so that an interrupted run goes on where it was.

A step's file is written under another name and renamed when it is complete, after the hidden states that the next step
starts from; a run that is killed at any moment leaves the last complete step. Files of another model, recipe, scheme or
version (another fingerprint) are thrown away.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlmexport.quantize.fold import Fold
from vlmexport.quantize.statistics import InputPower
from vlmexport.quantize.tensor import QuantizedTensor

_STATE = "state.json"
_PARTIAL = ".partial"
_CODE_FIELDS = ("codes", "scale", "zero_point", "codebook")
_FOLD_FIELDS = ("rows", "columns")


class HiddenStates:
    """Float32 tensors of given shapes in one memory-mapped file, to be read and written one by one."""

    def __init__(self, path: Path, shapes: list[torch.Size]) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=torch.float32)
        self._parts: list[torch.Tensor] = []
        for shape, size in zip(shapes, sizes, strict=True):
            start = sum(part.numel() for part in self._parts)
            self._parts.append(flat[start : start + size].view(shape))

    def __getitem__(self, index: int) -> torch.Tensor:
        """Tensor `index`, a view of the file."""
        return self._parts[index]

    def __setitem__(self, index: int, value: torch.Tensor) -> None:
        """Write tensor `index`."""
        self._parts[index].copy_(value)


@dataclasses.dataclass(frozen=True)
class Step:
    """The result of one finished step, by whole-model name, and its part of the report.

    `powers` are those of the inputs after the folds.
    """

    codes: Mapping[str, QuantizedTensor]
    folds: Mapping[str, Fold]
    report: dict[str, Any]
    powers: Mapping[str, InputPower] = dataclasses.field(default_factory=dict)


class StepStore:
    """The steps ``0, 1, …`` of one calibration in `folder`, which is made when the first is written."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self._fingerprint = fingerprint

    def open(self) -> dict[str, Any] | None:
        """What `begin` noted when these are this calibration's steps; None after clearing away another's."""
        try:
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            state = {}
        if state.get("fingerprint") == self._fingerprint:
            notes: dict[str, Any] = state["notes"]
            return notes
        for pattern in ("step-*", "hidden-*", "note-*", _STATE):
            for file in self.folder.glob(pattern):
                file.unlink()
        return None

    def begin(self, notes: dict[str, Any]) -> None:
        """Start a calibration; `notes` are what a resumed run needs to know besides the steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_json(self.folder / _STATE, {"fingerprint": self._fingerprint, "notes": notes})

    def note(self, key: str, value: dict[str, Any]) -> None:
        """Keep `value` (JSON data) for the rest of this calibration, resumed runs included."""
        self._write_json(self._note_file(key), value)

    def noted(self, key: str) -> dict[str, Any] | None:
        """What was noted under `key`; None when nothing was."""
        file = self._note_file(key)
        if not file.is_file():
            return None
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return value

    def finished(self) -> int:
        """The number of finished steps."""
        count = 0
        while self._file(count).is_file():
            count += 1
        return count

    def hidden(self, step: int, shapes: list[torch.Size]) -> HiddenStates:
        """The hidden states after the finished `step`."""
        return HiddenStates(self._hidden_file(step), shapes)

    def new_hidden(self, step: int, shapes: list[torch.Size]) -> HiddenStates:
        """Empty hidden states for the outputs of `step`, which `write` makes final."""
        partial = self._partial(self._hidden_file(step))
        partial.unlink(missing_ok=True)
        return HiddenStates(partial, shapes)

    def write(self, step: int, result: Step) -> None:
        """Make `step` final, with the hidden states of `new_hidden` if any, and drop those before it."""
        hidden = self._partial(self._hidden_file(step))
        if hidden.exists():
            hidden.rename(self._hidden_file(step))
        tensors, meta = _flattened(result)
        partial = self._partial(self._file(step))
        save_file(tensors, partial, metadata={"vlmexport": json.dumps(meta)})
        partial.rename(self._file(step))
        self._hidden_file(step - 1).unlink(missing_ok=True)

    def report(self, step: int) -> dict[str, Any]:
        """The report of a finished step."""
        report: dict[str, Any] = _meta(self._file(step))["report"]
        return report

    def folds(self, steps: int) -> dict[str, Fold]:
        """All folds of the first `steps` steps."""
        found: dict[str, Fold] = {}
        for step in range(steps):
            for name, data in _meta(self._file(step))["folds"].items():
                parts = _read(self._file(step), name, data["fields"])
                found[name] = Fold(rows=parts.get("rows"), columns=parts.get("columns"), offset=data["offset"])
        return found

    def powers(self, steps: int) -> dict[str, InputPower]:
        """The power of the inputs of every matrix that was used in the first `steps` steps."""
        found: dict[str, InputPower] = {}
        for step in range(steps):
            for name, tokens in _meta(self._file(step))["powers"].items():
                squares = _read(self._file(step), name, ["squares"])["squares"]
                found[name] = InputPower(squares, tokens)
        return found

    def codes(self, steps: int) -> StoredCodes:
        """All codes of the first `steps` steps, read when asked for."""
        return StoredCodes([self._file(step) for step in range(steps)])

    def _file(self, step: int) -> Path:
        return self.folder / f"step-{step:04d}.safetensors"

    def _hidden_file(self, step: int) -> Path:
        return self.folder / f"hidden-{step:04d}.f32"

    def _note_file(self, key: str) -> Path:
        return self.folder / f"note-{key}.json"

    def _write_json(self, file: Path, value: dict[str, Any]) -> None:
        partial = self._partial(file)
        partial.write_text(json.dumps(value), encoding="utf-8")
        partial.rename(file)

    def _partial(self, file: Path) -> Path:
        return file.with_name(file.name + _PARTIAL)


class StoredCodes(Mapping[str, QuantizedTensor]):
    """Quantized tensors by name, each read from its step's file when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._where = {name: (file, data) for file in files for name, data in _meta(file)["codes"].items()}

    def __getitem__(self, name: str) -> QuantizedTensor:
        """The codes of `name`; KeyError for an unknown one."""
        file, data = self._where[name]
        parts = _read(file, name, data["fields"])
        return QuantizedTensor(
            parts["codes"], parts["scale"], parts.get("zero_point"), data["bits"], data["group_size"],
            codebook=parts.get("codebook"),
        )  # fmt: skip

    def __iter__(self) -> Iterator[str]:
        """The names, in the order of the layers."""
        return iter(self._where)

    def __len__(self) -> int:
        """Their number."""
        return len(self._where)


def _flattened(result: Step) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors: dict[str, torch.Tensor] = {}
    meta: dict[str, Any] = {"codes": {}, "folds": {}, "powers": {}, "report": result.report}
    for name, codes in result.codes.items():
        fields = _put(tensors, name, codes, _CODE_FIELDS)
        meta["codes"][name] = {"fields": fields, "bits": codes.bits, "group_size": codes.group_size}
    for name, fold in result.folds.items():
        meta["folds"][name] = {"fields": _put(tensors, name, fold, _FOLD_FIELDS), "offset": fold.offset}
    for name, power in result.powers.items():
        _put(tensors, name, power, ("squares",))
        meta["powers"][name] = power.tokens
    return tensors, meta


def _put(tensors: dict[str, torch.Tensor], name: str, source: object, fields: tuple[str, ...]) -> list[str]:
    present = [field for field in fields if getattr(source, field) is not None]
    for field in present:
        # Cloned: safetensors refuses tensors that share storage, as the rows of one stacked matrix do.
        tensors[f"{field}/{name}"] = getattr(source, field).detach().cpu().contiguous().clone()
    return present


def _meta(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as stored:
        meta: dict[str, Any] = json.loads(stored.metadata()["vlmexport"])
    return meta


def _read(file: Path, name: str, fields: list[str]) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as stored:
        return {field: stored.get_tensor(f"{field}/{name}") for field in fields}
