"""What transformers.js 4.3 expects of each model type that it runs: the client's own contract, found by running it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_NO_NAMES: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class WebFamily:
    """How the client calls one model type.

    `processor` and `image_processor` are its classes. `inputs` gives vision inputs the names that the client feeds
    them by, `masks` are those it feeds as booleans. `counts_all`: its processor adds the further image tokens without
    taking the class token off again. `images_first`: its processor takes the pictures before the text. `flat_config`:
    it reads the text model's sizes at the top of config.json. `each_picture`: its tower sees one picture at a time, and
    the graph goes over those that the client feeds at once. `states`: kinds of states that it keeps beside the cache.
    """

    processor: str
    image_processor: str
    inputs: Mapping[str, str] = field(default_factory=lambda: _NO_NAMES)
    masks: tuple[str, ...] = ()
    counts_all: bool = False
    images_first: bool = False
    flat_config: bool = False
    each_picture: bool = False
    states: tuple[str, ...] = ()


WEB_FAMILIES = {
    "idefics3": WebFamily("Idefics3Processor", "Idefics3ImageProcessor", masks=("pixel_attention_mask",)),
    "smolvlm": WebFamily("SmolVLMProcessor", "SmolVLMImageProcessor", masks=("pixel_attention_mask",)),
    "llava": WebFamily("LlavaProcessor", "CLIPImageProcessor", counts_all=True, images_first=True),
    "paligemma": WebFamily("PaliGemmaProcessor", "SiglipImageProcessor", images_first=True),
    "qwen2_vl": WebFamily(
        "Qwen2VLProcessor", "Qwen2VLImageProcessor", {"image_grid_thw": "grid_thw"}, flat_config=True
    ),
    "qwen2_5_vl": WebFamily("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor"),
    "mistral3": WebFamily("PixtralProcessor", "PixtralImageProcessor", images_first=True, each_picture=True),
    "lfm2_vl": WebFamily(
        "Lfm2VlProcessor", "Lfm2VlImageProcessor", images_first=True, each_picture=True, states=("conv",)
    ),
    "glm_ocr": WebFamily("Glm46VProcessor", "Glm46VImageProcessor"),
}
# Types that the client knows and this layout does not write yet.
UNWRITTEN = {
    "gemma3": "the decoder cannot see image positions in transformers.js",
    "gemma3n": "transformers.js also wants an audio encoder and inputs per layer from the embedding",
    "gemma4": "transformers.js also wants an audio encoder and inputs per layer from the embedding",
    "florence2": "transformers.js wants an encoder model of the text beside the decoder",
    "lighton_ocr": "transformers.js has no processor for it",
    "llava_onevision": "transformers.js has no processor for it, so nothing there lays out its tiles",
    "phi3_v": "transformers.js merges text and image in a graph of its own",
    "qwen3_vl": "transformers.js reads image_features alone, not what early decoder layers get of the image",
}
