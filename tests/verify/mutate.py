"""Damage to a finished export, with the manifest's hashes recorded again: the gate itself has to see it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from vlmexport.manifest import MANIFEST_NAME, Manifest, write_manifest

DECODER = "decoder.onnx"


def damaged(export: Path, target: Path, damage: Callable[[Path], None]) -> Path:
    """A copy of `export` in `target` after `damage`, whose hashes agree with its files."""
    shutil.copytree(export, target)
    damage(target)
    write_manifest(target, _manifest(target))
    return target


def corrupted_scale(folder: Path) -> None:
    name = next(n for n in _initializers(folder / DECODER) if n.endswith(".scale"))
    with Stored(folder / DECODER, name) as values:
        values.reshape(-1)[:4] *= 1.5


def swapped_layers(folder: Path) -> None:
    """The same quantized matrix of layers 0 and 1, codes and scales."""
    names = sorted(n for n in _initializers(folder / DECODER) if n.endswith((".codes", ".scale")))
    pairs = [(n, n.replace("layers.0.", "layers.1.")) for n in names if "layers.0." in n][:2]
    for one, other in pairs:
        with Stored(folder / DECODER, one) as a, Stored(folder / DECODER, other) as b:
            a[...], b[...] = b.copy(), a.copy()


def swapped_parts(folder: Path) -> None:
    """The graphs of the vision encoder and the projector under each other's name."""
    one, other, spare = (folder / f"{n}.onnx" for n in ("vision_encoder", "projector", "spare"))
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def crossed_cache(folder: Path) -> None:
    """Layer 0 reads the past of layer 1 and the other way round."""
    model = onnx.load(folder / DECODER, load_external_data=False)
    crossed = {}
    for kind in ("key", "value"):
        one, other = f"past_key_values.0.{kind}", f"past_key_values.1.{kind}"
        crossed |= {one: other, other: one}
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = crossed.get(name, name)
    onnx.save(model, folder / DECODER)


def dropped_output(folder: Path) -> None:
    """One present output less, in the graph and in the manifest."""
    lost = "present.1.value"
    model = onnx.load(folder / DECODER, load_external_data=False)
    kept = [o for o in model.graph.output if o.name != lost]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, folder / DECODER)
    manifest = _manifest(folder)
    part = manifest.parts["decoder"]
    part = dataclasses.replace(part, outputs=tuple(o for o in part.outputs if o.name != lost))
    write_manifest(folder, dataclasses.replace(manifest, parts={**manifest.parts, "decoder": part}))


def wrong_normalisation(folder: Path) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        data = json.loads(file.read_text(encoding="utf-8"))
        images = data.get("image_processor", data)
        images["image_mean"] = [0.1, 0.1, 0.1]
        file.write_text(json.dumps(data), encoding="utf-8")


def nan_in_projector(folder: Path) -> None:
    graph = folder / "projector.onnx"
    largest = max(_initializers(graph).items(), key=lambda item: item[1])[0]
    with Stored(graph, largest) as values:
        values.reshape(-1)[7] = np.nan


def nan_in_decoder(folder: Path) -> None:
    name = next(n for n in _initializers(folder / DECODER) if n.endswith(".scale"))
    with Stored(folder / DECODER, name) as values:
        values.reshape(-1)[0] = np.nan


def wrong_table_row(folder: Path) -> None:
    graph = folder / "embed_tokens.onnx"
    largest = max(_initializers(graph).items(), key=lambda item: item[1])[0]
    with Stored(graph, largest) as values:
        values[5] = values[6]


def wrong_norm(folder: Path) -> None:
    """One entry of the last norm's weight, which is in the graph file itself."""
    model = onnx.load(folder / DECODER, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("norm.weight") and "layers" not in t.name)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[3] += 0.1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, folder / DECODER)


def lost_source(folder: Path) -> None:
    """The original model is no longer where the export came from."""
    manifest = _manifest(folder)
    source = {**manifest.source, "model": str(folder / "no-such-model")}
    write_manifest(folder, dataclasses.replace(manifest, source=source))


class Stored:
    """The external data of one initializer as an array that writes back."""

    def __init__(self, graph: Path, name: str) -> None:
        model = onnx.load(graph, load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        entries = {e.key: e.value for e in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        offset = int(entries.get("offset", 0))
        self.array = np.memmap(graph.parent / entries["location"], dtype, "r+", offset, tuple(tensor.dims))

    def __enter__(self) -> np.ndarray:
        return self.array

    def __exit__(self, *error: object) -> None:
        self.array.flush()


def _initializers(graph: Path) -> dict[str, int]:
    """Names and element counts of the initializers in external data."""
    model = onnx.load(graph, load_external_data=False)
    return {t.name: int(np.prod(t.dims)) for t in model.graph.initializer if t.external_data}


def _manifest(folder: Path) -> Manifest:
    return Manifest.from_dict(json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")))
