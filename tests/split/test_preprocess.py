"""Image processors as data: what their settings become, and the setting that has no graph form."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmexport.demo import model_dir
from vlmexport.errors import UnsupportedModelError
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.split.preprocess import (
    Exact,
    GridTiles,
    Inside,
    LongSide,
    PatchArea,
    Patches,
    Preprocessing,
    ShortSide,
    SquareTiles,
    Whole,
    describe_processor,
    pass_order,
    processor_settings,
)


def test_the_bundled_model() -> None:
    processor = PromptBuilder(model_dir()).processor
    assert describe_processor(processor) == Preprocessing(
        resample="lanczos",
        passes=pass_order(),
        resize=LongSide(64),
        form=SquareTiles(side=32, split=True, mask=True),
        rescale=1 / 255,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


CLIP = CLIPImageProcessorPil
FORMS: list[tuple[Any, dict[str, Any]]] = [
    (CLIP(size={"shortest_edge": 48}, crop_size=48), {"resize": ShortSide(48), "crop": (48, 48), "form": Whole()}),
    (CLIP(size={"shortest_edge": 48, "longest_edge": 60}, do_center_crop=False), {"resize": ShortSide(48, 60)}),
    (CLIP(size={"max_height": 50, "max_width": 70}), {"resize": Inside(50, 70)}),
    (CLIP(do_resize=False), {"resize": None}),
    (CLIP(do_rescale=False), {"rescale": None}),
    (CLIP(do_normalize=False), {"mean": None, "std": None}),
    (CLIP(resample=2), {"resample": "bilinear"}),
    (LlavaImageProcessorPil(do_pad=True, image_mean=[0.5, 0.25, 0.1]), {"square": (127, 63, 25)}),
    (LlavaImageProcessorPil(), {"square": None}),
    (Gemma3ImageProcessorPil(), {"resize": Exact(224, 224), "resample": "bilinear"}),
    (GotOcr2ImageProcessorPil(), {"resize": Exact(384, 384), "form": Whole()}),
    (GotOcr2ImageProcessorPil(crop_to_patches=True), {"resize": None, "form": GridTiles(384, 384, 1, 12)}),
    (Qwen2VLImageProcessorPil(), {"resize": PatchArea(28, 3136, 1003520), "form": Patches(14, 2, 2)}),
    (Idefics3ImageProcessorPil(do_image_splitting=False, do_pad=False), {"form": SquareTiles(364, False, False)}),
    (Idefics3ImageProcessorPil(size={"height": 30, "width": 40}), {"resize": Exact(30, 40)}),
]


@pytest.mark.parametrize(("processor", "wanted"), FORMS)
def test_settings_become_steps(processor: Any, wanted: dict[str, Any]) -> None:
    steps = describe_processor(processor)
    assert steps == replace(steps, **wanted)


REFUSED = {
    "resample=0": CLIP(resample=0),
    "do_pan_and_scan=True": Gemma3ImageProcessorPil(do_pan_and_scan=True),
    "patch_size=": PixtralImageProcessorPil(),
    "image_grid_pinpoints=": LlavaNextImageProcessorPil(),
    "pad_size=": CLIP(do_pad=True, pad_size={"height": 300, "width": 300}),
    "size=": Idefics3ImageProcessorPil(size={"longest_edge": 5000}),
    "do_resize=False": Qwen2VLImageProcessorPil(do_resize=False),
    "both off": CLIP(do_rescale=False, do_normalize=False),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_setting_without_a_form_is_refused_by_name(reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"--with-preprocessor.*{reason}") as caught:
        describe_processor(REFUSED[reason])
    assert "\n" not in str(caught.value)


def test_what_is_no_image_processor_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="object is no image processor"):
        describe_processor(object())


def test_what_the_processor_gives_its_image_processor_counts() -> None:
    """InternVL's processor, for one, turns on tiles that its image processor has off."""

    class Around:
        image_processor, tokenizer = GotOcr2ImageProcessorPil(), SimpleNamespace(init_kwargs={})

        def _merge_kwargs(self, **_: Any) -> dict[str, Any]:
            return {"images_kwargs": {"crop_to_patches": True}}

    assert not processor_settings(Around.image_processor)["crop_to_patches"]
    assert isinstance(describe_processor(Around()).form, GridTiles)


def test_one_level_is_the_step_between_two_pixels_in_each_channel() -> None:
    processor = CLIP(size={"height": 8, "width": 8}, do_center_crop=False)
    values = [processor(np.full((8, 8, 3), v, np.uint8), return_tensors="np")["pixel_values"] for v in (100, 101)]
    steps = np.ptp(np.array(values), axis=0)[0, :, 0, 0]
    assert steps == pytest.approx(describe_processor(processor).level, rel=1e-5)
