from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from tests.tiny import make_tiny
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.encoder import VisionGraph, lower_vision
from vlmexport.lower.onnx.precision import EncoderPrecision, choose_storage
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.model.load import VLM, load_vlm
from vlmexport.progress import SilentProgress
from vlmexport.split.examples import draw_picture, example_inputs, processor_examples
from vlmexport.split.parts import Part
from vlmexport.split.vision import part_parameter_names, split_vision, vision_inputs

FP32 = EncoderPrecision("fp32", "fp32")
FP16_STORED = EncoderPrecision("fp16", "fp32")
FP16 = EncoderPrecision("fp16", "fp16")
FAMILIES = ["idefics3", "llava", "vipllava"]
OPSET = 21
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Lowered:
    part: Part
    graph: VisionGraph
    path: Path
    session: ort.InferenceSession

    def run(self, inputs: Arrays) -> np.ndarray:
        return self.session.run(None, inputs)[0]


def lower(vlm: VLM, part: Part, precision: EncoderPrecision, folder: Path) -> Lowered:
    folder.mkdir(parents=True, exist_ok=True)
    graph = lower_vision(vlm.model, part, precision, OPSET)
    path = folder / f"{part.role}.onnx"
    stream_weights(graph.model, graph.groups, path, SilentProgress(), "write")
    onnx.checker.check_model(path)
    return Lowered(part, graph, path, ort.InferenceSession(path, providers=["CPUExecutionProvider"]))


@dataclass(frozen=True)
class Exported:
    vlm: VLM
    parts: tuple[Part, Part]
    vision: Lowered
    projector: Lowered


