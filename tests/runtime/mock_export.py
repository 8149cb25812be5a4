"""A hand-built export of a tiny Idefics3: it follows docs/manifest.md but owes nothing to the exporter.

The decoder is the checkpoint's own (GroupQueryAttention), so it can be compared with PyTorch. The vision side is a
stand-in of one matrix product: 12 pixel values make one image token.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vlmexport.manifest import Artifact, Manifest, PartFile, TensorSpec, write_manifest
from vlmexport.model.load import load_vlm
from vlmexport.model.merge import MergeSpec

F32, I64 = TensorProto.FLOAT, TensorProto.INT64
VISION_WIDTH = 48
_TYPES = {F32: "float32", I64: "int64"}


class Graph:
    """Collects nodes and initializers; every method returns the name of what it made."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, outputs: Any = 1, domain: str = "", **attributes: Any) -> Any:
        count = outputs if isinstance(outputs, int) else len(outputs)
        names = [f"n{len(self.nodes)}_{i}" for i in range(count)] if isinstance(outputs, int) else list(outputs)
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if count == 1 else names

    def save(self, path: Path, inputs: list[Any], outputs: list[Any]) -> PartFile:
        graph = helper.make_graph(
            self.nodes,
            path.stem,
            [helper.make_tensor_value_info(*i) for i in inputs],
            [helper.make_tensor_value_info(*o) for o in outputs],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        specs = [tuple(TensorSpec(n, _TYPES[t], tuple(d)) for n, t, d in side) for side in (inputs, outputs)]
        return PartFile(path.name, specs[0], specs[1])


def mock_export(checkpoint: Path, out: Path) -> Artifact:
    """Write the export of `checkpoint` (a tiny Idefics3) into `out`."""
    vlm = load_vlm(str(checkpoint))
    facts = vlm.facts
    out.mkdir(parents=True)
    for file in checkpoint.iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, out)
    parts = {
        "vision_encoder": vision(out / "vision_encoder.onnx"),
        "projector": projector(out / "projector.onnx", facts.hidden_size),
        "embed_tokens": embedding(out / "embed_tokens.onnx", vlm.model.get_input_embeddings().weight),
        "decoder": decoder(out / "decoder.onnx", vlm),
    }
    kv = {"layers": facts.kv.layers, "heads": facts.kv.heads, "head_dim": facts.kv.head_dim, "dtype": "float32"}
    model = {
        "architecture": facts.architecture,
        "model_type": facts.model_type,
        "hidden_size": facts.hidden_size,
        "vocab_size": facts.vocab_size,
        "kv": kv,
        "merge": MergeSpec(facts.image_token_id).to_dict(),
        "attention": "gqa",
        "padding": "right",
        "eos_token_ids": list(facts.eos_token_ids),
    }
    source = {"model": str(checkpoint), "architecture": facts.architecture}
    return write_manifest(out, Manifest("split", "cpu", {}, source, model, {}, parts, (), ()))


def vision(path: Path) -> PartFile:
    g = Graph()
    g.op("Reshape", "pixel_values", g.const([-1, VISION_WIDTH], np.int64), outputs=["vision_features"])
    pixels = ("pixel_values", F32, ["batch", "images", 3, "height", "width"])
    return g.save(path, [pixels], [("vision_features", F32, ["rows", VISION_WIDTH])])


def projector(path: Path, hidden: int) -> PartFile:
    """Averages so many rows that a 32x32 tile gives its 4 image tokens."""
    g = Graph()
    weight = np.random.default_rng(0).normal(size=(VISION_WIDTH, hidden)) / VISION_WIDTH**0.5
    grouped = g.op("Reshape", "vision_features", g.const([-1, 16, VISION_WIDTH], np.int64))
    mean = g.op("ReduceMean", grouped, g.const([1], np.int64), keepdims=0)
    g.op("MatMul", mean, g.const(weight), outputs=["image_features"])
    features = ("vision_features", F32, ["rows", VISION_WIDTH])
    return g.save(path, [features], [("image_features", F32, ["image_tokens", hidden])])


def embedding(path: Path, table: Any) -> PartFile:
    g = Graph()
    g.op("Gather", g.const(table.detach().numpy()), "input_ids", outputs=["inputs_embeds"])
    dims = ["batch_size", "sequence_length"]
    return g.save(path, [("input_ids", I64, dims)], [("inputs_embeds", F32, [*dims, table.shape[1]])])


