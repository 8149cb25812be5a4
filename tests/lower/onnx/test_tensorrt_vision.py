"""Vision graphs of the dialect ``tensorrt``: as ONNX Runtime computes them, and as TensorRT for RTX builds them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from tests.families.tiny_gemma3 import make_tiny_gemma3
from tests.lower.onnx.test_encoder import as_arrays, reference, relative, untraced_inputs
from tests.tiny import make_tiny
from vlmexport.demo import model_dir
from vlmexport.demo.variants import make_range_variant
from vlmexport.lower.onnx import standard_attention
from vlmexport.lower.onnx.encoder import VisionGraph, lower_vision
from vlmexport.lower.onnx.precision import EncoderPrecision
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.model.load import VLM, load_vlm
from vlmexport.progress import SilentProgress
from vlmexport.split.examples import processor_examples
from vlmexport.split.parts import Part
from vlmexport.split.vision import part_parameter_names, split_vision, vision_inputs
from vlmexport.target import ParityLimits, load_target

FP16 = EncoderPrecision("fp16", "fp16")
OPSET = 24
SLOW = ["vipllava", "gemma3", "demo"]
FAMILIES = ["idefics3", "llava", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
DATA_DEPENDENT = {"NonZero", "Compress", "Unique", "If", "Loop", "Scan"}


@dataclass(frozen=True)
class Lowered:
    part: Part
    graph: VisionGraph
    path: Path
    session: ort.InferenceSession

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return self.session.run(None, inputs)[0]


@dataclass(frozen=True)
class Exported:
    vlm: VLM
    vision: Lowered
    projector: Lowered


def lower(vlm: VLM, part: Part, folder: Path, precision: EncoderPrecision = FP16) -> Lowered:
    folder.mkdir(parents=True, exist_ok=True)
    graph = lower_vision(vlm.model, part, precision, OPSET, dialect="tensorrt")
    path = folder / f"{part.role}.onnx"
    stream_weights(graph.model, graph.groups, path, SilentProgress(), "write")
    onnx.checker.check_model(path, full_check=True)
    return Lowered(part, graph, path, ort.InferenceSession(path, providers=["CPUExecutionProvider"]))


def checkpoint(family: str, folder: Path) -> Path:
    if family == "demo":
        return model_dir()
    return make_tiny_gemma3(folder) if family == "gemma3" else make_tiny(family, folder)


def load(folder: Path) -> VLM:
    """The model in FP32, which is the reference whatever the checkpoint is stored as."""
    vlm = load_vlm(str(folder))
    vlm.model.float()
    return vlm


def export(vlm: VLM, folder: Path) -> Exported:
    return Exported(vlm, *(lower(vlm, part, folder) for part in split_vision(vlm, processor_examples(vlm))))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Each family exported once, when the first test asks for it."""

    def make(family: str) -> Exported:
        folder = tmp_path_factory.mktemp(family)
        return export(load(checkpoint(family, folder / "model")), folder / "onnx")

    return functools.cache(make)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest, exports: Callable[[str], Exported]) -> Exported:
    return exports(request.param)


@pytest.fixture(scope="module")
def idefics3(exports: Callable[[str], Exported]) -> Exported:
    return exports("idefics3")


@pytest.fixture(scope="module")
def limits() -> ParityLimits:
    found = load_target("tensorrt").limits
    assert isinstance(found, ParityLimits)
    return found


def test_runtime_agrees_on_shapes_that_were_not_traced(made: Exported, limits: ParityLimits) -> None:
    for inputs in untraced_inputs(made.vlm):
        expected = reference(made.vision.part, inputs)
        got = made.vision.run(as_arrays(inputs))
        assert relative(got, expected) <= limits.vision_rel
        rows = reference(made.projector.part, {"vision_features": torch.from_numpy(expected)})
        assert relative(made.projector.run({"vision_features": expected}), rows) <= limits.projector_rel


def test_every_operator_is_standard_and_of_static_effect(made: Exported) -> None:
    for lowered in (made.vision, made.projector):
        model = ir.load(lowered.path)
        assert dict(model.graph.opset_imports) == {"": OPSET}
        assert {node.domain for node in model.graph} == {""}
        assert not DATA_DEPENDENT & {node.op_type for node in model.graph}


