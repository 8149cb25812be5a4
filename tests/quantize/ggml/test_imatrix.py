"""llama.cpp's importance matrix files: what we write is what llama-quantize read (tools/make_imatrix_reference.py)."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.quantize.ggml.sources import Source, all_sources
from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.blocks import quantize_rows
from vlmexport.quantize.ggml.imatrix import (
    ColumnPower,
    ImportanceMatrix,
    chunks_of,
    read_imatrix,
    write_imatrix,
    write_legacy_imatrix,
)

REFERENCE = Path(__file__).parent / "imatrix_reference.json"
BLOCKS = ("blk.0.", "blk.1.", "blk.2.")
UNSEEN = 5  # the expert that no token reached
Writer = Callable[[Path, ImportanceMatrix], None]
WRITERS: dict[str, Writer] = {"gguf": write_imatrix, "dat": write_legacy_imatrix}


@cache
def source() -> Source:
    """The model of the reference: dense blocks and blocks of eight experts."""
    return next(s for s in all_sources() if s.name == "eight-experts")


@cache
def example() -> ImportanceMatrix:
    """An importance matrix of the first blocks of `source`: counts of all kinds, expert `UNSEEN` never used."""
    powers = {}
    for number, name in enumerate(source().shapes):
        importance = source().importance(name) if name.startswith(BLOCKS) else None
        if importance is not None:
            counts = np.arange(len(np.atleast_2d(importance)), dtype=np.int64) * 97 + 1000 + number
            if len(counts) > 1:
                counts[UNSEEN] = 0
            sums = np.atleast_2d(importance) * counts[:, None].astype(np.float32)
            powers[name] = ColumnPower(sums.astype(np.float32), counts)
    return ImportanceMatrix(powers, ("pictures and words",), chunks_of(powers))


def fields(path: Path) -> dict[str, Any]:
    return {
        f.name: f.contents()
        for f in gguf.GGUFReader(path).fields.values()
        if "." in f.name[4:] and f.name[:4] != "GGUF"
    }


@pytest.mark.parametrize("form", WRITERS)
def test_llama_quantize_makes_the_same_blocks_of_the_file(form: str, tmp_path: Path) -> None:
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))[form]
    WRITERS[form](tmp_path / "made", example())
    assert hashlib.sha256((tmp_path / "made").read_bytes()).hexdigest() == reference["file"], "it read another file"
    entries = read_imatrix(tmp_path / "made").entries
    assert any(entry.size > 256 for entry in entries.values())
    for name, described in reference["tensors"].items():
        kind, wanted = described.split()
        if kind.startswith("F") or not name.startswith(BLOCKS):
            continue
        values = source().values(name)
        matrices = values.reshape(-1, *values.shape[-2:])
        own = [None] * len(matrices) if name not in entries else list(entries[name].reshape(len(matrices), -1))
        made = b"".join(quantize_rows(m, kind, w, threads=1).tobytes() for m, w in zip(matrices, own, strict=True))
        assert hashlib.sha256(made).hexdigest().startswith(wanted), name


def test_gguf_files_read_back_to_the_bit(tmp_path: Path) -> None:
    matrix = example()
    write_imatrix(tmp_path / "made.gguf", matrix)
    read = read_imatrix(tmp_path / "made.gguf")
    assert (read.datasets, read.chunks, read.chunk_tokens) == (matrix.datasets, matrix.chunks, 512)
    assert read.powers.keys() == matrix.powers.keys()
    for name, power in matrix.powers.items():
        assert np.array_equal(read.powers[name].sums, power.sums)
        assert np.array_equal(read.powers[name].counts, power.counts)
        assert np.array_equal(read.entries[name], matrix.entries[name])


def test_gguf_files_have_the_keys_and_the_order_of_llama_imatrix(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "made.gguf", example())
    assert fields(tmp_path / "made.gguf") == {
        "general.type": "imatrix",
        "imatrix.datasets": ["pictures and words"],
        "imatrix.chunk_count": chunks_of(example().powers),
        "imatrix.chunk_size": 512,
    }
    tensors = gguf.GGUFReader(tmp_path / "made.gguf").tensors
    assert [t.name for t in tensors[:2]] == ["blk.0.attn_k.weight.in_sum2", "blk.0.attn_k.weight.counts"]
    assert [t.shape.tolist() for t in tensors[:2]] == [[256], [1]]
    experts = {t.name: t.shape.tolist() for t in tensors if "gate_exps" in t.name}
    assert experts["blk.0.ffn_gate_exps.weight.in_sum2"] == [256, 8]
    assert experts["blk.0.ffn_gate_exps.weight.counts"] == [1, 8]


def test_what_saw_nothing_counts_as_one() -> None:
    entry = example().entries["blk.0.ffn_up_exps.weight"]
    assert entry.shape == (8, 256)
    assert (entry[UNSEEN] == 1).all()
    assert not (entry[UNSEEN - 1] == 1).all()


def test_the_older_form_is_written_to_the_byte(tmp_path: Path) -> None:
    powers = {"b.weight": ColumnPower(np.array([[600.0, 1200.0]], np.float32), np.array([600]))}
    powers["a.weight"] = ColumnPower(np.zeros((1, 2), np.float32), np.array([0]))
    write_legacy_imatrix(tmp_path / "made", ImportanceMatrix(powers, ("words",), 1))
    want = struct.pack("<ii", 1, 8) + b"b.weight" + struct.pack("<iiff", 2, 2, 2.0, 4.0) + struct.pack("<ii", 1, 5)
    assert (tmp_path / "made").read_bytes() == want + b"words"
    read = read_imatrix(tmp_path / "made")
    assert (read.entries["b.weight"].tolist(), read.datasets, read.chunks) == ([1.0, 2.0], ("words",), 1)


def test_the_older_form_may_end_after_its_entries(tmp_path: Path) -> None:
    file = tmp_path / "old.dat"
    file.write_bytes(struct.pack("<ii", 1, 1) + b"w" + struct.pack("<iif", 0, 1, 3.0))
    assert read_imatrix(file).entries["w"].tolist() == [3.0]


def test_extra_tensors_of_llama_imatrix_are_read_over(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        writer.add_tensor("w.in_sum", np.ones(4, np.float32))
        writer.add_tensor("w.stats", np.full(12, np.nan, np.float32))

    assert read_imatrix(gguf_file(tmp_path, extra=add)).entries["w"].tolist() == [0.5] * 4


def gguf_file(folder: Path, kind: str = "imatrix", extra: Any = None, **tensors: Any) -> Path:
    writer: Any = gguf.GGUFWriter(folder / "made.gguf", "x")
    writer.add_type(kind)
    made = {"in_sum2": np.ones(4, np.float32), "counts": np.full(1, 2, np.float32), **tensors}
    for leaf, value in made.items():
        if value is not None:
            writer.add_tensor(f"w.{leaf}", value)
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "made.gguf"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "model"}, r"made\.gguf: not an importance matrix.*general\.type is 'model'"),
        ({"counts": None}, "w has no counts"),
        ({"in_sum2": None}, "w has no in_sum2"),
        ({"counts": np.ones(3, np.float32)}, "4 sums and 3 counts"),
        ({"in_sum2": np.ones(4, np.float16)}, "not stored as F32"),
        ({"in_sum2": np.array([1, np.nan, 1, 1], np.float32)}, "negative or not finite"),
        ({"in_sum2": np.array([1, -1, 1, 1], np.float32)}, "negative or not finite"),
        ({"counts": np.full(1, np.inf, np.float32)}, "counts that are not finite"),
        ({"more": np.ones(1, np.float32)}, r"w\.more is neither sums nor counts"),
    ],
)
def test_files_of_another_kind_are_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=words):
        read_imatrix(gguf_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it ends too early"),
        (b"not an importance matrix", "it would have .* entries"),
        (struct.pack("<ii", 1, 1 << 20), "a name would have 1048576 bytes"),
        (struct.pack("<ii", 1, 1) + b"w" + struct.pack("<ii", 1, 1 << 28), "w would have 268435456 values"),
        (struct.pack("<ii", 1, 1) + b"w" + struct.pack("<iif", 1, 2, 1.0), "it ends too early"),
        (b"GGUF" + bytes(12), "not an importance matrix"),
    ],
)
def test_damaged_files_are_refused_by_name(data: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.dat"
    file.write_bytes(data)
    with pytest.raises(BadInputError, match=rf"--imatrix .*bad\.dat: .*{words}"):
        read_imatrix(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"nothing\.gguf: No such file"):
        read_imatrix(tmp_path / "nothing.gguf")
