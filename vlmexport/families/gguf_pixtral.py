"""The vision side of Pixtral and Mistral 3 in llama.cpp (b11549: tools/mtmd/models/pixtral.cpp).

llama.cpp rounds a picture's sides to the nearest multiple of a token's side and keeps to 8 ... 1024 tokens; Pixtral's
processor rounds up and keeps to its longest edge. For pictures between multiples, or of more tokens, prompts differ.
The file has no key for it; the gate says so by its prompt ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import pixel_statistics, require, rope_parameters
from vlmexport.families.gguf_vision import blocks_used, unused_blocks, vision_metadata
from vlmexport.model.family import GgufHalf, MetaValue, TensorRule, Transform, linear

_BLOCK = "model.vision_tower.transformer.layers.{i}"
_PROJECTOR = "model.multi_modal_projector"
_THETA = 10000.0
_BREAK = "[IMG_BREAK]"
_NORM_EPS = 1e-5  # modeling_pixtral.py has it as a constant


def vision(config: Any, preprocessor: Mapping[str, Any], names: Sequence[str]) -> GgufHalf:
    """The rules and keys of Pixtral's encoder, with or without Mistral 3's patch merger.

    The row of ``[IMG_BREAK]`` in the text model's table is written into this half too: llama.cpp puts it between the
    rows of patches itself. Raises `UnsupportedModelError` for a rotary base or an activation that is not llama.cpp's.
    """
    encoder = config.vision_config
    theta = float(rope_parameters(encoder)["rope_theta"])
    if theta != _THETA:
        raise UnsupportedModelError(
            f"{config.model_type}: rope_theta of the encoder is {theta}; llama.cpp has {_THETA}"
        )
    require(config, "projector_hidden_act", ("gelu", "gelu_pytorch_tanh"), "llama.cpp's projector has GELU")
    activation = require(encoder, "hidden_act", ("silu", "gelu"), "llama.cpp's encoder does not have it")
    turned = Transform("permute", (int(encoder.num_attention_heads),))
    metadata: dict[str, MetaValue] = {
        **vision_metadata(config, "pixtral"),
        **pixel_statistics(preprocessor, config.model_type),
        "clip.vision.attention.layer_norm_epsilon": _NORM_EPS,
        "clip.use_silu" if activation == "silu" else "clip.use_gelu": True,
        "clip.vision.block_count": blocks_used(config),
    }
    merge = getattr(config, "spatial_merge_size", None)
    if merge:
        metadata["clip.vision.spatial_merge_size"] = int(merge)
    rules = (
        linear("model.vision_tower.patch_conv", "v.patch_embd"),
        linear("model.vision_tower.ln_pre", "v.pre_ln"),
        linear(f"{_BLOCK}.attention.q_proj", "v.blk.{i}.attn_q", turned),
        linear(f"{_BLOCK}.attention.k_proj", "v.blk.{i}.attn_k", turned),
        linear(f"{_BLOCK}.attention.v_proj", "v.blk.{i}.attn_v"),
        linear(f"{_BLOCK}.attention.o_proj", "v.blk.{i}.attn_out"),
        linear(f"{_BLOCK}.attention_norm", "v.blk.{i}.ln1"),
        linear(f"{_BLOCK}.ffn_norm", "v.blk.{i}.ln2"),
        linear(f"{_BLOCK}.feed_forward.gate_proj", "v.blk.{i}.ffn_gate"),
        linear(f"{_BLOCK}.feed_forward.up_proj", "v.blk.{i}.ffn_up"),
        linear(f"{_BLOCK}.feed_forward.down_proj", "v.blk.{i}.ffn_down"),
        linear(f"{_PROJECTOR}.norm", "mm.input_norm"),
        linear(f"{_PROJECTOR}.patch_merger.merging_layer", "mm.patch_merger"),
        linear(f"{_PROJECTOR}.linear_1", "mm.1"),
        linear(f"{_PROJECTOR}.linear_2", "mm.2"),
    )
    unused = unused_blocks(config, _BLOCK)
    return GgufHalf("pixtral", rules, metadata, unused=unused, borrowed=(_break_row(config, preprocessor),))


def _break_row(config: Any, preprocessor: Mapping[str, Any]) -> TensorRule:
    ids: Mapping[str, int] = preprocessor.get("added_tokens") or {}
    if _BREAK not in ids:
        raise UnsupportedModelError(
            f"{config.model_type}: the tokenizer has no {_BREAK} token, which llama.cpp puts between rows of patches"
        )
    row = Transform("row", (int(ids[_BREAK]),))
    return TensorRule("embed_tokens.weight", ("v.token_embd.img_break",), row, whole=True)