def test_attention_and_products_are_fp16_and_the_rest_is_fp32(made: Exported) -> None:
    for lowered in (made.vision, made.projector):
        model = onnx.shape_inference.infer_shapes(onnx.load(lowered.path, load_external_data=False))
        types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
        half = {n.op_type for n in model.graph.node if types.get(n.output[0]) == onnx.TensorProto.FLOAT16}
        assert half <= {"MatMul", "Attention", "Cast"}
        products = {types[n.output[0]] for n in model.graph.node if n.op_type in ("MatMul", "Attention")}
        assert products == {onnx.TensorProto.FLOAT16}


def test_every_used_parameter_is_in_the_graph_by_name_and_value(made: Exported) -> None:
    parameters = dict(made.vlm.model.named_parameters())
    for lowered in (made.vision, made.projector):
        names = part_parameter_names(lowered.part)
        kept = {k.name: k for k in lowered.graph.kept}
        assert set(kept) == set(names)
        stored = ir.load(lowered.path).graph.initializers
        for name in names:
            got, expected = stored[name].const_value.numpy(), parameters[name].detach().numpy()
            assert str(got.dtype) == kept[name].dtype
            expected = expected.astype(got.dtype)
            assert np.array_equal(got, expected) or np.array_equal(got.T, expected), name


def build(path: Path, capability: str, images: tuple[int, int, int] = (1, 2, 6)) -> int:
    """Bytes of an engine built for GPUs of `capability`, with one profile over the number of images."""
    trt: Any = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (pip install vlmexport[rtx])")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        shapes = [tuple(count if size < 0 else size for size in tensor.shape) for count in images]
        profile.set_shape(tensor.name, *shapes)
    assert config.add_optimization_profile(profile) == 0
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)


def test_tensorrt_for_rtx_builds_it_for_any_number_of_images(made: Exported) -> None:
    for lowered in (made.vision, made.projector):
        assert build(lowered.path, "SM80") > 1e5


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["SM86", "SM89", "SM120"])
def test_tensorrt_for_rtx_builds_it_for_other_gpus(idefics3: Exported, capability: str) -> None:
    assert build(idefics3.vision.path, capability) > 1e5


def partly_padded(part: Part) -> dict[str, torch.Tensor]:
    """The first example with some of its pictures' pixels marked as padding."""
    mask = part.examples[0]["pixel_attention_mask"].clone()
    mask[:, 1, 16:, :] = 0
    mask[:, 2, :, 8:] = 0
    return {**part.examples[0], "pixel_attention_mask": mask}


def test_pixels_that_are_padding_are_not_seen(idefics3: Exported, limits: ParityLimits) -> None:
    inputs = partly_padded(idefics3.vision.part)
    expected = reference(idefics3.vision.part, inputs)
    assert relative(idefics3.vision.run(as_arrays(inputs)), expected) <= limits.vision_rel


def test_every_picture_counts_padding_included(idefics3: Exported) -> None:
    inputs = as_arrays(idefics3.vision.part.examples[0])
    padded = {name: np.concatenate([array, np.zeros_like(array)], axis=1) for name, array in inputs.items()}
    count = inputs["pixel_values"].shape[1]
    expected, got = idefics3.vision.run(inputs), idefics3.vision.run(padded)
    assert (len(expected), len(got)) == (count, 2 * count)
    # The caller drops what padding gave; the pictures beside it must not feel it.
    assert np.array_equal(got[:count], expected)


def changed(lowered: Lowered, change: Callable[[ir.Graph], None]) -> ort.InferenceSession:
    model = ir.load(lowered.path)
    change(model.graph)
    path = lowered.path.with_name("changed.onnx")
    ir.save(model, path)
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


def drop_masks(graph: ir.Graph) -> None:
    for node in graph:
        if node.op_type == "Attention":
            node.replace_input_with(3, None)