def decoder(path: Path, vlm: Any) -> PartFile:
    g, facts = Graph(), vlm.facts
    text = vlm.model.get_decoder()
    caches = rotary_caches(text)
    hidden: str = "inputs_embeds"
    total, lengths = g.op("Cast", total_length(g), to=TensorProto.INT32), sequence_lengths(g)
    for index, layer in enumerate(text.layers):
        hidden = attention(g, hidden, index, layer, text.config, (lengths, total, *map(g.const, caches)))
        normed = norm(g, hidden, layer.post_attention_layernorm)
        gate, up = linear(g, normed, layer.mlp.gate_proj), linear(g, normed, layer.mlp.up_proj)
        gated = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        hidden = g.op("Add", hidden, linear(g, gated, layer.mlp.down_proj))
    kept = kept_positions(g, norm(g, hidden, text.norm))
    weight = vlm.model.get_output_embeddings().weight.detach().numpy().T
    g.op("MatMul", kept, g.const(weight), outputs=["logits"])
    kv = [facts.kv.heads, "past_sequence_length", facts.kv.head_dim]
    names = [f"{i}.{k}" for i in range(facts.kv.layers) for k in ("key", "value")]
    past = [(f"past_key_values.{n}", F32, ["batch_size", *kv]) for n in names]
    present = [(f"present.{n}", F32, ["batch_size", kv[0], "total_sequence_length", kv[2]]) for n in names]
    inputs = [
        ("inputs_embeds", F32, ["batch_size", "sequence_length", facts.hidden_size]),
        ("attention_mask", I64, ["batch_size", "total_sequence_length"]),
        ("num_logits_to_keep", I64, []),
        *past,
    ]
    return g.save(path, inputs, [("logits", F32, ["batch_size", "kept_length", facts.vocab_size]), *present])


def total_length(g: Graph) -> str:
    shape = g.op("Shape", "attention_mask", start=1)
    return g.op("Squeeze", shape, g.const([0], np.int64))


def sequence_lengths(g: Graph) -> str:
    valid = g.op("ReduceSum", "attention_mask", g.const([1], np.int64), keepdims=0)
    return g.op("Cast", g.op("Sub", valid, g.const(1, np.int64)), to=TensorProto.INT32)


def rotary_caches(text: Any) -> tuple[np.ndarray, np.ndarray]:
    angles = np.outer(np.arange(2048), text.rotary_emb.inv_freq.numpy())
    return np.cos(angles), np.sin(angles)


def attention(g: Graph, hidden: str, index: int, layer: Any, config: Any, shared: tuple[str, ...]) -> str:
    normed = norm(g, hidden, layer.input_layernorm)
    q, k, v = (linear(g, normed, getattr(layer.self_attn, f"{n}_proj")) for n in "qkv")
    past = [f"past_key_values.{index}.{kind}" for kind in ("key", "value")]
    present = [f"present.{index}.{kind}" for kind in ("key", "value")]
    out = f"attention_{index}"
    g.op(
        "GroupQueryAttention", q, k, v, *past, *shared,
        outputs=[out, *present], domain="com.microsoft", do_rotary=1,
        num_heads=config.num_attention_heads, kv_num_heads=config.num_key_value_heads,
    )  # fmt: skip
    return g.op("Add", hidden, linear(g, out, layer.self_attn.o_proj))


def norm(g: Graph, hidden: str, module: Any) -> str:
    weight = g.const(module.weight.detach().numpy())
    return g.op("SimplifiedLayerNormalization", hidden, weight, epsilon=module.variance_epsilon, axis=-1)


def linear(g: Graph, hidden: str, module: Any) -> str:
    return g.op("MatMul", hidden, g.const(module.weight.detach().numpy().T))


def kept_positions(g: Graph, hidden: str) -> str:
    """The last n valid positions of each row, or all of them for n = 0."""
    one = g.const([0], np.int64)
    length = g.op("Squeeze", g.op("Shape", hidden, start=1, end=2), one)
    valid = g.op("ReduceSum", "attention_mask", g.const([1], np.int64), keepdims=0)
    everything = g.op("Equal", "num_logits_to_keep", g.const(0, np.int64))
    count = g.op("Where", everything, length, g.op("Min", "num_logits_to_keep", length))
    end = g.op("Where", everything, length, g.op("Min", valid, length))
    steps = g.op("Range", g.op("Neg", count), g.const(0, np.int64), g.const(1, np.int64))
    places = g.op("Add", g.op("Unsqueeze", end, g.const([-1], np.int64)), g.op("Unsqueeze", steps, one))
    places = g.op("Max", places, g.const(0, np.int64))
    batch = g.op("Shape", hidden, end=1)
    places = g.op("Expand", places, g.op("Concat", batch, g.const([1], np.int64), axis=0))
    return g.op("GatherND", hidden, g.op("Unsqueeze", places, g.const([-1], np.int64)), batch_dims=1)
