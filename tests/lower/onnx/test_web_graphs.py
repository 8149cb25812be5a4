"""What the ``transformersjs`` layout builds around traced graphs: the loop over pictures, the limit of positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from vlmexport.lower.onnx.web_decoder import as_client_decodes
from vlmexport.lower.onnx.web_each import over_pictures
from vlmexport.lower.onnx.weights import typed_value
from vlmexport.model.pictures import EachPicture

CHANNELS, WIDTH = 3, 4
MATRIX = np.random.default_rng(0).normal(size=(CHANNELS, WIDTH)).astype(np.float32)


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def tower() -> ir.Graph:
    """``[1, channels, height, width]`` to ``[height * width, WIDTH]``: every row depends on the picture's mean, too."""
    pixels = typed_value("pixel_values", ir.DataType.FLOAT, [1, CHANNELS, "height", "width"])
    graph = ir.Graph([pixels], [], nodes=[], opset_imports={"": 21}, name="tower")
    doubled = ir.node("Add", [constant(graph, "weight", MATRIX), graph.initializers["weight"]])
    mean = ir.node("ReduceMean", [pixels], {"keepdims": 0})
    last = ir.node("Transpose", [pixels], {"perm": [0, 2, 3, 1]})
    flat = ir.node("Reshape", [last.outputs[0], constant(graph, "flat", np.array([-1, CHANNELS]))])
    product = ir.node("MatMul", [flat.outputs[0], doubled.outputs[0]])
    rows = ir.node("Add", [product.outputs[0], mean.outputs[0]])
    graph.extend([doubled, mean, last, flat, product, rows])
    out = rows.outputs[0]
    out.name, out.type, out.shape = "image_features", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["rows", WIDTH])
    graph.outputs.append(out)
    return graph


def opened(graph: ir.Graph, path: Path) -> ort.InferenceSession:
    ir.save(ir.Model(graph, ir_version=10), path)
    return ort.InferenceSession(path)


def wanted(picture: np.ndarray) -> np.ndarray:
    rows = picture.transpose(1, 2, 0).reshape(-1, CHANNELS) @ (2 * MATRIX) + picture.mean()
    return np.asarray(rows)


@pytest.mark.parametrize("count", [1, 3])
def test_all_pictures_of_one_size(tmp_path: Path, count: int) -> None:
    graph = tower()
    over_pictures(graph, EachPicture(axis=0))
    assert [node.op_type for node in graph].count("Add") == 1  # what is the same for all pictures is done once
    pixels = np.random.default_rng(1).normal(size=(count, CHANNELS, 5, 2)).astype(np.float32)
    (found,) = opened(graph, tmp_path / "tower.onnx").run(None, {"pixel_values": pixels})
    np.testing.assert_allclose(found, np.concatenate([wanted(picture) for picture in pixels]), rtol=1e-5, atol=1e-5)


def test_rows_of_patches_are_cut_by_their_grids(tmp_path: Path) -> None:
    graph = tower()
    over_pictures(graph, EachPicture(axis=0, patches=True))
    patches = np.random.default_rng(2).normal(size=(2, 8, CHANNELS)).astype(np.float32)
    grids = np.array([[2, 4], [3, 1]])
    session = opened(graph, tmp_path / "tower.onnx")
    (found,) = session.run(None, {"pixel_values": patches, "spatial_shapes": grids})
    cut = [rows[: h * w].T.reshape(CHANNELS, h, w) for rows, (h, w) in zip(patches, grids, strict=True)]
    np.testing.assert_allclose(found, np.concatenate([wanted(one) for one in cut]), rtol=1e-5, atol=1e-5)
    patches[1, 3:] = 9  # padding
    (same,) = session.run(None, {"pixel_values": patches, "spatial_shapes": grids})
    np.testing.assert_array_equal(same, found)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.Fail, match="Reshape"):
        session.run(None, {"pixel_values": patches, "spatial_shapes": grids * 3})


def test_positions_stay_below_the_number_of_tokens(tmp_path: Path) -> None:
    names = {"inputs_embeds": ["b", "s", 8], "attention_mask": ["b", "t"], "position_ids": [3, "b", "s"]}
    kinds = [ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT64]
    inputs = [typed_value(name, kind, dims) for (name, dims), kind in zip(names.items(), kinds, strict=True)]
    read = ir.node("Identity", [inputs[2]])
    out = read.outputs[0]
    out.name, out.type, out.shape = "read", ir.TensorType(ir.DataType.INT64), ir.Shape([3, "b", "s"])
    graph = ir.Graph(inputs, [out], nodes=[read], opset_imports={"": 21}, name="decoder")
    assert as_client_decodes(graph) == ()
    session = opened(graph, tmp_path / "decoder.onnx")

    def run(positions: list[int], tokens: int) -> list[int]:
        given = np.array([[positions]] * 3)
        feeds = {"position_ids": given, "attention_mask": np.ones((1, tokens), np.int64)}
        feeds["inputs_embeds"] = np.zeros((1, len(positions), 8), np.float32)
        (found,) = session.run(None, {n: a for n, a in feeds.items() if n in {i.name for i in session.get_inputs()}})
        assert (found[0] == found[1]).all()
        return list(found[0, 0])

    assert run([0, 1, 2, 3], 4) == [0, 1, 2, 3]
    assert run([3], 9) == [3]
    assert run([12], 5) == [4]  # the first step after a prompt of four tokens, counted three times
