"""Rules of the lint for the operators of decoders: Attention, TensorScatter, RotaryEmbedding and DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from vlmexport.lower.tensorrt import operators
from vlmexport.lower.tensorrt.lint_view import Dim, Problem, Rule, Site, type_name

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_CACHE_TYPES = (*_HALF, TensorProto.FLOAT)
_CODES = (TensorProto.INT4, TensorProto.INT8)
_PRECISION: dict[int | None, str] = {TensorProto.INT4: "int4", TensorProto.INT8: "int8"}
_USUAL_BLOCKS = (32, 64, 128)


@dataclass(frozen=True)
class _Heads:
    """The sizes that Attention sees, each None or a symbol where unknown."""

    batch: Dim
    heads: Dim
    kv_heads: Dim
    queries: Dim
    keys: Dim
    head_dim: Dim
    value_dim: Dim

    @staticmethod
    def of(site: Site) -> _Heads | None:
        """From [B, heads, S, D] or [B, S, heads * D] tensors; None when a rank is unknown."""
        query, key, value = (site.shape(i) for i in range(3))
        if query is None or key is None or value is None:
            return None
        if len(query) == len(key) == len(value) == 4:
            return _Heads(query[0], query[1], key[1], query[2], key[2], query[3], value[3])
        heads, kv_heads = site.attributes.get("q_num_heads"), site.attributes.get("kv_num_heads")
        if not heads or not kv_heads or not len(query) == len(key) == len(value) == 3:
            return None
        width = [_per_head(shape[2], n) for shape, n in ((query, heads), (value, kv_heads))]
        return _Heads(query[0], heads, kv_heads, query[1], key[1], width[0], width[1])


def _per_head(width: Dim, heads: int) -> Dim:
    return width // heads if isinstance(width, int) else None


def attention_outputs(site: Site) -> Iterator[Problem]:
    """More than one output: neither present keys and values nor the scores can be asked for."""
    if len(site.node.output) > 1:
        yield Problem(
            "error", "TensorRT imports Attention with one output", "keep the cache with TensorScatter, drop the others"
        )


def attention_inputs(site: Site) -> Iterator[Problem]:
    """Past keys and values are refused; the length without padding is read past, so its rows attend to padding."""
    if site.input(4) or site.input(5):
        yield Problem("error", "Attention with past keys and values", "keep the cache with TensorScatter")
    if site.input(6):
        yield Problem(
            "error",
            "Attention's nonpad_kv_seqlen is ignored without a word: padding would be attended to",
            "give a mask [batch, 1, queries, keys]",
        )


def attention_attributes(site: Site) -> Iterator[Problem]:
    """Attributes without a counterpart in TensorRT's attention, and a causal one beside a mask."""
    if site.attributes.get("softcap", 0.0) != 0.0:
        yield Problem("error", "Attention with softcap", "write the attention out, with FP32 Softmax")
    if "softmax_precision" in site.attributes:
        yield Problem("error", "Attention with softmax_precision", "leave it out")
    if site.attributes.get("is_causal", 0) and site.input(3):
        yield Problem("error", "Attention with is_causal and a mask", "put the causal part into the mask")


def attention_mask(site: Site) -> Iterator[Problem]:
    """The mask is BOOL or of the query's type, and broadcasts to [batch, heads, queries, keys]."""
    if not site.input(3):
        return
    mask, query = site.dtype(3), site.dtype(0)
    if None not in (mask, query) and mask not in (TensorProto.BOOL, query):
        yield Problem(
            "error",
            f"Attention of {type_name(query)} with a mask of {type_name(mask)}",
            f"make the mask BOOL or {type_name(query)}",
        )
    heads, shape = _Heads.of(site), site.shape(3)
    if heads is None or shape is None:
        return
    wanted = (heads.batch, heads.heads, heads.queries, heads.keys)
    for have, want in zip(reversed(shape), reversed(wanted), strict=False):
        if isinstance(have, int) and isinstance(want, int) and have not in (1, want):
            yield Problem(
                "error",
                f"Attention's mask {list(shape)} does not broadcast to {list(wanted)}",
                "give each key a column",
            )
            return


def attention_heads(site: Site) -> Iterator[Problem]:
    """Query heads are a multiple of the key heads, and values are as wide as keys."""
    heads = _Heads.of(site)
    if heads is None:
        return
    if isinstance(heads.heads, int) and isinstance(heads.kv_heads, int) and heads.heads % heads.kv_heads:
        yield Problem(
            "error",
            f"Attention of {heads.heads} query heads over {heads.kv_heads} key heads, no divisor of them",
            "repeat the key heads",
        )
    sizes = heads.head_dim, heads.value_dim
    if isinstance(sizes[0], int) and isinstance(sizes[1], int) and sizes[0] != sizes[1]:
        yield Problem(
            "error", f"Attention with keys of {sizes[0]} and values of {sizes[1]} a head", "pad the narrower with zeros"
        )


