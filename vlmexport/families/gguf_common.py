"""Metadata that llama.cpp's text architectures share: sizes, rotary embedding, context; and checks of what they assume.

Facts from llama.cpp b11549: src/llama-arch.cpp (key names), src/llama-model.cpp (``load_hparams``),
src/llama-context.cpp (YaRN's attention factor).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.family import MetaValue


def require(config: Any, key: str, allowed: Collection[Any], why: str, default: Any = None) -> Any:
    """The value of ``config.<key>`` if it is one of `allowed`; raises `UnsupportedModelError` with `why` otherwise."""
    value = getattr(config, key, default)
    if value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed)
        raise UnsupportedModelError(f"{config.model_type}: {key} is {value!r}, and {why} (it runs {choices})")
    return value


def refuse_weights(names: Iterable[str], ends: tuple[str, ...], why: str) -> None:
    """Raise `UnsupportedModelError` when a weight's name ends with one of `ends`, which llama.cpp has no place for."""
    found = next((name for name in names if name.endswith(ends)), None)
    if found is not None:
        raise UnsupportedModelError(f"{found} would be lost: {why}")


def head_dim(config: Any) -> int:
    """Elements of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_heads(config: Any) -> int:
    """Heads of the keys and values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def text_metadata(config: Any, arch: str) -> dict[str, MetaValue]:
    """The keys that every decoder architecture reads, rotary scaling excepted (see `rope_metadata`).

    The context length is the sliding window's where the config has one that holds for every layer: llama.cpp's plain
    architectures attend to all of the past, which is the same up to there.
    """
    context = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    if window:
        context = min(context, int(window))
    return {
        f"{arch}.block_count": int(config.num_hidden_layers),
        f"{arch}.context_length": context,
        f"{arch}.embedding_length": int(config.hidden_size),
        f"{arch}.feed_forward_length": int(config.intermediate_size),
        f"{arch}.attention.head_count": int(config.num_attention_heads),
        f"{arch}.attention.head_count_kv": kv_heads(config),
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.attention.key_length": head_dim(config),
        f"{arch}.attention.value_length": head_dim(config),
        f"{arch}.vocab_size": int(config.vocab_size),
        f"{arch}.rope.dimension_count": head_dim(config),
    }


def rope_parameters(config: Any) -> dict[str, Any]:
    """The rotary settings of `config`, in transformers 5's form (``rope_theta``, ``rope_type``, ...)."""
    found: Mapping[str, Any] | None = getattr(config, "rope_parameters", None)
    if not found or "rope_theta" not in found:
        raise UnsupportedModelError(f"{config.model_type}: rope_parameters are {found!r}, without a rope_theta")
    return dict(found)


def rope_metadata(
    config: Any, arch: str, *, factors: bool = False, betas: bool = False
) -> tuple[dict[str, MetaValue], dict[str, list[float]]]:
    """The keys of the rotary embedding, and the tensors that it needs (``rope_freqs.weight``).

    `factors`: the architecture reads ``rope_freqs.weight``, as Llama 3's scaling needs. `betas`: it reads YaRN's ramp.
    Raises `UnsupportedModelError` for a scaling that the architecture would compute otherwise or ignore.
    """
    rope = rope_parameters(config)
    kind = str(rope.get("rope_type") or "default")
    keys: dict[str, MetaValue] = {f"{arch}.rope.freq_base": float(rope["rope_theta"])}
    if float(rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{config.model_type}: partial_rotary_factor is {rope['partial_rotary_factor']}, but llama.cpp's {arch} "
            "rotates whole heads"
        )
    if kind == "default":
        return keys, {}
    if kind == "linear":
        scaling: dict[str, MetaValue] = {"type": "linear", "factor": float(rope["factor"])}
    elif kind == "yarn":
        scaling = _yarn(config, rope, arch, betas)
    elif kind == "llama3" and factors:
        return keys, {"rope_freqs.weight": llama3_factors(rope, head_dim(config))}
    else:
        raise UnsupportedModelError(
            f"{config.model_type}: rope_type {kind!r} has no equal in llama.cpp's {arch} (it runs default, linear, "
            f"yarn{', llama3' if factors else ''})"
        )
    return {**keys, **{f"{arch}.rope.scaling.{key}": value for key, value in scaling.items()}}, {}


def _yarn(config: Any, rope: Mapping[str, Any], arch: str, betas: bool) -> dict[str, MetaValue]:
    original = int(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or config.max_position_embeddings / original)
    fast, slow = float(rope.get("beta_fast") or 32), float(rope.get("beta_slow") or 1)
    if not betas and (fast, slow) != (32.0, 1.0):
        raise UnsupportedModelError(
            f"{config.model_type}: YaRN's beta_fast and beta_slow are {fast} and {slow}, but llama.cpp's {arch} "
            "has 32 and 1"
        )
    if not rope.get("truncate", True):
        raise UnsupportedModelError(f"{config.model_type}: YaRN with truncate false, but llama.cpp rounds its ramp")
    scaling: dict[str, MetaValue] = {"type": "yarn", "factor": factor, "original_context_length": original}
    if betas:
        scaling |= {"yarn_beta_fast": fast, "yarn_beta_slow": slow}
    # Without this key llama.cpp multiplies by 1 + 0.1 ln(factor), as transformers does by default.
    relative = _attention_factor(rope, factor) / _mscale(factor, 1.0)
    if abs(relative - 1) > 1e-6:
        scaling["attn_factor"] = relative
    return scaling


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    """What transformers multiplies cos and sin by (modeling_rope_utils.py, ``_compute_yarn_parameters``)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(factor, float(rope["mscale"])) / _mscale(factor, float(rope["mscale_all_dim"]))
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def llama3_factors(rope: Mapping[str, Any], dim: int) -> list[float]:
    """Llama 3's divisors of the rotary frequencies, ``[dim / 2]`` (transformers: ``_compute_llama3_parameters``)."""
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    divisors = []
    for pair in range(0, dim, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (pair / dim)
        turns = original / wavelength  # rotations over the original context
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(factor)
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1.0 / ((1 - smooth) / factor + smooth))
    return divisors


def pixel_statistics(preprocessor: Mapping[str, Any], model_type: str) -> dict[str, MetaValue]:
    """``clip.vision.image_mean`` and ``image_std``; raises `UnsupportedModelError` when there are no such values.

    An image processor that does not normalise is one with mean 0 and deviation 1.
    """
    if not preprocessor.get("do_normalize", True):
        mean, std = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
    else:
        mean, std = (_three(preprocessor, key, model_type) for key in ("image_mean", "image_std"))
    rescale = float(preprocessor.get("rescale_factor", 1 / 255))
    if not preprocessor.get("do_rescale", True) or abs(rescale * 255 - 1) > 1e-6:
        raise UnsupportedModelError(
            f"{model_type}: its image processor rescales by {rescale} (do_rescale "
            f"{preprocessor.get('do_rescale', True)}), but llama.cpp divides pixels by 255"
        )
    return {"clip.vision.image_mean": mean, "clip.vision.image_std": std}


def _three(preprocessor: Mapping[str, Any], key: str, model_type: str) -> list[float]:
    value = preprocessor.get(key)
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise UnsupportedModelError(f"{model_type}: {key} of its image processor is {value!r}, not three numbers")
    return [float(number) for number in value]
