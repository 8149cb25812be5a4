"""Damage to GGUF files. Hashes of an export are refreshed afterwards, so that only the gate can see it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlmexport.manifest import open_artifact, write_manifest

Damage = Callable[[Path, Path], None]  # of a text and an mmproj file, in place


def files_of(folder: Path) -> tuple[Path, Path]:
    """The text and the mmproj file of an export."""
    text = next(f for f in folder.glob("*.gguf") if not f.name.startswith("mmproj"))
    return text, next(folder.glob("mmproj*.gguf"))


def damaged(export: Path, folder: Path, damage: Damage) -> Path:
    """A copy of `export` with `damage`, its manifest's digests made to agree."""
    shutil.copytree(export, folder)
    damage(*files_of(folder))
    manifest = open_artifact(export).manifest
    write_manifest(folder, manifest)
    return folder


def rewrite(
    path: Path,
    *,
    drop: tuple[str, ...] = (),
    keys: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, NDArray[Any]]], None] | None = None,
) -> None:
    """Write the file anew: without the tensors `drop`, with other values of `keys` (None: without it)."""
    import gguf

    reader: Any = gguf.GGUFReader(path)
    arch = reader.get_field("general.architecture").contents()
    draft = path.with_suffix(".new")
    writer: Any = gguf.GGUFWriter(draft, arch)
    changed = dict(keys or {})
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or (key in changed and changed[key] is None):
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, changed.get(key, field.contents()), field.types[0], sub_type)
    data = {t.name: np.array(t.data) for t in reader.tensors if t.name not in drop}
    if change is not None:
        change(data)
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    for name, array in data.items():
        writer.add_tensor(name, array, raw_dtype=kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    draft.replace(path)


def edit(path: Path, name: str, change: Callable[[NDArray[Any]], None]) -> None:
    """Change the bytes of one tensor in place."""
    import gguf

    reader: Any = gguf.GGUFReader(path, "r+")
    tensor = next(t for t in reader.tensors if t.name == name)
    change(tensor.data)
    tensor.data.flush()


def _double_first_scale(data: NDArray[Any]) -> None:
    scale = np.ascontiguousarray(data.reshape(-1)[:2]).view(np.float16) * np.float16(2)
    data.reshape(-1)[:2] = scale.view(np.uint8)


def doubled_scale(text: Path, mmproj: Path) -> None:
    """The scale of one block of one matrix is twice what it was."""
    edit(text, "blk.1.attn_output.weight", _double_first_scale)


def swapped_layers(text: Path, mmproj: Path) -> None:
    """The key matrices of two layers have changed places."""

    def swap(data: dict[str, NDArray[Any]]) -> None:
        one, other = "blk.0.attn_k.weight", "blk.1.attn_k.weight"
        data[one], data[other] = data[other], data[one]

    rewrite(text, change=swap)


def dropped_tensor(text: Path, mmproj: Path) -> None:
    """The output norm is gone."""
    rewrite(text, drop=("output_norm.weight",))


def wrong_norm(text: Path, mmproj: Path) -> None:
    """One value of a norm is a little off."""
    edit(text, "blk.2.ffn_norm.weight", lambda data: data.__setitem__(7, data[7] * 1.01))


def wrong_position(text: Path, mmproj: Path) -> None:
    """The rows of the vision encoder's position table are in another order."""
    edit(mmproj, "v.position_embd.weight", lambda data: data.__setitem__(slice(None), data[::-1].copy()))


def wrong_normalisation(text: Path, mmproj: Path) -> None:
    """Pixels are shifted by another mean."""
    rewrite(mmproj, keys={"clip.vision.image_mean": [0.45, 0.45, 0.45]})


def wrong_rope(text: Path, mmproj: Path) -> None:
    """Another rotary base."""
    rewrite(text, keys={"llama.rope.freq_base": 500000.0})


def other_merges(text: Path, mmproj: Path) -> None:
    """A tokenizer that merges in another order."""
    import gguf

    merges = gguf.GGUFReader(text).get_field("tokenizer.ggml.merges").contents()
    rewrite(text, keys={"tokenizer.ggml.merges": list(reversed(merges))})


def missing_token(text: Path, mmproj: Path) -> None:
    """A token that llama.cpp writes before every overview picture is not in the vocabulary."""
    import gguf

    tokens = gguf.GGUFReader(text).get_field("tokenizer.ggml.tokens").contents()
    rewrite(text, keys={"tokenizer.ggml.tokens": ["ĊĊx" if t == "ĊĊ" else t for t in tokens]})


def other_template(text: Path, mmproj: Path) -> None:
    """A template that puts a space before every part that is no image: before llama.cpp's marker too."""
    template = (
        "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
        "{% if m['content'] is string %} {{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}"
        "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    rewrite(text, keys={"tokenizer.chat_template": template})