def attention_kernel(site: Site) -> Iterator[Problem]:
    """No kernel: Attention parses and then fails in the build ("not supported by a dedicated kernel")."""
    dtype, heads = site.dtype(0), _Heads.of(site)
    if _needs_no_kernel(site, heads):
        return
    if dtype is not None and dtype not in _HALF:
        yield Problem(
            "error", f"Attention of {type_name(dtype)} has no kernel", "cast to FLOAT16 around it, or write it out"
        )
    if heads is None or not isinstance(heads.head_dim, int):
        return
    size, masked = heads.head_dim, bool(site.input(3))
    smallest = operators.SMALLEST_MASKED_HEAD if masked else operators.SMALLEST_HEAD
    step = operators.MASKED_HEAD_STEP if masked else 1
    if not smallest <= size <= operators.LARGEST_HEAD or size % step:
        what = f"multiples of {step} from {smallest}" if masked else f"{smallest}"
        yield Problem(
            "error",
            f"Attention {'with' if masked else 'without'} a mask has no kernel for head size {size}, only for {what} "
            f"to {operators.LARGEST_HEAD}",
            "pad the heads with zeros, or write the attention out",
        )


def _needs_no_kernel(site: Site, heads: _Heads | None) -> bool:
    """Whether the build writes it out: [B, S, heads * D] of fixed sizes, as many key heads, no mask, not causal."""
    if heads is None or site.input(3) or site.attributes.get("is_causal", 0) or heads.heads != heads.kv_heads:
        return False
    shapes = [site.shape(i) or () for i in range(3)]
    return all(len(shape) == 3 and all(isinstance(d, int) for d in shape) for shape in shapes)


def scatter_form(site: Site) -> Iterator[Problem]:
    """The cache is [batch, heads, slots, head size], of a float type and a fixed length, written along the slots."""
    shape, dtype, axis = site.shape(0), site.dtype(0), site.attributes.get("axis", -2)
    if shape is not None and len(shape) != 4:
        yield Problem("error", f"TensorScatter into a cache of rank {len(shape)}", "make it [batch, heads, slots, D]")
    elif axis not in (-2, 2):
        yield Problem("error", f"TensorScatter along axis {axis}", "write along axis -2")
    elif shape is not None and not isinstance(shape[2], int):
        yield Problem("error", "TensorScatter into a cache without a fixed length", "fix the cache's axis -2")
    if dtype is not None and dtype not in _CACHE_TYPES:
        yield Problem("error", f"TensorScatter into a {type_name(dtype)} cache", "use FLOAT16, BFLOAT16 or FLOAT")


def scatter_memory(site: Site) -> Iterator[Problem]:
    """The cache is an input of the network and its new state an output, as they share one piece of memory."""
    cache, new = site.input(0), site.node.output[0]
    if cache not in site.view.inputs:
        yield Problem("error", f"TensorScatter's cache {cache} is no input of the graph", "take the cache as an input")
    if site.view.nested or new not in site.view.outputs:
        yield Problem("error", f"TensorScatter's result {new} is no output of the graph", "make it an output")


def scatter_length(site: Site) -> Iterator[Problem]:
    """An update longer than the cache, in the graph or in a profile."""
    cache, update = site.shape(0), site.shape(1)
    if cache is None or update is None or len(cache) != 4 or len(update) != 4 or not isinstance(cache[2], int):
        return
    length = update[2]
    longest = {"the graph": length} if isinstance(length, int) else _longest(site, length)
    for where, tokens in longest.items():
        if tokens > cache[2]:
            yield Problem(
                "error", f"TensorScatter writes {tokens} slots in {where}, its cache has {cache[2]}", "lengthen it"
            )


def _longest(site: Site, symbol: Dim) -> dict[str, int]:
    """By profile, the largest size that it gives a symbolic axis of the graph's inputs."""
    sizes: dict[str, int] = {}
    for profile in site.request.profiles:
        for name, (_, _, largest) in profile.shapes.items():
            dims = site.view.shape(name)
            if symbol is not None and dims is not None and symbol in dims and len(dims) == len(largest):
                sizes[f"profile {profile.name}"] = largest[dims.index(symbol)]
    return sizes


