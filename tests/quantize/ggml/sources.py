"""The models that llama-quantize made the reference hashes from, rebuilt anywhere without it.

Synthetic values are integers over powers of two from numpy's frozen `RandomState`, so that they are the same on every
machine. Only shapes that llama-quantize looks at are real: it reads rows, so most models have few of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlmexport import demo
from vlmexport.quantize.ggml.mix import MixFacts, MixTensor

Half = Literal["text", "mmproj"]


@dataclass(frozen=True)
class Run:
    """One call of llama-quantize."""

    quant: str
    imatrix: bool = False
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Its name in the reference file."""
        ends = "".join(f" {pattern}={kind}" for pattern, kind in self.overrides)
        return self.quant + (" imatrix" if self.imatrix else "") + ends


@dataclass(frozen=True)
class Source:
    """One GGUF file to quantize: `metadata` below the architecture's prefix, `matrix` the type of its matrices."""

    name: str
    facts: MixFacts
    shapes: dict[str, tuple[int, ...]]
    runs: tuple[Run, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    half: Half = "text"
    matrix: Literal["F16", "F32"] = "F16"
    real: bool = False

    @property
    def tensors(self) -> list[MixTensor]:
        return [MixTensor(name, shape) for name, shape in self.shapes.items()]

    def stored_type(self, name: str) -> str:
        """The type in the file: as the converter writes it."""
        keeps = len(self.shapes[name]) < 2 or "_norm." in name or "position_embd" in name or "conv.conv" in name
        return "F32" if keeps or "ffn_gate_inp" in name else self.matrix

    def original(self, name: str) -> NDArray[np.float32]:
        """The values before they were stored."""
        return _bundled()[name] if self.real else _synthetic(f"{self.name}/{name}", self.shapes[name])

    def values(self, name: str) -> NDArray[np.float32]:
        """The values in the file, as float32."""
        made = self.original(name)
        return made if self.stored_type(name) == "F32" else made.astype(np.float16).astype(np.float32)

    def importance(self, name: str) -> NDArray[np.float32] | None:
        """Mean squares ``[cols]`` or ``[experts, cols]``; none of embeddings, outputs and, if possible, one query."""
        possible = all(run.quant not in BOUND for run in self.runs)
        missing = ("token_embd.weight", "output.weight", "blk.1.attn_q.weight" if possible else "")
        if name in missing or len(self.shapes[name]) < 2:
            return None
        shape = self.shapes[name]
        dims = (shape[-1],) if len(shape) == 2 else (shape[0], shape[-1])
        random = np.random.RandomState(zlib.crc32(f"importance/{name}".encode()))
        small = random.randint(1, 257, dims).astype(np.float32) / 256
        return np.where(random.randint(0, 16, dims) == 0, small * 64, small).astype(np.float32)


@cache
def _synthetic(key: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Near a normal distribution, with a few outliers."""
    random = np.random.RandomState(zlib.crc32(key.encode()))
    made = sum(random.randint(-2048, 2049, shape) for _ in range(4)).astype(np.float32) / 2**16
    return np.where(random.randint(0, 512, shape) == 0, made * 8, made).astype(np.float32)


def _llama(layers: int, width: int, inner: int, heads: tuple[int, int], rows: int = 0) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama without embeddings; `rows` cuts every matrix to so many, and leaves norms out."""
    keys = width // heads[0] * heads[1]
    full = {
        "attn_q": (width, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, width),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        shapes |= {f"blk.{i}.{part}.weight": (rows or shape[0], shape[1]) for part, shape in full.items()}
        if not rows:
            shapes |= {f"blk.{i}.{norm}.weight": (width,) for norm in ("attn_norm", "ffn_norm")}
    return shapes


def _embeddings(vocab: int, width: int, *, tied: bool) -> dict[str, tuple[int, ...]]:
    shapes = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,)}
    return shapes if tied else {**shapes, "output.weight": (vocab, width)}


def _metadata(facts: MixFacts, width: int, inner: int, **more: Any) -> dict[str, Any]:
    base = {
        "block_count": facts.layers,
        "context_length": 512,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": facts.heads,
        "attention.head_count_kv": facts.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": 128,
    }
    experts = {"expert_count": facts.experts, "expert_used_count": 2} if facts.experts else {}
    return {**base, **experts, **more}


def _both(*quants: str) -> tuple[Run, ...]:
    return tuple(Run(quant, imatrix) for quant in quants for imatrix in (False, True))


ISSUE = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q3_K_M")
FREE = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K_S",
    "Q3_K_L",
    "Q4_K_S",
    "Q5_K_S",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_S",
    "IQ3_M",
)
BOUND = ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ1_S", "IQ1_M")


