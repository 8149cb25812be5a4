"""Names of a Qwen vision side's weights in llama.cpp (b11549: tools/mtmd/models/qwen{2,3}vl.cpp)."""

from __future__ import annotations

from collections.abc import Mapping

from vlmexport.model.family import TensorRule, Transform, linear

TOWER = "model.visual"
_THIRDS = Transform("split_rows", (3,))


def block_rules(mlp: Mapping[str, str], *, fused: bool) -> tuple[TensorRule, ...]:
    """Rules of one block; Qwen3's graph reads the fused projection, Qwen2's its three parts."""
    source, target = f"{TOWER}.blocks.{{i}}", "v.blk.{i}"
    parts = ("attn_qkv",) if fused else ("attn_q", "attn_k", "attn_v")
    split = None if fused else _THIRDS
    return (
        linear(f"{source}.norm1", f"{target}.ln1"),
        linear(f"{source}.norm2", f"{target}.ln2"),
        TensorRule(f"{source}.attn.qkv", tuple(f"{target}.{part}" for part in parts), split, split),
        linear(f"{source}.attn.proj", f"{target}.attn_out"),
        *(linear(f"{source}.{name}", f"{target}.{stem}") for name, stem in mlp.items()),
    )


def merger_rules(norm: str, first: str, second: str) -> tuple[TensorRule, ...]:
    """The norm before the merger and its two matrices, by the names that transformers has for them."""
    merger = f"{TOWER}.merger"
    return (
        linear(f"{merger}.{norm}", "v.post_ln"),
        linear(f"{merger}.{first}", "mm.0"),
        linear(f"{merger}.{second}", "mm.2"),
    )


def patch_rules() -> tuple[TensorRule, ...]:
    """The convolution over two frames, as one for each; Qwen3's has a bias."""
    source = f"{TOWER}.patch_embed.proj"
    frames = ("v.patch_embd.weight", "v.patch_embd.weight.1")
    return (
        TensorRule(f"{source}.weight", frames, Transform("split_frames"), whole=True),
        TensorRule(f"{source}.bias", ("v.patch_embd.bias",), whole=True),
    )


def deepstack_rules(number: int, layer: int) -> tuple[TensorRule, ...]:
    """The merger of an early layer's features: llama.cpp names it by the layer."""
    source, target = f"{TOWER}.deepstack_merger_list.{number}", f"v.deepstack.{layer}"
    return (
        linear(f"{source}.norm", f"{target}.norm"),
        linear(f"{source}.linear_fc1", f"{target}.fc1"),
        linear(f"{source}.linear_fc2", f"{target}.fc2"),
    )
