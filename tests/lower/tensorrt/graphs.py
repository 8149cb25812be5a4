"""Small decoders in the ``tensorrt`` dialect (docs/manifest.md), written node by node, with random weights.

They stand in for exports: ONNX Runtime runs them and TensorRT for RTX builds them. The benchmark of builds makes large
ones of the same form.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vlmexport.manifest import PartFile, TensorSpec

Weights = Literal["fp16", "int4"]


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a decoder; `cache` is the static length of its KV cache, `group` the INT4 block along K."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 128
    vocab: int = 128
    cache: int = 48
    group: int = 32


TINY = DecoderShape()


def decoder_graph(
    shape: DecoderShape = TINY, weights: Weights = "int4", *, window: int = 0, seed: int = 0
) -> onnx.ModelProto:
    """A decoder with static cache, FP32 norms, rotary positions by slot and `weights` as stored matrices.

    `window`: how many slots back a query sees; 0 for all.
    """
    return _Decoder(shape, weights, window, seed).model()


def write_decoder(
    folder: Path, shape: DecoderShape = TINY, weights: Weights = "int4", *, external: bool = True, **kwargs: Any
) -> Path:
    """``decoder.onnx`` in `folder`, with its large tensors in ``decoder.onnx.data`` if `external`; the graph's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "decoder.onnx"
    (folder / "decoder.onnx.data").unlink(missing_ok=True)  # onnx.save would append to it
    model = decoder_graph(shape, weights, **kwargs)
    onnx.save(model, path, save_as_external_data=external, location="decoder.onnx.data", size_threshold=256)
    return path


def part_of(path: Path) -> PartFile:
    """The manifest's entry of the graph at `path`."""
    graph = onnx.load(path, load_external_data=False).graph
    return PartFile(path.name, tuple(map(_tensor_spec, graph.input)), tuple(map(_tensor_spec, graph.output)))


def _tensor_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dims = tuple(d.dim_param or d.dim_value for d in tensor.shape.dim)
    return TensorSpec(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name, dims)


