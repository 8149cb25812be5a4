"""What the vision halves of several families share: clip's keys and the names of a CLIP- or SigLIP-like encoder.

Facts from llama.cpp b11549: tools/mtmd/clip-impl.h (key and tensor names), tools/mtmd/clip.cpp (``load_hparams``).
"""

from __future__ import annotations

from typing import Any

from vlmexport.model.family import MetaValue, TensorRule, linear


def vision_metadata(config: Any, projector: str) -> dict[str, MetaValue]:
    """The keys that clip reads of every vision encoder; `config` is the whole model's."""
    encoder = config.vision_config
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": projector,
        "clip.vision.projection_dim": int(config.get_text_config().hidden_size),
        "clip.vision.image_size": _side(encoder.image_size),
        "clip.vision.patch_size": _side(encoder.patch_size),
        "clip.vision.embedding_length": int(encoder.hidden_size),
        "clip.vision.feed_forward_length": int(encoder.intermediate_size),
        "clip.vision.block_count": int(encoder.num_hidden_layers),
        "clip.vision.attention.head_count": int(encoder.num_attention_heads),
    }


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def encoder_rules(block: str) -> tuple[TensorRule, ...]:
    """Rules of one CLIP or SigLIP block; `block` is its name with ``{i}``."""
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_out",
        "layer_norm1": "ln1",
        "layer_norm2": "ln2",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
    }
    return tuple(linear(f"{block}.{source}", f"v.blk.{{i}}.{target}") for source, target in names.items())
