"""Family modules: only what the generic split cannot detect.

Each module is imported when a model of its family is met. For GGUF, a *text* module offers
``text(config, names) -> GgufHalf`` (`config` is the text config) and a *vision* module
``vision(config, preprocessor, names) -> GgufHalf`` (`config` is the whole model's, `preprocessor` the
image processor's settings); `names` are the weights' names, by which optional tensors are known. Both raise
`UnsupportedModelError` with the reason when llama.cpp cannot run such a model.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from vlmexport.errors import UnsupportedModelError

# model_type of the text config -> module of this package.
GGUF_TEXT = {
    "llama": "gguf_llama",
    "mistral": "gguf_llama",
    "ministral3": "gguf_llama",
    "llama4_text": "gguf_llama4",
    "qwen2": "gguf_llama",
    "qwen3": "gguf_llama",
    "qwen2_vl_text": "gguf_qwen",
    "qwen2_5_vl_text": "gguf_qwen",
    "qwen3_vl_text": "gguf_qwen",
    "qwen3_vl_moe_text": "gguf_qwen",
    "gemma3_text": "gguf_gemma3",
    "lfm2": "gguf_lfm2",
}
# model_type of the whole config -> module of this package.
GGUF_VISION = {
    "idefics3": "gguf_idefics3",
    "smolvlm": "gguf_idefics3",
    "llava": "gguf_llava",
    "llava_next": "gguf_llava",
    "llama4": "gguf_llama4",
    "mistral3": "gguf_pixtral",
    "internvl": "gguf_internvl",
    "qwen2_vl": "gguf_qwen_vl",
    "qwen2_5_vl": "gguf_qwen_vl",
    "qwen3_vl": "gguf_qwen_vl",
    "qwen3_vl_moe": "gguf_qwen_vl",
    "gemma3": "gguf_gemma3_vision",
    "lfm2_vl": "gguf_lfm2_vision",
}


def gguf_text_module(model_type: str) -> ModuleType:
    """The module that knows text models of `model_type`; raises `UnsupportedModelError` when there is none."""
    return _module(GGUF_TEXT, model_type, "text model")


def gguf_vision_module(model_type: str) -> ModuleType:
    """The module that knows the vision side of `model_type`; raises `UnsupportedModelError` when there is none."""
    return _module(GGUF_VISION, model_type, "vision side")


def _module(table: dict[str, str], model_type: str, what: str) -> ModuleType:
    if model_type not in table:
        known = ", ".join(sorted(table))
        raise UnsupportedModelError(f"{model_type}: no GGUF form of this {what} is known; known: {known}")
    return importlib.import_module(f"vlmexport.families.{table[model_type]}")