def _dense() -> Source:
    facts = MixFacts("llama", 9, 4, 2)
    shapes = {**_embeddings(128, 256, tied=False), **_llama(9, 256, 256, (4, 2))}
    return Source("dense", facts, shapes, _both(*ISSUE), _metadata(facts, 256, 256), matrix="F32")


def _narrow() -> Source:
    """576 wide and tied, as SmolLM: most rows are no multiple of 256, some not of 32."""
    facts = MixFacts("llama", 9, 9, 3)
    shapes = {**_embeddings(40, 576, tied=True), **_llama(9, 576, 1536, (9, 3), rows=16)}
    shapes["blk.3.odd.weight"] = (16, 72)
    runs = (*_both(*ISSUE, "Q2_K", "Q4_K_S", "IQ4_XS"), Run("IQ3_M"), Run("Q4_0"))
    return Source("narrow", facts, shapes, runs, _metadata(facts, 576, 1536))


def _grouped() -> Source:
    """Four query heads to a value head, 16 blocks, untied: the rules that ask for either; and every file type."""
    facts = MixFacts("llama", 16, 8, 2)
    shapes = {**_embeddings(16, 256, tied=False), **_llama(16, 256, 256, (8, 2), rows=4)}
    overrides = ((r"attn_v", "Q8_0"), (r"blk\.[0-3]\.ffn_down", "Q5_K"), (r"ffn_(up|down)", "Q4_0"))
    runs = (*_both(*ISSUE, *FREE), *(Run(q, imatrix=True) for q in BOUND), Run("Q4_K_M", overrides=overrides))
    return Source("grouped", facts, shapes, runs, _metadata(facts, 256, 256))


def _ungrouped() -> Source:
    """Two query heads to a value head, 32 blocks, tied."""
    facts = MixFacts("qwen2", 32, 4, 2)
    shapes = {**_embeddings(8, 256, tied=True), **_llama(32, 256, 256, (4, 2), rows=2)}
    runs = (*(Run(q) for q in FREE), *(Run(q, imatrix=True) for q in (*BOUND, "Q4_0", "Q5_0", "IQ4_XS")))
    return Source("ungrouped", facts, shapes, runs, _metadata(facts, 256, 256))


def _seventy() -> Source:
    facts = MixFacts("llama", 80, 8, 1)
    every = {**_embeddings(4, 256, tied=False), **_llama(80, 256, 256, (8, 1), rows=2)}
    shapes = {name: shape for name, shape in every.items() if "attn_v" in name or "blk." not in name}
    return Source("seventy", facts, shapes, tuple(map(Run, ("Q4_K_M", "Q3_K_S"))), _metadata(facts, 256, 256))


def _experts(name: str, arch: str, count: int, **more: Any) -> Source:
    """A mixture of `count` experts, some blocks dense."""
    facts = MixFacts(arch, 10, 4, 2, count)
    shapes = {**_embeddings(8, 256, tied=False), **_llama(10, 256, 256, (4, 2), rows=2)}
    for i in range(10):
        if i % 3 == 1:
            continue
        for part in ("gate", "up", "down"):
            del shapes[f"blk.{i}.ffn_{part}.weight"]
            shapes[f"blk.{i}.ffn_{part}_exps.weight"] = (count, 2, 256)
        shapes[f"blk.{i}.ffn_gate_inp.weight"] = (count, 256)
        shapes[f"blk.{i}.ffn_down_shexp.weight"] = (2, 256)
    runs = (*_both("Q4_K_M", "Q5_K_M", "Q3_K_M"), *map(Run, ("Q2_K", "IQ3_M", "IQ4_XS")), Run("IQ3_XS", imatrix=True))
    return Source(name, facts, shapes, runs, _metadata(facts, 256, 256, **more))


