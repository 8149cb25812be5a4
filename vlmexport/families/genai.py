"""What onnxruntime-genai 0.18 expects of each model type that it runs with pictures: found by running it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GenaiFamily:
    """How the runtime calls one model type.

    `runs_as` is the type in genai_config.json: it chooses how the runtime counts positions and prepares prompts.
    """

    runs_as: str


GENAI_FAMILIES = {
    "qwen2_vl": GenaiFamily("qwen2_5_vl"),
    "qwen2_5_vl": GenaiFamily("qwen2_5_vl"),
}
# Types that the runtime knows and this layout does not write, with the reason.
UNWRITTEN = {
    "gemma3": "its image tokens see each other, and onnxruntime-genai runs every decoder with a causal mask",
    "gemma4": "onnxruntime-genai also wants an audio encoder and inputs per layer from the embedding",
    "mistral3": "onnxruntime-genai gives its vision encoder a picture without its size; this layout has no such form",
    "phi3_v": "its graphs have another form in onnxruntime-genai, which this layout does not write yet",
    "phi4_multimodal": "its graphs have another form in onnxruntime-genai, which this layout does not write yet",
    "qwen3_vl": "onnxruntime-genai gives the decoder nothing of the image beside the embeddings",
    "qwen3_vl_moe": "onnxruntime-genai gives the decoder nothing of the image beside the embeddings",
    "qwen3_5": "the states of its linear attention have other names in onnxruntime-genai",
    "qwen3_5_moe": "the states of its linear attention have other names in onnxruntime-genai",
}
