"""Variants of a Llama-decoder checkpoint that compute the same function and are harder to export well.

Both move powers of two between weights whose effects cancel, so FP32 and BF16 results do not change at all. They are
how gates and quantizers prove that they can tell good from bad.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vlmexport.errors import BadInputError

OUTLIER_EXPONENTS: Final = (3, 4)
OUTLIERS_PER_BLOCK: Final = 1
OUTLIER_BLOCK: Final = 128
RANGE_EXPONENT: Final = 11

_LAYER_TENSOR: Final = re.compile(
    r"^(?P<stack>.*)layers\.(?P<layer>\d+)\.(?P<part>(?:input|post_attention)_layernorm|self_attn\.[qkv]_proj|mlp\.(?:gate|up|down)_proj)"
    r"\.(?P<kind>weight|bias)$"
)
_NORMED_BY: Final = {
    "input_layernorm": "input_layernorm",
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
}

Rewrite = Callable[[int, str, torch.Tensor], torch.Tensor]


def make_outlier_variant(src: Path, dst: Path, seed: int = 0) -> Path:
    """Write `src` with planted outlier channels to `dst` and return it.

    In every block of `OUTLIER_BLOCK` input channels, a few columns of q, k, v, gate, up and down are multiplied by 8 or
    16 and what feeds them (the norm's weight; up's rows for down) is divided by the same. Plain round-to-nearest must
    then spread its levels over the outliers. This is the form of outlier that AWQ's scaling can undo.

    Raises:
        BadInputError: `src` holds no Llama decoder layers in safetensors, or `dst` exists.
    """

    def rewrite(layer: int, part: str, tensor: torch.Tensor) -> torch.Tensor:
        if part in _NORMED_BY:
            site = _NORMED_BY[part]
            factors = _outlier_factors(seed, layer, site, tensor.shape[-1])
            tensor = tensor / factors if part == site else tensor * factors
        if part == "mlp.up_proj":
            tensor = tensor / _outlier_factors(seed, layer, "mlp.down_proj", tensor.shape[0])[:, None]
        if part == "mlp.down_proj":
            tensor = tensor * _outlier_factors(seed, layer, part, tensor.shape[-1])
        return tensor

    return _rewrite_checkpoint(src, dst, rewrite)


def make_range_variant(src: Path, dst: Path, exponent: int = RANGE_EXPONENT) -> Path:
    """Write `src` with `2**exponent` moved from down_proj to up_proj to `dst` and return it.

    The input of down_proj then exceeds the FP16 range: a graph that computes naively in FP16 gives infinities or NaN.

    Raises:
        BadInputError: `src` holds no Llama decoder layers in safetensors, or `dst` exists.
    """

    def rewrite(layer: int, part: str, tensor: torch.Tensor) -> torch.Tensor:
        del layer
        if part == "mlp.up_proj":
            return tensor * 2.0**exponent
        return tensor * 2.0**-exponent if part == "mlp.down_proj" else tensor

    return _rewrite_checkpoint(src, dst, rewrite)


def _outlier_factors(seed: int, layer: int, site: str, size: int) -> torch.Tensor:
    """Return float32 [size]: 1, and a power of two at the outlier channels."""
    rng = Random(f"outliers {seed} {layer} {site}")
    factors = torch.ones(size)
    for start in range(0, size, OUTLIER_BLOCK):
        block = range(start, min(start + OUTLIER_BLOCK, size))
        for channel in rng.sample(block, min(OUTLIERS_PER_BLOCK, len(block))):
            factors[channel] = 2.0 ** rng.choice(OUTLIER_EXPONENTS)
    return factors


def _rewrite_checkpoint(src: Path, dst: Path, rewrite: Rewrite) -> Path:
    if dst.exists():
        raise BadInputError(f"{dst} exists; a variant is written to a new folder")
    files = sorted(src.glob("*.safetensors"))
    stacks = {stack for file in files for stack in _decoder_stacks(file)}
    if not stacks:
        raise BadInputError(f"{src} holds no Llama decoder layers in safetensors; variants need gate, up and down")
    shutil.copytree(src, dst, ignore=shutil.ignore_patterns("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        save_file(dict(_rewritten(file, stacks, rewrite)), dst / file.name, metadata=metadata)
    return dst


def _decoder_stacks(file: Path) -> set[str]:
    """Return what precedes `layers.` in a decoder's names; vision towers call their norms otherwise."""
    with safe_open(file, framework="pt") as stored:
        found = [_LAYER_TENSOR.match(name) for name in stored.keys()]  # noqa: SIM118
    return {match["stack"] for match in found if match is not None and match["part"] == "post_attention_layernorm"}


def _rewritten(file: Path, stacks: set[str], rewrite: Rewrite) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as stored:
        names = stored.keys()
        for name in names:
            tensor = stored.get_tensor(name)
            found = _LAYER_TENSOR.match(name)
            if found is not None and found["kind"] == "weight" and found["stack"] in stacks:
                exact = rewrite(int(found["layer"]), found["part"], tensor.float())
                tensor = exact.to(tensor.dtype).contiguous()
            yield name, tensor
