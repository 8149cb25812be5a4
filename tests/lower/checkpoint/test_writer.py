import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.checkpoint.writer import SafetensorsWriter

TENSORS = {
    "odd_bytes": torch.arange(3, dtype=torch.uint8),
    "half": torch.randn(3, 5).half(),
    "brain": torch.randn(7).bfloat16(),
    "float": torch.randn(2, 2),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "transposed": torch.randn(4, 6).t(),
    "eight": torch.randn(4).to(torch.float8_e4m3fn),
}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


def test_the_library_reads_one_file_back(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    assert writer.finish({"a": "b"}) == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(same(found[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "a": "b"}


def test_tensors_start_at_multiples_of_their_size(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path)
    for name, tensor in TENSORS.items():
        writer.add(name, tensor)
    writer.finish({})
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_shards_hold_at_most_the_limit_and_the_index_names_them(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path, max_bytes=40)
    for index in range(5):
        writer.add(f"t{index}", torch.full((4,), float(index)))
    names = writer.finish({})
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 80
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / file)[name].tolist() == [float(name[1:])] * 4


def test_a_dtype_that_is_not_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"t is torch\.float8_e5m2, which is not copied"):
        SafetensorsWriter(tmp_path).add("t", torch.ones(1).to(torch.float8_e5m2))


def test_a_name_is_written_once(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path)
    writer.add("t", torch.ones(1))
    with pytest.raises(ValueError, match="twice"):
        writer.add("t", torch.ones(1))