def _convolutions() -> Source:
    """LFM2: its first block has no attention, so llama-quantize sees no key-value heads."""
    heads = [2 if i in (2, 5, 7) else 0 for i in range(8)]
    facts = MixFacts("lfm2", 8, 8, 0)
    shapes = {**_embeddings(8, 256, tied=True), **_llama(8, 256, 256, (8, 2), rows=2)}
    for i in range(8):
        if heads[i] == 0:
            for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
                del shapes[f"blk.{i}.{part}.weight"]
            shapes[f"blk.{i}.shortconv.in_proj.weight"] = (6, 256)
            shapes[f"blk.{i}.shortconv.out_proj.weight"] = (2, 256)
            shapes[f"blk.{i}.shortconv.conv.weight"] = (256, 3)
    more = {"attention.head_count_kv": heads, "shortconv.l_cache": 3}
    runs = tuple(map(Run, ("Q4_K_M", "Q2_K", "IQ4_XS")))
    return Source("convolutions", facts, shapes, runs, {**_metadata(facts, 256, 256), **more})


def _vision() -> Source:
    """Twelve blocks of a vision encoder, whose names do not sort by number."""
    shapes: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (8, 3, 4, 4),
        "v.patch_embd.bias": (8,),
        "v.position_embd.weight": (4, 256),
        "v.post_ln.weight": (256,),
        "mm.model.fc.weight": (8, 768),
        "mm.1.weight": (8, 192),
    }
    for i in range(12):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down"):
            shapes[f"v.blk.{i}.{part}.weight"] = (2, 256)
        shapes[f"v.blk.{i}.ln1.weight"] = (256,)
    return Source("vision", MixFacts("clip", 0, 0, 0), shapes, _vision_runs(), half="mmproj")


def _vision_runs() -> tuple[Run, ...]:
    return tuple(map(Run, ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_0")))


def _bundled_text() -> Source:
    facts = MixFacts("llama", 4, 4, 2)
    shapes = {name: value.shape for name, value in _bundled().items() if not name.startswith(("v.", "mm."))}
    return Source("bundled", facts, shapes, _both(*ISSUE), _metadata(facts, 256, 512), real=True)


def _bundled_vision() -> Source:
    shapes = {name: value.shape for name, value in _bundled().items() if name.startswith(("v.", "mm."))}
    facts = MixFacts("clip", 0, 0, 0)
    return Source("bundled-vision", facts, shapes, _vision_runs(), half="mmproj", real=True)


_MODULES = {
    "lm_head": "output",
    "model.text_model.embed_tokens": "token_embd",
    "model.text_model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.out_proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "model.connector.modality_projection.proj": "mm.model.fc",
    "model.vision_model.embeddings.patch_embedding": "v.patch_embd",
    "model.vision_model.embeddings.position_embedding": "v.position_embd",
    "model.vision_model.post_layernorm": "v.post_ln",
}
_cache: dict[str, NDArray[np.float32]] = {}


def _bundled() -> dict[str, NDArray[np.float32]]:
    """The bundled model's weights in float32 under their GGUF names, query and key rows permuted."""
    if not _cache:
        from safetensors import safe_open

        with safe_open(str(demo.model_dir() / "model.safetensors"), "pt") as file:
            for name in sorted(file.keys()):
                value = file.get_tensor(name).float().numpy()
                _cache[_gguf_name(name)] = _permuted(name, value)
    return _cache


def _gguf_name(name: str) -> str:
    stem, _, leaf = name.rpartition(".")
    if ".layers." not in stem:
        return f"{_MODULES[stem]}.{leaf}"
    number, _, part = stem.split(".layers.")[1].partition(".")
    return f"{'blk' if 'text_model' in stem else 'v.blk'}.{number}.{_MODULES[part]}.{leaf}"


def _permuted(name: str, value: NDArray[np.float32]) -> NDArray[np.float32]:
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if "text_model" not in name or heads is None:
        return value
    rows, columns = value.shape
    return value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def all_sources() -> Iterator[Source]:
    """Every source of the reference file."""
    yield from (_dense(), _narrow(), _grouped(), _ungrouped(), _seventy(), _convolutions())
    yield _experts("eight-experts", "llama", 8)
    yield _experts(
        "sixteen-experts",
        "qwen3vlmoe",
        16,
        **{"expert_feed_forward_length": 256, "rope.dimension_sections": [1, 1, 1, 0]},
    )
    yield from (_vision(), _bundled_text(), _bundled_vision())