def corrupt_a_weight(graph: ir.Graph) -> None:
    weight = next(v for name, v in graph.initializers.items() if name.endswith("layers.1.self_attn.q_proj.weight"))
    weight.const_value = ir.tensor(np.flip(weight.const_value.numpy(), axis=0).copy(), name=weight.name)


@pytest.mark.parametrize("change", [drop_masks, corrupt_a_weight])
def test_the_comparison_sees_a_wrong_graph(
    idefics3: Exported, change: Callable[[ir.Graph], None], limits: ParityLimits
) -> None:
    inputs = partly_padded(idefics3.vision.part)
    got = changed(idefics3.vision, change).run(None, as_arrays(inputs))[0]
    assert relative(got, reference(idefics3.vision.part, inputs)) > limits.vision_rel


def attention_types(lowered: Lowered) -> list[int]:
    model = onnx.shape_inference.infer_shapes(onnx.load(lowered.path, load_external_data=False))
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    return [types[n.output[0]] for n in model.graph.node if n.op_type == "Attention"]


def judged_by_reference(lowered: Lowered, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """ONNX's own reference rounds every FP16 value; ONNX Runtime's CPU kernels may keep FP32 within."""
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(str(lowered.path)).run(None, as_arrays(inputs))[0]


def move_to_values(name: str) -> float:
    return {"v_proj": 2.0**20, "out_proj.weight": 2.0**-20}.get(name, 1.0)


def move_to_queries(name: str) -> float:
    return {"q_proj": 2.0**15, "k_proj": 2.0**-15}.get(name, 1.0)


def moved(folder: Path, factor: Callable[[str], float]) -> VLM:
    """LLaVA with powers of two moved between weights whose effects cancel: the same function, other activations."""
    vlm = load(folder)
    with torch.no_grad():
        for name, parameter in vlm.model.named_parameters():
            if "vision_tower" in name and ".layers.0." in name:
                keys = [key for key in ("v_proj", "out_proj.weight", "q_proj", "k_proj") if key in name]
                parameter.mul_(factor(keys[0]) if keys else 1.0)
    return vlm


@pytest.mark.parametrize("factor", [move_to_values, move_to_queries])
def test_attention_beyond_fp16_is_computed_in_fp32(
    factor: Callable[[str], float],
    tiny_llava: Path,
    tmp_path: Path,
    limits: ParityLimits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vlm = moved(tiny_llava, factor)
    part, _ = split_vision(vlm, processor_examples(vlm))
    inputs = vision_inputs(vlm, processor_examples(vlm)[2])
    expected = reference(part, inputs)
    lowered = lower(vlm, part, tmp_path / "safe")
    assert attention_types(lowered) == [onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16]
    assert relative(lowered.run(as_arrays(inputs)), expected) <= limits.vision_rel
    assert relative(judged_by_reference(lowered, inputs), expected) <= limits.vision_rel
    paths = frozenset(name for name, _ in vlm.model.named_modules())
    monkeypatch.setattr(standard_attention, "exact_in_half", lambda *_args: paths)
    naive = judged_by_reference(lower(vlm, part, tmp_path / "naive"), inputs)
    assert not np.isfinite(naive).all() or relative(naive, expected) > limits.vision_rel


def test_fp32_arithmetic_is_exact(tiny_llava: Path, tmp_path: Path) -> None:
    vlm = load(tiny_llava)
    part, _ = split_vision(vlm, processor_examples(vlm))
    lowered = lower(vlm, part, tmp_path, EncoderPrecision("fp32", "fp32"))
    assert set(attention_types(lowered)) == {onnx.TensorProto.FLOAT}
    inputs = untraced_inputs(vlm)[1]
    assert relative(lowered.run(as_arrays(inputs)), reference(part, inputs)) <= 1e-5


@pytest.mark.slow
def test_the_range_variant_is_finite_and_right(tmp_path: Path, limits: ParityLimits) -> None:
    made = export(load(make_range_variant(model_dir(), tmp_path / "variant")), tmp_path / "onnx")
    inputs = untraced_inputs(made.vlm)[0]
    expected, got = reference(made.vision.part, inputs), judged_by_reference(made.vision, inputs)
    assert np.isfinite(got).all()
    assert relative(got, expected) <= limits.vision_rel
