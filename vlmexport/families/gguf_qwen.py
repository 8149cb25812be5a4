"""The decoders of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts in llama.cpp (b11549).

Facts from src/models/qwen2vl.cpp, qwen3vl.cpp and qwen3vlmoe.cpp: rotary positions of three axes, in sections of
frequencies for Qwen2 and interleaved for Qwen3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.gguf_common import (
    head_dim,
    refuse_weights,
    require,
    rope_metadata,
    rope_parameters,
    text_metadata,
)
from vlmexport.families.gguf_llama import decoder_rules
from vlmexport.model.family import GgufHalf, MetaValue, TensorRule, Transform, linear


@dataclass(frozen=True)
class _Form:
    """What sets one decoder apart: `sections` are transformers' own where the config names none.

    `square`: llama.cpp assumes heads x head_dim = hidden size.
    """

    arch: str
    sections: tuple[int, int, int]
    square: bool = False
    experts: bool = False


_FORMS = {
    "qwen2_vl_text": _Form("qwen2vl", (16, 24, 24), square=True),
    "qwen2_5_vl_text": _Form("qwen2vl", (16, 24, 24), square=True),
    "qwen3_vl_text": _Form("qwen3vl", (24, 20, 20)),
    "qwen3_vl_moe_text": _Form("qwen3vlmoe", (24, 20, 20), experts=True),
}


def text_arch(config: Any) -> str:
    """llama.cpp's architecture of a text config of this module."""
    return _FORMS[config.model_type].arch


def text(config: Any, names: Sequence[str]) -> GgufHalf:
    """The rules and keys of a decoder; raises `UnsupportedModelError` for what llama.cpp would compute otherwise."""
    form = _FORMS[config.model_type]
    require(config, "hidden_act", ("silu", "swish"), f"llama.cpp's {form.arch} has SiLU in its MLP")
    no_place = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
    refuse_weights(names, no_place, f"llama.cpp's {form.arch} has no tensor for it")
    if form.square and head_dim(config) * config.num_attention_heads != config.hidden_size:
        raise UnsupportedModelError(
            f"{config.model_type}: {config.num_attention_heads} heads of {head_dim(config)} are not the hidden size "
            f"{config.hidden_size}, which llama.cpp's {form.arch} assumes"
        )
    rope_keys, computed = rope_metadata(config, form.arch)
    metadata: dict[str, MetaValue] = {
        **text_metadata(config, form.arch),
        **rope_keys,
        f"{form.arch}.rope.dimension_sections": _sections(config, form),
    }
    rules = decoder_rules(config, pairs=False)
    if form.experts:
        metadata |= _expert_metadata(config, form.arch)
        rules = (*rules, *_expert_rules())
    return GgufHalf(form.arch, rules, metadata, computed)


def _sections(config: Any, form: _Form) -> list[int]:
    """Frequencies of the time, height and width axes, and of a fourth that these models do not have."""
    sections = [int(size) for size in rope_parameters(config).get("mrope_section") or form.sections]
    if len(sections) != 3 or sum(sections) != head_dim(config) // 2:
        raise UnsupportedModelError(
            f"{config.model_type}: mrope_section is {sections}, but a head of {head_dim(config)} elements has "
            f"{head_dim(config) // 2} frequencies for three axes"
        )
    return [*sections, 0]


def _expert_metadata(config: Any, arch: str) -> dict[str, MetaValue]:
    """Sizes of the experts; raises `UnsupportedModelError` where some layers have none."""
    dense = list(getattr(config, "mlp_only_layers", None) or [])
    step = int(getattr(config, "decoder_sparse_step", 1))
    if dense or step != 1:
        raise UnsupportedModelError(
            f"{config.model_type}: mlp_only_layers {dense} and decoder_sparse_step {step} leave layers without "
            f"experts, but every layer of llama.cpp's {arch} has them"
        )
    require(config, "norm_topk_prob", (True,), f"llama.cpp's {arch} normalises the weights of the chosen experts", True)
    return {
        f"{arch}.expert_count": int(config.num_experts),
        f"{arch}.expert_used_count": int(config.num_experts_per_tok),
        f"{arch}.expert_feed_forward_length": int(config.moe_intermediate_size),
    }


def _expert_rules() -> tuple[TensorRule, ...]:
    block, mlp = "blk.{i}", "layers.{i}.mlp"
    gate_up = (f"{block}.ffn_gate_exps.weight", f"{block}.ffn_up_exps.weight")
    return (
        linear(f"{mlp}.gate", f"{block}.ffn_gate_inp"),
        TensorRule(f"{mlp}.experts.gate_up_proj", gate_up, Transform("split_expert_rows"), whole=True),
        TensorRule(f"{mlp}.experts.down_proj", (f"{block}.ffn_down_exps.weight",), whole=True),
    )