def export(family: str, folder: Path, precision: EncoderPrecision, **overrides: object) -> Exported:
    vlm = load_vlm(str(make_tiny(family, folder / "model", **overrides)))
    parts = split_vision(vlm, processor_examples(vlm))
    lowered = [lower(vlm, part, precision, folder / "onnx") for part in parts]
    return Exported(vlm, parts, lowered[0], lowered[1])


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Each family exported once, when the first test asks for it."""
    return functools.cache(lambda family: export(family, tmp_path_factory.mktemp(family), FP32))


@pytest.fixture(scope="module", params=FAMILIES)
def fp32(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    return exports(request.param)


@pytest.fixture(scope="module")
def idefics3(exports: Callable[[str], Exported]) -> Exported:
    return exports("idefics3")


def as_arrays(inputs: dict[str, torch.Tensor]) -> Arrays:
    return {k: (v.float() if v.is_floating_point() else v).numpy() for k, v in inputs.items()}


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def untraced_inputs(vlm: VLM) -> list[dict[str, torch.Tensor]]:
    """Pictures of other sizes and another number than any example of the split."""
    processor = vlm.processor()
    wide, tall, square = (draw_picture(*size, seed=7) for size in ((200, 90), (60, 70), (64, 64)))
    groups = ([wide], [tall, wide], [square, tall, wide, square])
    return [vision_inputs(vlm, example_inputs(vlm, processor, group, "Well?")) for group in groups]


def reference(part: Part, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.no_grad():
        return part.module(**inputs).float().numpy()


def test_runtime_agrees_on_shapes_that_were_not_traced(fp32: Exported) -> None:
    for inputs in untraced_inputs(fp32.vlm):
        expected = reference(fp32.parts[0], inputs)
        got = fp32.vision.run(as_arrays(inputs))
        assert relative(got, expected) <= 1e-5
        rows = reference(fp32.parts[1], {"vision_features": torch.from_numpy(expected)})
        assert relative(fp32.projector.run({"vision_features": got}), rows) <= 1e-5


def test_graph_has_the_signature_of_its_part(fp32: Exported) -> None:
    for lowered in (fp32.vision, fp32.projector):
        graph = lowered.graph.model.graph
        assert [(v.name, tuple(map(str, v.shape))) for v in (*graph.inputs, *graph.outputs)] == [
            (s.name, tuple(map(str, s.dims))) for s in (*lowered.part.signature.inputs, *lowered.part.signature.outputs)
        ]
    assert {v.dtype for v in graph.outputs} == {ir.DataType.FLOAT}


def test_every_used_parameter_is_in_the_graph_by_name_and_value(fp32: Exported) -> None:
    parameters = dict(fp32.vlm.model.named_parameters())
    for lowered in (fp32.vision, fp32.projector):
        names = part_parameter_names(lowered.part)
        assert [k.name for k in lowered.graph.kept] == sorted((k.name for k in lowered.graph.kept), key=names.index)
        assert {k.name for k in lowered.graph.kept} == set(names)
        stored = ir.load(lowered.path).graph.initializers
        for name in names:
            got, expected = stored[name].const_value.numpy(), parameters[name].detach().numpy()
            assert np.array_equal(got, expected) or np.array_equal(got.T, expected), name


def test_attention_is_one_operator_a_layer(fp32: Exported) -> None:
    nodes = [n.op_type for n in fp32.vision.graph.model.graph]
    assert "Softmax" not in nodes
    layers = {n.split(".layers.")[1].split(".")[0] for n in part_parameter_names(fp32.parts[0]) if ".layers." in n}
    assert nodes.count("MultiHeadAttention") + nodes.count("If") == len(layers)


def test_a_mask_that_hides_nothing_is_left_out_when_the_graph_runs(idefics3: Exported) -> None:
    choices = [n for n in idefics3.vision.graph.model.graph if n.op_type == "If"]
    assert len({n.inputs[0] for n in choices}) == 1
    for node in choices:
        (fast,), (masked,) = (list(node.attributes[b].as_graph()) for b in ("then_branch", "else_branch"))
        assert fast.inputs == masked.inputs[:3]
        assert len(masked.inputs) == 6


def test_tiles_that_are_padding_are_left_out(idefics3: Exported) -> None:
    inputs = dict(idefics3.parts[0].examples[0])
    tiles, mask = inputs["pixel_values"], inputs["pixel_attention_mask"]
    padded = {
        "pixel_values": torch.cat([tiles, torch.zeros_like(tiles)], dim=1),
        "pixel_attention_mask": torch.cat([mask, torch.zeros_like(mask)], dim=1),
    }
    got = idefics3.vision.run(as_arrays(padded))
    assert got.shape[0] == tiles.shape[1]
    assert relative(got, reference(idefics3.parts[0], padded)) <= 1e-5


def test_pixels_that_are_padding_are_not_seen(idefics3: Exported) -> None:
    inputs = dict(idefics3.parts[0].examples[0])
    tiles, mask = inputs["pixel_values"].clone(), inputs["pixel_attention_mask"].clone()
    mask[:, 1, 16:, :] = 0
    mask[:, 2, :, 8:] = 0
    inputs = {"pixel_values": tiles, "pixel_attention_mask": mask}
    expected = reference(idefics3.parts[0], inputs)
    got = idefics3.vision.run(as_arrays(inputs))
    assert relative(expected, reference(idefics3.parts[0], idefics3.parts[0].examples[0])) > 1e-2
    assert relative(got, expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("precision", [FP16_STORED, FP16], ids=["stored", "computed"])
def test_fp16_stays_close_and_is_recorded(precision: EncoderPrecision, tmp_path: Path) -> None:
    made = export("llava", tmp_path, precision)
    inputs = untraced_inputs(made.vlm)[1]
    got = made.vision.run(as_arrays(inputs))
    expected = reference(made.parts[0], inputs)
    assert relative(got, expected) <= 1e-3
    rows = reference(made.parts[1], {"vision_features": torch.from_numpy(expected)})
    assert relative(made.projector.run({"vision_features": got}), rows) <= 2e-3
    kept = {k.name: k for k in made.vision.graph.kept}
    assert kept["model.vision_tower.encoder.layers.0.mlp.fc1.weight"].dtype == "float16"
    assert kept["model.vision_tower.encoder.layers.0.mlp.fc1.bias"].dtype == "float32"
    assert all(k.part == "vision_encoder" and k.reason for k in kept.values())
    matrices = [n for n in made.vision.graph.model.graph if n.op_type == "MatMul"]
    computed = {n.outputs[0].dtype for n in matrices} if precision is FP16 else {ir.DataType.FLOAT16}
    assert computed == {ir.DataType.FLOAT16}


@pytest.mark.slow
def test_a_bfloat16_checkpoint_is_computed_in_fp32(tmp_path: Path) -> None:
    made = export("idefics3", tmp_path, FP32, dtype="bfloat16")
    wide = load_vlm(str(tmp_path / "model"))
    wide.model.float()
    examples = processor_examples(wide)
    part, _ = split_vision(wide, examples)
    inputs = vision_inputs(wide, examples[2])
    assert relative(made.vision.run(as_arrays(inputs)), reference(part, inputs)) <= 1e-5
    assert {p.dtype for p in made.vlm.model.parameters()} == {torch.bfloat16}


def scale_beyond_fp16(vlm: VLM) -> None:
    """Move a factor from the output projections to the values: the same function, activations beyond 65504."""
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "vision_tower" in name and "v_proj" in name:
                parameter.mul_(2.0**20)
            elif "vision_tower" in name and "out_proj.weight" in name:
                parameter.div_(2.0**20)


@pytest.mark.slow
def test_activations_beyond_fp16_stay_right(tmp_path: Path, tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    examples = processor_examples(vlm)
    inputs = vision_inputs(vlm, examples[2])
    expected = reference(split_vision(vlm, examples)[0], inputs)
    scale_beyond_fp16(vlm)
    part, _ = split_vision(vlm, examples)
    assert relative(reference(part, inputs), expected) <= 1e-6
    made = lower(vlm, part, FP16, tmp_path)
    assert relative(made.run(as_arrays(inputs)), expected) <= 2e-3
    kept = {k.name.split("layers.0.")[-1]: k for k in made.graph.kept}
    assert kept["self_attn.v_proj.weight"].dtype == "float32"
    assert "overflows FP16" in kept["self_attn.v_proj.weight"].reason
    assert kept["self_attn.out_proj.weight"].dtype == "float32"
    assert "subnormal" in kept["self_attn.out_proj.weight"].reason


# The CPU runs FP16 products in FP32: this judges the rewrite as a whole, test_precision.py the overflow itself.
@pytest.mark.slow
def test_large_activations_do_not_overflow_fp16_products(tmp_path: Path, tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    examples = processor_examples(vlm)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            # Linear in the values: weights stay within FP16, what flows between them does not.
            if "vision_tower" in name and "v_proj" in name:
                parameter.mul_(2.0**14)
            elif "vision_tower" in name and "out_proj" in name:
                parameter.mul_(2.0**3)
    part, _ = split_vision(vlm, examples)
    inputs = vision_inputs(vlm, examples[2])
    expected = reference(part, inputs)
    assert np.abs(expected).max() > 65504
    made = lower(vlm, part, FP16, tmp_path)
    assert {k.dtype for k in made.graph.kept if k.name.endswith("proj.weight")} == {"float16"}
    assert relative(made.run(as_arrays(inputs)), expected) <= 2e-3


@pytest.mark.parametrize(
    ("tensor", "wanted", "dtype", "reason"),
    [
        (torch.eye(4), "fp16", ir.DataType.FLOAT16, "stored FP16"),
        (torch.eye(4), "fp32", ir.DataType.FLOAT, "--encoder-dtype fp32"),
        (torch.ones(4), "fp16", ir.DataType.FLOAT, "vectors"),
        (torch.full((2, 2), 7e4), "fp16", ir.DataType.FLOAT, "7e+04 overflows"),
        (torch.tensor([[1.0, 1e-6], [1.0, 1.3e-7]]), "fp16", ir.DataType.FLOAT, "subnormal"),
        (torch.tensor([[1.0, float("inf")]]), "fp16", ir.DataType.FLOAT, "not finite"),
        (torch.zeros(2, 2), "fp16", ir.DataType.FLOAT16, "stored FP16"),
    ],
)
def test_storage_never_loses_a_weight(tensor: torch.Tensor, wanted: str, dtype: ir.DataType, reason: str) -> None:
    storage = choose_storage("w", tensor, wanted)
    assert storage.dtype == dtype
    assert reason in storage.reason


def test_a_part_that_never_varies_cannot_be_traced(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    part, _ = split_vision(vlm, processor_examples(vlm))
    single = Part(part.role, part.module, part.prefix, part.signature, part.examples[:1])
    with pytest.raises(UnsupportedModelError, match="more than one"):
        lower_vision(vlm.model, single, FP32, OPSET)


def test_tracing_leaves_the_model_as_it_was(tiny_llava: Path, tmp_path: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in vlm.model.named_parameters()}
    implementation = vlm.model.get_encoder("image").config._attn_implementation
    part, _ = split_vision(vlm, processor_examples(vlm))
    lower(vlm, part, FP32, tmp_path)
    assert before == {name: (p.data_ptr(), p.requires_grad) for name, p in vlm.model.named_parameters()}
    assert vlm.model.get_encoder("image").config._attn_implementation == implementation
