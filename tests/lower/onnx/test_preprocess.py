"""Preprocessing graphs in ONNX Runtime against Pillow and the Hugging Face processors: the very same numbers."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.lower.onnx.preprocess import lower_preprocessor
from vlmexport.lower.onnx.preprocess_proof import check_outputs, prove, proven_preprocessor
from vlmexport.manifest import TensorSpec
from vlmexport.runtime.preprocessor import ProcessorTensors, feeds
from vlmexport.split.preprocess import Exact, Filter, Preprocessing, ShortSide, Whole, describe_processor, pass_order
from vlmexport.target import load_target, onnx_target_names

FILTERS: dict[Filter, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# From and to (width, height): smaller, larger, one way each, tall before and after, a row, a column, a dot, unchanged.
RESIZES = [
    ((60, 130), (30, 64)),
    ((130, 60), (64, 30)),
    ((37, 91), (100, 260)),
    ((100, 100), (200, 50)),
    ((100, 100), (50, 200)),
    ((300, 7), (33, 33)),
    ((1, 90), (32, 5)),
    ((90, 1), (7, 32)),
    ((1, 1), (32, 33)),
    ((50, 40), (1, 1)),
    ((45, 45), (45, 45)),
]
PROCESSORS: dict[str, Any] = {
    "shortest edge and crop": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=48),
    "crop that pads": CLIPImageProcessorPil(size={"shortest_edge": 41}, crop_size={"height": 48, "width": 45}),
    "crop alone": CLIPImageProcessorPil(do_resize=False, crop_size={"height": 48, "width": 45}),
    "two edges": CLIPImageProcessorPil(size={"shortest_edge": 48, "longest_edge": 60}, do_center_crop=False),
    "inside": CLIPImageProcessorPil(size={"max_height": 50, "max_width": 70}, do_center_crop=False, resample=1),
    "exact": SiglipImageProcessorPil(size={"height": 56, "width": 40}),
    "rescale alone": SiglipImageProcessorPil(size={"height": 56, "width": 40}, do_normalize=False),
    "normalise alone": SiglipImageProcessorPil(size={"height": 56, "width": 40}, do_rescale=False),
    "square": LlavaImageProcessorPil(size={"shortest_edge": 48}, crop_size=48, do_pad=True),
    "grid tiles": GotOcr2ImageProcessorPil(size={"height": 32, "width": 48}, crop_to_patches=True, max_patches=6),
    "two or more": GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=2),
    "patches": Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 20),
    "tiles": SmolVLMImageProcessorPil(size={"longest_edge": 129}, max_image_size={"longest_edge": 48}),
    "one tile": Idefics3ImageProcessorPil(
        size={"longest_edge": 90}, max_image_size={"longest_edge": 48}, do_image_splitting=False, do_pad=False
    ),
    "tiles as they come": Idefics3ImageProcessorPil(do_resize=False, max_image_size={"longest_edge": 48}),
}
SIZES = [(64, 64), (176, 72), (60, 130), (1, 1), (40, 1), (1, 30), (48, 48), (213, 320)]


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def session(steps: Preprocessing, opset: int = 21) -> ort.InferenceSession:
    data = ir.to_proto(lower_preprocessor(steps, opset)).SerializeToString()
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"])


def run(graph: ort.InferenceSession, picture: np.ndarray) -> dict[str, np.ndarray]:
    names = [output.name for output in graph.get_outputs()]
    return dict(zip(names, graph.run(None, {"image": picture}), strict=True))


def levels(steps: Preprocessing, picture: np.ndarray) -> np.ndarray:
    """The graph's ``pixel_values`` as ``[height, width, 3]``; `steps` divide by 1."""
    return run(session(steps), picture)["pixel_values"][0].transpose(1, 2, 0)


def resizing(resample: Filter, width: int, height: int) -> Preprocessing:
    return Preprocessing(resample, pass_order(), Exact(height, width), Whole(), rescale=1.0)


@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize(("old", "new"), RESIZES)
def test_resampling_is_pillows_to_the_last_level(resample: Filter, old: tuple[int, int], new: tuple[int, int]) -> None:
    picture = noise(*old)
    wanted = np.asarray(Image.fromarray(picture).resize(new, FILTERS[resample]))
    assert np.array_equal(levels(resizing(resample, *new), picture), wanted)


def test_the_order_of_older_pillow_changes_columns_first() -> None:
    picture, bilinear = noise(60, 130), Image.Resampling.BILINEAR
    wanted = np.asarray(Image.fromarray(picture).resize((30, 130), bilinear).resize((30, 64), bilinear))
    steps = resizing("bilinear", 30, 64)
    assert np.array_equal(levels(replace(steps, passes="columns"), picture), wanted)
    assert not np.array_equal(levels(replace(steps, passes="fewer"), picture), wanted)


def test_a_wide_picture_is_resized_in_blocks_of_windows() -> None:
    """No matrix from every source to every result column: such a graph would take 1.6 GB here."""
    picture = noise(20_000, 2)
    wanted = np.asarray(Image.fromarray(picture).resize((10_000, 2), Image.Resampling.BICUBIC))
    assert np.array_equal(levels(resizing("bicubic", 10_000, 2), picture), wanted)


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_graph_makes_the_processors_tensors(name: str) -> None:
    processor = PROCESSORS[name]
    steps = describe_processor(processor)
    graph = session(steps)
    told = {"return_row_col_info": True} if hasattr(processor, "return_row_col_info") else {}
    for width, height in SIZES:
        picture = noise(width, height)
        given = Image.fromarray(picture)
        wanted = processor(images=[[given]] if told else [given], return_tensors="pt", **told)
        for tensor, value in run(graph, picture).items():
            expected = np.asarray(wanted[tensor])
            assert (value.shape, value.dtype) == (expected.shape, expected.dtype), (tensor, width, height)
            assert np.array_equal(value, expected), (tensor, width, height)


