"""The gate's judgement of preprocessing graphs: green for the right one, red for every wrong one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from vlmexport.demo import model_dir
from vlmexport.lower.onnx.layouts.split import part_file
from vlmexport.lower.onnx.preprocess import lower_preprocessor
from vlmexport.manifest import PREPROCESSOR_PART, Artifact, Manifest, PartFile, TensorSpec
from vlmexport.runtime.preprocessor import pixel_difference
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.split.parts import Role
from vlmexport.split.preprocess import LongSide, Preprocessing, SquareTiles, describe_processor
from vlmexport.verify import preprocessor
from vlmexport.verify.gates import Gate
from vlmexport.verify.preprocessor import check_preprocessor

ENCODER = (
    TensorSpec("pixel_values", "float32", (1, "num_images", 3, 32, 32)),
    TensorSpec("pixel_attention_mask", "int64", (1, "num_images", 32, 32)),
)
PICTURES = 11


@pytest.fixture(scope="module")
def builder() -> PromptBuilder:
    return PromptBuilder(model_dir())


@pytest.fixture(scope="module")
def steps(builder: PromptBuilder) -> Preprocessing:
    return describe_processor(builder.processor)


def export(folder: Path, steps: Preprocessing, *, encoder: tuple[TensorSpec, ...] = ENCODER) -> Artifact:
    """As much of an export as the check reads: the graph of `steps`, and what the vision encoder takes."""
    graph = lower_preprocessor(steps, 21)
    ir.save(graph, folder / "preprocessor.onnx")
    parts = {
        PREPROCESSOR_PART: part_file(graph, "preprocessor.onnx"),
        str(Role.VISION_ENCODER): PartFile("vision_encoder.onnx", encoder, ()),
    }
    return Artifact(folder, Manifest("split", "cpu", {}, {}, {}, {"options": {"preprocessor": True}}, parts, (), ()))


def judged(artifact: Artifact, builder: PromptBuilder) -> Gate:
    gate = Gate()
    check_preprocessor(gate, artifact, builder, threads=1)
    return gate


def red(gate: Gate) -> set[str]:
    return {check.name.partition("[")[0] for check in gate.checks if check.status == "failed"}


def test_the_right_graph_differs_in_no_value(builder: PromptBuilder, steps: Preprocessing, tmp_path: Path) -> None:
    gate = judged(export(tmp_path, steps), builder)
    assert {check.status for check in gate.checks} == {"passed"}
    assert [check.value for check in gate.checks] == [0.0] * (PICTURES + 2)


WRONG: dict[str, tuple[Callable[[Preprocessing], Preprocessing], set[str]]] = {
    "another filter": (
        lambda s: replace(s, resample="bicubic"),
        {preprocessor.PIXELS, preprocessor.DIFFERING},
    ),
    "another mean": (
        lambda s: replace(s, mean=(0.5, 0.5, 0.48)),
        {preprocessor.PIXELS, preprocessor.DIFFERING},
    ),
    "another deviation": (
        lambda s: replace(s, std=(0.5, 0.51, 0.5)),
        {preprocessor.PIXELS, preprocessor.DIFFERING},
    ),
    "a little in every value": (
        lambda s: replace(s, mean=(0.501, 0.501, 0.501)),
        {preprocessor.DIFFERING},
    ),
    "another size": (lambda s: replace(s, resize=LongSide(96)), {preprocessor.PIXELS}),
    "one tile": (lambda s: replace(s, form=SquareTiles(32, False, True)), {preprocessor.PIXELS}),
    "no mask": (lambda s: replace(s, form=SquareTiles(32, True, False)), {preprocessor.PIXELS, preprocessor.SIGNATURE}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_graph_is_red(name: str, builder: PromptBuilder, steps: Preprocessing, tmp_path: Path) -> None:
    change, checks = WRONG[name]
    assert red(judged(export(tmp_path, change(steps)), builder)) == checks


def test_an_order_of_passes_that_is_not_pillows_is_red(
    builder: PromptBuilder, steps: Preprocessing, tmp_path: Path
) -> None:
    other = replace(steps, passes="columns" if steps.passes == "fewer" else "fewer")
    assert preprocessor.DIFFERING in red(judged(export(tmp_path, other), builder))


def test_a_lost_graph_is_red(builder: PromptBuilder, steps: Preprocessing, tmp_path: Path) -> None:
    artifact = export(tmp_path, steps)
    del artifact.manifest.parts[PREPROCESSOR_PART]
    gate = judged(artifact, builder)
    assert [(c.name, c.status, c.reason) for c in gate.checks] == [
        (preprocessor.SIGNATURE, "failed", "the export has no such part")
    ]


def test_a_damaged_graph_is_red(builder: PromptBuilder, steps: Preprocessing, tmp_path: Path) -> None:
    artifact = export(tmp_path, steps)
    file = tmp_path / "preprocessor.onnx"
    file.write_bytes(file.read_bytes()[:2000])
    assert preprocessor.PIXELS in red(judged(artifact, builder))


def test_what_the_encoder_takes_must_be_made(builder: PromptBuilder, steps: Preprocessing, tmp_path: Path) -> None:
    sizes = TensorSpec("image_sizes", "int64", (1, 2))
    gate = judged(export(tmp_path, steps, encoder=(*ENCODER, sizes)), builder)
    assert red(gate) == {preprocessor.SIGNATURE}
    assert "takes image_sizes" in gate.checks[0].reason


def test_an_export_without_the_graph_has_no_check(builder: PromptBuilder, tmp_path: Path) -> None:
    artifact = Artifact(tmp_path, Manifest("split", "cpu", {}, {}, {}, {}, {}, (), ()))
    assert judged(artifact, builder).checks == []


def test_a_picture_that_the_processor_refuses_is_not_run(
    builder: PromptBuilder, steps: Preprocessing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("aspect ratio")

    monkeypatch.setattr(preprocessor.ProcessorTensors, "__call__", refuse)
    gate = judged(export(tmp_path, steps), builder)
    assert [check.status for check in gate.checks] == ["passed", *["not_run"] * (PICTURES + 1)]
    assert "the processor refuses this picture: aspect ratio" in gate.checks[1].reason


ONES = np.ones((1, 3, 2, 2), np.float32)
LEVEL = (0.5, 0.25, 0.125)


@pytest.mark.parametrize(
    ("found", "fault"),
    [
        ({}, "tensors"),
        ({"pixel_values": ONES[:, :, :1], "rows": np.array([[1]])}, r"\(1, 3, 1, 2\)"),
        ({"pixel_values": ONES.astype(np.float16), "rows": np.array([[1]])}, "float16"),
        ({"pixel_values": ONES, "rows": np.array([[2]])}, "rows differs"),
        ({"pixel_values": ONES * np.nan, "rows": np.array([[1]])}, "NaN"),
    ],
)
def test_tensors_that_cannot_be_compared_are_a_fault(found: dict[str, np.ndarray], fault: str) -> None:
    import re

    wanted = {"pixel_values": ONES, "rows": np.array([[1]])}
    assert re.search(fault, pixel_difference(wanted, found, LEVEL).fault)


@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (1, 12)])
def test_a_difference_is_counted_in_levels_of_its_channel(shape: tuple[int, ...]) -> None:
    other = ONES.copy()
    other[0, 2, 0, 0] += 0.25
    apart = pixel_difference({"pixel_values": ONES.reshape(shape)}, {"pixel_values": other.reshape(shape)}, LEVEL)
    assert (apart.levels, apart.differing, apart.values) == (2.0, 1, 12)