class _Decoder:
    def __init__(self, shape: DecoderShape, weights: Weights, window: int, seed: int) -> None:
        self.shape, self.weights, self.window = shape, weights, window
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        shape = self.shape
        queries, visible = self._prologue()
        hidden, presents = "inputs_embeds", []
        for layer in range(shape.layers):
            hidden, new = self._layer(layer, hidden, queries, visible)
            presents += new
        hidden = self._norm(hidden, "model.norm")
        index = self._op("Unsqueeze", ["logits_positions", self._ints("last_axis", [-1])])
        kept = self._op("GatherND", [hidden, index], batch_dims=1)
        self._op("Cast", [self._linear(kept, shape.hidden, shape.vocab, "lm_head")], "logits", to=TensorProto.FLOAT)
        cache_dims = ["batch_size", shape.kv_heads, shape.cache, shape.head_dim]
        pasts = [name.replace("present", "past_key_values") for name in presents]
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [
                _value("inputs_embeds", TensorProto.FLOAT16, ["batch_size", "sequence_length", shape.hidden]),
                _value("write_indices", TensorProto.INT64, ["batch_size"]),
                _value("logits_positions", TensorProto.INT64, ["batch_size", "kept_length"]),
                *(_value(name, TensorProto.FLOAT16, cache_dims) for name in pasts),
            ],
            [
                _value("logits", TensorProto.FLOAT, ["batch_size", "kept_length", shape.vocab]),
                *(_value(name, TensorProto.FLOAT16, cache_dims) for name in presents),
            ],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)

    def _prologue(self) -> tuple[str, str]:
        """The slots of the queries int64 [B, S], and which slots each may see, bool [B, 1, S, cache]."""
        length = self._op("Squeeze", [self._op("Shape", ["inputs_embeds"], start=1, end=2)])
        steps = self._op("Range", [self._ints("zero", 0), length, self._ints("one", 1)])
        first = self._op("Unsqueeze", ["write_indices", self._ints("axis_1", [1])])
        queries = self._op("Add", [first, steps])
        rows = self._op("Unsqueeze", [queries, self._ints("axes_1_3", [1, 3])])
        slots = self._ints("slots", np.arange(self.shape.cache))
        visible = self._op("LessOrEqual", [slots, rows])
        if self.window:
            oldest = self._op("Sub", [rows, self._ints("window", self.window)])
            visible = self._op("And", [visible, self._op("Greater", [slots, oldest])])
        angles = np.outer(np.arange(self.shape.cache), 10000.0 ** -np.linspace(0, 1, self.shape.head_dim // 2))
        self._constant("cos_cache", np.cos(angles).astype(np.float16))
        self._constant("sin_cache", np.sin(angles).astype(np.float16))
        return queries, visible

    def _layer(self, layer: int, hidden: str, queries: str, visible: str) -> tuple[str, list[str]]:
        shape, prefix = self.shape, f"model.layers.{layer}"
        normed = self._norm(hidden, f"{prefix}.input_layernorm")
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        query, key, value = (
            self._heads(self._linear(normed, shape.hidden, n, f"{prefix}.self_attn.{which}_proj"), n)
            for which, n in (("q", wide), ("k", narrow), ("v", narrow))
        )
        query, key = (self._op("RotaryEmbedding", [x, "cos_cache", "sin_cache", queries]) for x in (query, key))
        cache = []
        for which, new in (("key", key), ("value", value)):
            old, name = f"past_key_values.{layer}.{which}", f"present.{layer}.{which}"
            cache.append(self._op("TensorScatter", [old, new, "write_indices"], name, axis=-2, mode="linear"))
        attended = self._op("Attention", [query, *cache, visible], scale=shape.head_dim**-0.5)
        rows = self._op("Transpose", [attended], perm=[0, 2, 1, 3])
        rows = self._op("Reshape", [rows, self._ints(f"{prefix}.rows", [0, 0, wide])])
        hidden = self._op("Add", [hidden, self._linear(rows, wide, shape.hidden, f"{prefix}.self_attn.o_proj")])
        normed = self._norm(hidden, f"{prefix}.post_attention_layernorm")
        gate, up = (
            self._linear(normed, shape.hidden, shape.intermediate, f"{prefix}.mlp.{which}_proj")
            for which in ("gate", "up")
        )
        product = self._op("Mul", [self._op("Mul", [gate, self._op("Sigmoid", [gate])]), up])
        down = self._linear(product, shape.intermediate, shape.hidden, f"{prefix}.mlp.down_proj")
        return self._op("Add", [hidden, down]), cache

    def _heads(self, rows: str, width: int) -> str:
        """[B, S, heads * D] -> [B, heads, S, D]."""
        count = width // self.shape.head_dim
        split = self._ints(f"split.{rows}", [0, 0, count, self.shape.head_dim])
        return self._op("Transpose", [self._op("Reshape", [rows, split])], perm=[0, 2, 1, 3])

    def _norm(self, hidden: str, name: str) -> str:
        scale = self._constant(f"{name}.weight", np.ones(self.shape.hidden, np.float32))
        wide = self._op("Cast", [hidden], to=TensorProto.FLOAT)
        normed = self._op("RMSNormalization", [wide, scale], axis=-1, epsilon=1e-5)
        return self._op("Cast", [normed], to=TensorProto.FLOAT16)

    def _linear(self, hidden: str, k: int, n: int, name: str) -> str:
        weight = f"{name}.weight"
        if self.weights == "fp16":
            self._constant(weight, (self.rng.standard_normal((k, n), np.float32) * k**-0.5).astype(np.float16))
            return self._op("MatMul", [hidden, weight])
        codes = self.rng.bytes(k * n // 2)
        self.initializers.append(helper.make_tensor(f"{weight}.codes", TensorProto.INT4, [k, n], codes, raw=True))
        scales = self.rng.uniform(0.5, 1.5, (k // self.shape.group, n)) * k**-0.5 / 4.6
        self._constant(f"{weight}.scale", scales.astype(np.float16))
        attributes = {"axis": 0, "block_size": self.shape.group}
        return self._op(
            "MatMul", [hidden, self._op("DequantizeLinear", [f"{weight}.codes", f"{weight}.scale"], **attributes)]
        )

    def _op(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def _constant(self, name: str, values: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(values, name))
        return name

    def _ints(self, name: str, values: Any) -> str:
        return self._constant(name, np.asarray(values, np.int64))


def _value(name: str, dtype: int, dims: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, dims)