@pytest.mark.parametrize("opset", sorted({load_target(name).onnx.opset for name in onnx_target_names()} | {24}))
def test_every_targets_opset_runs(opset: int) -> None:
    processor = PROCESSORS["tiles"]
    picture = noise(60, 130)
    wanted = processor(images=[[Image.fromarray(picture)]], return_tensors="pt")
    found = run(session(describe_processor(processor), opset), picture)
    assert np.array_equal(found["pixel_values"], np.asarray(wanted["pixel_values"]))


def test_a_picture_that_the_processor_refuses_stops_the_graph() -> None:
    thin = noise(402, 2)
    processor = PROCESSORS["patches"]
    graph = session(describe_processor(processor))
    with pytest.raises(ValueError, match="aspect ratio must be smaller"):
        processor(images=[Image.fromarray(thin)])
    with pytest.raises(Exception, match="Gather"):
        run(graph, thin)
    run(graph, noise(400, 2))


def test_a_size_of_nothing_stops_the_graph() -> None:
    """Pillow refuses it: 150 x 1 pixels inside 50 x 70 would have no height."""
    with pytest.raises(ValueError, match="must be > 0"):
        PROCESSORS["inside"](images=[Image.fromarray(noise(150, 1))])
    with pytest.raises(Exception, match="Gather"):
        run(session(describe_processor(PROCESSORS["inside"])), noise(150, 1))


class Shifted(Gemma3ImageProcessorPil):
    """Does more than its settings tell."""

    def normalize(self, image: np.ndarray, **settings: Any) -> np.ndarray:
        return super().normalize(np.roll(image, 1, axis=-1), **settings)


def test_a_class_that_does_more_than_it_says_is_refused() -> None:
    honest, shifted = (
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        Shifted(size={"height": 32, "width": 32}),
    )
    steps = describe_processor(honest)
    assert describe_processor(shifted) == steps
    names = ("pixel_values",)
    graph = lower_preprocessor(steps, 21)
    prove(graph, steps, _only(honest, names))
    with pytest.raises(UnsupportedModelError, match="differs from it on a 41x23 picture: pixels by up to"):
        prove(graph, steps, _only(shifted, names))


def _only(processor: Any, names: tuple[str, ...]) -> ProcessorTensors:
    """The tensors `names` of an image processor, as the processor around it passes them on."""

    class Only(ProcessorTensors):
        def __call__(self, picture: Any, wanted: Any) -> dict[str, np.ndarray]:
            return {name: value for name, value in super().__call__(picture, wanted).items() if name in names}

    return Only(processor)


def test_a_checkpoint_with_a_processor_is_proven(tiny_llava: Path, tiny_idefics3: Path) -> None:
    for folder in (tiny_llava, tiny_idefics3):
        assert proven_preprocessor(str(folder), "split", 21, trust_remote_code=False).graph.inputs[0].name == "image"


def test_an_image_processor_alone_is_enough(tmp_path: Path) -> None:
    """Where the processor does not load: Qwen2-VL's needs torchvision for its videos."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(BadInputError, match="the processor does not load"):
        proven_preprocessor(str(tmp_path), "split", 21, trust_remote_code=False)
    PROCESSORS["patches"].save_pretrained(tmp_path)
    graph = proven_preprocessor(str(tmp_path), "split", 21, trust_remote_code=False)
    assert [value.name for value in graph.graph.outputs] == ["pixel_values", "image_grid_thw"]


def test_another_layout_is_refused() -> None:
    with pytest.raises(BadInputError, match="goes with --layout split, not with transformersjs"):
        proven_preprocessor("demo", "transformersjs", 21, trust_remote_code=False)


PIXELS = TensorSpec("pixel_values", "float32", (1, 3, 48, 48))


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        (PIXELS, ""),
        (TensorSpec("pixel_values", "float32", ("num_images", 3, 48, 48)), ""),
        (TensorSpec("pixel_values", "float32", (1, 3, 64, 64)), r"dims \[1, 3, 48, 48\]"),
        (TensorSpec("pixel_values", "float32", (1, 1, 3, 48, 48)), r"dims \[1, 3, 48, 48\]"),
        (TensorSpec("image_sizes", "int64", (1, 2)), "takes image_sizes, which no preprocessing graph makes yet"),
    ],
)
def test_the_graph_must_make_what_the_encoder_takes(encoder: TensorSpec, reason: str) -> None:
    if not reason:
        return feeds([PIXELS], [encoder])
    with pytest.raises(UnsupportedModelError, match=reason):
        feeds([PIXELS], [encoder])
    return None


@pytest.mark.slow
def test_the_outputs_are_held_against_the_split(tiny_llava: Path) -> None:
    from vlmexport.model.load import load_vlm
    from vlmexport.split.capture import split_model

    split = split_model(load_vlm(str(tiny_llava)))
    graph = proven_preprocessor(str(tiny_llava), "split", 21, trust_remote_code=False)
    check_outputs(graph, split)
    other = Preprocessing("bicubic", pass_order(), ShortSide(16), Whole(), crop=(16, 16), rescale=1 / 255)
    with pytest.raises(UnsupportedModelError, match=r"of dims \[1, 3, 16, 16\]"):
        check_outputs(lower_preprocessor(other, 21), split)
