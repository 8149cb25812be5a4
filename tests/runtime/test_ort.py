"""The ONNX runner against the PyTorch runner, on a hand-built export of the same tiny decoder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.manifest import Artifact
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import PartOutputError, Runner, merge, pad_right
from vlmexport.runtime.torch import TorchRunner


def ids_of(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(50, 400, (1, n)) for n in lengths]


def run(runner: Runner, rows: list[np.ndarray], later: np.ndarray, keep: int, reserve: int = 8) -> list[np.ndarray]:
    """Prefill with `rows`, then decode the columns of `later`; the logits of every call."""
    ids, mask = pad_right(rows)
    logits, cache = runner.prefill(runner.embed(ids), mask, keep, reserve=reserve)
    out = [logits]
    for column in later.T:
        out.append(runner.decode(runner.embed(column[:, None]), cache))
    assert cache.lengths.tolist() == [r.shape[1] + later.shape[1] for r in rows]
    return out


@pytest.mark.parametrize("lengths", [(7,), (1,), (5, 9, 2)])
def test_decoding_equals_pytorch(onnx_runner: OnnxRunner, torch_runner: TorchRunner, lengths: tuple[int, ...]) -> None:
    rows, later = ids_of(*lengths), np.random.default_rng(1).integers(50, 400, (len(lengths), 6))
    for ours, reference in zip(run(onnx_runner, rows, later, 1), run(torch_runner, rows, later, 1), strict=True):
        assert ours.shape == (len(lengths), 1, torch_runner.model.config.get_text_config().vocab_size)
        np.testing.assert_allclose(ours, reference, atol=1e-4)


def test_keep_zero_gives_every_position(onnx_runner: OnnxRunner, torch_runner: TorchRunner) -> None:
    later = np.zeros((1, 0), np.int64)
    (ours,), (reference,) = run(onnx_runner, ids_of(9), later, 0), run(torch_runner, ids_of(9), later, 0)
    assert ours.shape[1] == 9
    np.testing.assert_allclose(ours, reference, atol=1e-4)


def test_keep_two_of_a_padded_batch(onnx_runner: OnnxRunner, torch_runner: TorchRunner) -> None:
    later = np.zeros((2, 0), np.int64)
    (ours,), (reference,) = run(onnx_runner, ids_of(9, 4), later, 2), run(torch_runner, ids_of(9, 4), later, 2)
    np.testing.assert_allclose(ours, reference, atol=1e-4)


def test_cache_grows_beyond_its_reserve(onnx_runner: OnnxRunner) -> None:
    later = np.random.default_rng(2).integers(50, 400, (2, 20))
    roomy, tight = (run(onnx_runner, ids_of(3, 5), later, 1, reserve=r) for r in (64, 0))
    for a, b in zip(roomy, tight, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_chunk_continues_a_single_row(onnx_runner: OnnxRunner) -> None:
    ids = ids_of(8)[0]
    mask = np.ones_like(ids)
    whole, _ = onnx_runner.prefill(onnx_runner.embed(ids), mask)
    _, cache = onnx_runner.prefill(onnx_runner.embed(ids[:, :3]), mask[:, :3])
    np.testing.assert_allclose(onnx_runner.decode(onnx_runner.embed(ids[:, 3:]), cache), whole, atol=1e-5)


def test_a_chunk_for_several_rows_is_refused(onnx_runner: OnnxRunner) -> None:
    ids, mask = pad_right(ids_of(3, 4))
    embeds = onnx_runner.embed(ids)
    _, cache = onnx_runner.prefill(embeds, mask)
    with pytest.raises(BadInputError, match="one token at a time"):
        onnx_runner.decode(embeds, cache)


def test_left_padding_is_refused(onnx_runner: OnnxRunner) -> None:
    ids = ids_of(3)[0]
    with pytest.raises(BadInputError, match=r"row 0 .* not right-padded"):
        onnx_runner.prefill(onnx_runner.embed(ids), np.array([[0, 1, 1]]))


def test_merge_names_both_counts(onnx_runner: OnnxRunner) -> None:
    spec = onnx_runner.merge_spec
    ids = np.array([[spec.image_token_id, 60, spec.image_token_id]])
    embeds = onnx_runner.embed(ids)
    features = np.full((2, embeds.shape[2]), 7.0, np.float32)
    merged = merge(spec, embeds, ids, features)
    assert (merged[0, [0, 2]] == 7).all()
    assert (merged[0, 1] == embeds[0, 1]).all()
    with pytest.raises(BadInputError, match=r"2 image tokens .* 1 feature rows"):
        merge(spec, embeds, ids, features[:1])
    with pytest.raises(BadInputError, match=r"2 image tokens .* 0 feature rows"):
        merge(spec, embeds, ids, None)


def test_exact_mode_loads_external_and_inline_weights(mock_artifact: Artifact, onnx_runner: OnnxRunner) -> None:
    ids = ids_of(4)[0]
    exact = OnnxRunner(mock_artifact, threads=1, exact=True)
    np.testing.assert_array_equal(exact.embed(ids), onnx_runner.embed(ids))


def test_missing_provider_is_not_possible_here(mock_artifact: Artifact) -> None:
    with pytest.raises(NotPossibleHereError, match="NoSuchProvider"):
        OnnxRunner(mock_artifact, provider="NoSuchProvider").load()


def changed(artifact: Artifact, out: Path, part: str, change: object) -> OnnxRunner:
    """A runner of a copy of `artifact` whose graph of `part` went through `change`."""
    shutil.copytree(artifact.path, out)
    path = out / artifact.manifest.parts[part].file
    model = onnx.load(path)
    change(model.graph)  # type: ignore[operator]
    onnx.save(model, path)
    return OnnxRunner(dataclasses.replace(artifact, path=out), threads=1)


def rename_output(graph: onnx.GraphProto) -> None:
    node = next(n for n in graph.node if "present.1.key" in n.output)
    node.output[list(node.output).index("present.1.key")] = "lost"
    next(o for o in graph.output if o.name == "present.1.key").name = "lost"


def poison(graph: onnx.GraphProto) -> None:
    table = onnx.numpy_helper.to_array(graph.initializer[0]).copy()
    table[60] = np.nan
    graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(table, graph.initializer[0].name))


def narrow(graph: onnx.GraphProto) -> None:
    weight = onnx.numpy_helper.to_array(graph.initializer[2]).copy()
    graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(weight[:, :-1], graph.initializer[2].name))
    graph.output[0].type.tensor_type.shape.dim[1].dim_value = weight.shape[1] - 1


def test_lost_cache_output_names_the_decoder(mock_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(PartOutputError, match=r"decoder: the graph has no output 'present.1.key'") as caught:
        changed(mock_artifact, tmp_path / "x", "decoder", rename_output).load()
    assert caught.value.part == "decoder"


def test_nan_names_the_part(mock_artifact: Artifact, tmp_path: Path) -> None:
    runner = changed(mock_artifact, tmp_path / "x", "embed_tokens", poison)
    with pytest.raises(PartOutputError, match="embed_tokens: inputs_embeds has 128 of 256 values that are NaN"):
        runner.embed(np.array([[60, 61]]))


def test_misshapen_features_name_the_projector(mock_artifact: Artifact, tmp_path: Path) -> None:
    runner = changed(mock_artifact, tmp_path / "x", "projector", narrow)
    with pytest.raises(PartOutputError, match=r"projector: image_features has shape \(1, 127\)"):
        runner.project(np.ones((16, 48), np.float32))


def test_missing_pixels_name_the_encoder(onnx_runner: OnnxRunner) -> None:
    with pytest.raises(PartOutputError, match="vision_encoder: the graph needs the inputs"):
        onnx_runner.vision({"something_else": np.ones((1, 1, 3, 32, 32), np.float32)})


def test_truncated_graph_names_the_part(mock_artifact: Artifact, tmp_path: Path) -> None:
    runner = changed(mock_artifact, tmp_path / "x", "projector", narrow)
    path = runner.artifact.part_path("projector")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PartOutputError, match=r"projector: projector.onnx does not load"):
        runner.project(np.ones((16, 48), np.float32))