def rotary(site: Site) -> Iterator[Problem]:
    """Cosines and sines of the input's type, half of the rotated size wide."""
    wanted, found, shape = site.dtype(0), site.dtype(1), site.shape(0)
    if None not in (wanted, found) and wanted != found:
        yield Problem(
            "error",
            f"RotaryEmbedding of {type_name(wanted)} with {type_name(found)} cosines",
            f"store them as {type_name(wanted)}",
        )
    cos = site.shape(1)
    if shape is None or cos is None or not cos or not isinstance(cos[-1], int):
        return
    heads = site.attributes.get("num_heads", 0)
    size = shape[-1] if len(shape) == 4 else _per_head(shape[-1], heads) if heads else None
    size = site.attributes.get("rotary_embedding_dim", 0) or size
    if isinstance(size, int) and cos[-1] * 2 != size:
        yield Problem(
            "error", f"RotaryEmbedding with {cos[-1]} cosines for {size} rotated features", f"give it {size // 2}"
        )


def dequantize_codes(site: Site) -> Iterator[Problem]:
    """Signed codes of a precision that the GPU takes, an even number of 4-bit ones."""
    dtype, shape = site.dtype(0), site.shape(0)
    producer = site.view.producers.get(site.input(0))
    activations = producer is not None and producer.op_type == "QuantizeLinear"
    if dtype in (TensorProto.UINT4, TensorProto.UINT8, TensorProto.INT32) and not activations:
        yield Problem(
            "error", f"DequantizeLinear of {type_name(dtype)}", "store signed codes (INT4, INT8), symmetric around 0"
        )
    precision = _PRECISION.get(dtype)
    if precision and precision not in site.request.weights:
        taken = ", ".join(sorted(site.request.weights))
        yield Problem("error", f"{precision} weights on a GPU that takes {taken}", "choose a --quant that it takes")
    if dtype == TensorProto.INT4 and shape and all(isinstance(d, int) for d in shape):
        count = int(np.prod([d for d in shape if isinstance(d, int)]))
        if count % 2:
            yield Problem("error", f"{count} INT4 codes, an odd number", "pad one axis to an even size")


def zero_point(site: Site) -> Iterator[Problem]:
    """A zero point that is not a constant of zeros."""
    name = site.input(2)
    if not name:
        return
    if site.view.constant_tensor(name) is None:
        yield Problem("error", f"the zero point {name} is no constant", "leave it out")
        return
    values = site.view.constant(name)
    if values is None:
        yield Problem(
            "warning", f"the zero point {name} is in the external data and was not read", "leave the zero point out"
        )
    elif np.any(values.astype(np.int32) != 0):
        yield Problem("error", f"the zero point {name} is not 0 throughout", "quantize symmetrically")


def dequantize_scale(site: Site) -> Iterator[Problem]:
    """One scale, one for every index of the axis, or one for every whole block along it."""
    codes, scales = site.shape(0), site.shape(1)
    if codes is None or scales is None or site.dtype(0) not in _CODES or scales in ((), (1,)):
        return
    axis, block = site.attributes.get("axis", 1), site.attributes.get("block_size", 0)
    axis += len(codes) if axis < 0 else 0
    size = codes[axis] if 0 <= axis < len(codes) else None
    if not isinstance(size, int):
        return
    if len(scales) == 1:
        if isinstance(scales[0], int) and scales[0] != size:
            yield Problem("error", f"{scales[0]} scales for {size} indices of axis {axis}", "give one for each")
        return
    blocks = scales[axis] if len(scales) == len(codes) else None
    if not isinstance(blocks, int):
        return
    if blocks <= 0 or size % blocks or (block and size % block):
        yield Problem("error", f"axis {axis} of {size} codes is no multiple of its blocks", "choose one that divides")
    elif block and size // block != blocks:
        yield Problem(
            "error",
            f"{blocks} scales along {size} codes make blocks of {size // blocks}, which TensorRT would use, not the "
            f"block_size {block} that the node names",
            "make block_size and scales agree",
        )
    elif site.dtype(0) == TensorProto.INT4 and size // blocks not in _USUAL_BLOCKS:
        yield Problem("warning", f"INT4 blocks of {size // blocks} build, but were not measured", "use 32, 64 or 128")


RULES = (
    Rule("attention-outputs", ("Attention",), attention_outputs),
    Rule("attention-inputs", ("Attention",), attention_inputs),
    Rule("attention-attribute", ("Attention",), attention_attributes),
    Rule("attention-mask", ("Attention",), attention_mask),
    Rule("attention-heads", ("Attention",), attention_heads),
    Rule("attention-kernel", ("Attention",), attention_kernel),
    Rule("scatter-form", ("TensorScatter",), scatter_form),
    Rule("scatter-memory", ("TensorScatter",), scatter_memory),
    Rule("scatter-length", ("TensorScatter",), scatter_length),
    Rule("rotary", ("RotaryEmbedding",), rotary),
    Rule("quantized-codes", ("DequantizeLinear",), dequantize_codes),
    Rule("zero-point", ("DequantizeLinear", "QuantizeLinear"), zero_point),
    Rule("quantized-scale", ("DequantizeLinear",), dequantize_scale),
)
