"""The lowering of an INT8 key-value cache: are its scales the chosen ones, and its codes the right roundings?

Rounding has no small errors: a key that differs in its last bit may fall on the other side of a tie and become another
code. So the cache is judged in two steps (docs/decisions/0033). Without it, everything of `verify.decoder` holds at its
usual limits. With it, PyTorch takes over each code of the graph that is a right rounding of PyTorch's own value, and
then the logits must agree at the same limit; a code that is not is a fault, and PyTorch keeps its own.

Written from the operator's documentation and docs/manifest.md, sharing no code with the emitter.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from vlmexport.errors import ArtifactError
from vlmexport.manifest import Artifact
from vlmexport.model.kv import KVGeometry
from vlmexport.runtime.decoder import SharedCache
from vlmexport.runtime.decoder_inputs import DecoderInputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import Array, Cache
from vlmexport.runtime.torch import TorchRunner
from vlmexport.verify.decoder import DECODE_STEPS, PART, Embed
from vlmexport.verify.gates import Gate

CHECKS = ("decoder/kv_codes", "decoder/kv_prefill", "decoder/kv_decode")
_LOWEST, _HIGHEST = -128, 127
_PAST = re.compile(r"past_key_values\.(\d+)\.key")
_KEY_SCALE, _VALUE_SCALE = 12, 13
_ATTRIBUTES = {"kv_cache_bit_width": 8, "k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}


@dataclass(frozen=True)
class LayerScales:
    """Scales of one layer's keys and values, float32 ``[1, heads, 1, head_dim]``."""

    key: torch.Tensor
    value: torch.Tensor


def is_quantized(artifact: Artifact) -> bool:
    """Whether the manifest says that the cache is INT8."""
    return bool(artifact.manifest.model["kv"].get("dtype") == "int8")


def read_scales(path: Path, kv: KVGeometry) -> list[LayerScales]:
    """The scales that the decoder graph at `path` quantizes its cache with, by layer.

    Raises `ArtifactError` when a layer's operator lacks them, or they are not positive numbers of the right shape.
    """
    import onnx_ir as ir

    found: dict[int, LayerScales] = {}
    model = ir.load(path)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type != "GroupQueryAttention":
            continue
        layer, scales = _layer_scales(node, kv)
        before = found.setdefault(layer, scales)
        if not (torch.equal(before.key, scales.key) and torch.equal(before.value, scales.value)):
            raise ArtifactError(f"layer {layer}: two operators write the same cache with different scales")
    if sorted(found) != list(range(kv.layers)):
        raise ArtifactError(f"quantized caches of the layers {sorted(found)}, expected all of {kv.layers}")
    return [found[layer] for layer in range(kv.layers)]


def _layer_scales(node: Any, kv: KVGeometry) -> tuple[int, LayerScales]:
    match = _PAST.fullmatch(str(node.inputs[3].name))
    if match is None:
        raise ArtifactError(f"{node.name} reads the cache {node.inputs[3].name}, which is no key of a layer")
    layer = int(match[1])
    said = {name: node.attributes[name].value for name in _ATTRIBUTES if name in node.attributes}
    if said != _ATTRIBUTES or len(node.inputs) <= _VALUE_SCALE:
        raise ArtifactError(f"layer {layer}: the operator says {said}, expected {_ATTRIBUTES} and two scales")
    return layer, LayerScales(*(_scale(node.inputs[i], layer, kv) for i in (_KEY_SCALE, _VALUE_SCALE)))


def _scale(value: Any, layer: int, kv: KVGeometry) -> torch.Tensor:
    if value is None or value.const_value is None:
        raise ArtifactError(f"layer {layer}: a scale of the cache is not in the file")
    array = np.array(value.const_value.numpy())
    shape = (1, kv.heads, 1, kv.head_dim)
    if array.dtype != np.float32 or array.shape != shape or not (np.isfinite(array) & (array > 0)).all():
        raise ArtifactError(f"layer {layer}: {value.name} must be positive float32 {list(shape)}")
    return torch.from_numpy(array)


def check_scales(gate: Gate, artifact: Artifact, kv: KVGeometry) -> list[LayerScales]:
    """``decoder/kv_scales``: the scales of every decoder graph are the manifest's, by their digest.

    Returns the decoder's; empty when they cannot be read.
    """
    found: dict[str, list[LayerScales]] = {}
    faults = []
    for part in (p for p in artifact.manifest.parts if p.startswith(PART)):  # a prompt graph writes the same cache
        try:
            found[part] = read_scales(artifact.part_path(part), kv)
        except ArtifactError as error:
            faults.append(f"{part}: {error}")
        else:
            if _digest(found[part]) != artifact.manifest.model["kv"].get("scales_digest"):
                faults.append(f"{part}: scales of the KV cache differ from the chosen ones (digest of the manifest)")
    gate.verdict("decoder/kv_scales", PART, "lowering", faults, "faults")
    return found.get(PART, [])


def _digest(scales: list[LayerScales]) -> str:
    digest = hashlib.sha256()
    for layer in scales:
        digest.update(layer.key.numpy().tobytes() + layer.value.numpy().tobytes())
    return digest.hexdigest()


class FollowingCache(DynamicCache):  # type: ignore[misc]
    """A cache that holds INT8 codes: the graph's where they are right roundings of PyTorch's values, else its own.

    `codes` is set before each call: per layer the graph's codes of the new positions, int8 ``[batch, heads, S,
    head_dim]``, keys and values. `room` is how far past a tie (in steps) a value may lie and still be rounded that way;
    `furthest` the most that any did.
    """

    def __init__(self, scales: list[LayerScales], room: float) -> None:
        super().__init__()
        self.scales, self.room = scales, room
        self.codes: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.furthest = 0.0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the rounded states; returns all keys and values so far, as `DynamicCache.update` does."""
        scales, (keys, values) = self.scales[layer_idx], self.codes[layer_idx]
        key = self._followed(key_states, scales.key, keys)
        value = self._followed(value_states, scales.value, values)
        whole: tuple[torch.Tensor, torch.Tensor] = super().update(key, value, layer_idx, *args, **kwargs)
        return whole

    def _followed(self, states: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        steps = (states.float() * (1 / scale)).clamp(_LOWEST, _HIGHEST)
        past_tie = (steps - codes).abs() - 0.5
        self.furthest = max(self.furthest, float(past_tie.max()))
        return (torch.where(past_tie <= self.room, codes, steps.round()) * scale).to(states.dtype)


class _Pair:
    """The graph and PyTorch in step: the graph runs first, PyTorch follows its codes."""

    def __init__(self, graph: OnnxRunner, reference: TorchRunner, scales: list[LayerScales], room: float) -> None:
        self.graph, self.reference = graph, reference
        self.cache = FollowingCache(scales, room)
        self.graph_cache: Cache | None = None
        self.reference_cache: Cache | None = None

    def prefill(self, prompt: DecoderInputs) -> tuple[Array, Array]:
        """Logits ``[1, tokens, vocab]`` of PyTorch and of the graph, for one prompt."""
        found, self.graph_cache = prompt.prefill(self.graph, keep=0)
        self._take_codes(0, prompt.length)
        before, self.reference.new_cache = self.reference.new_cache, lambda: self.cache
        try:
            wanted, self.reference_cache = prompt.prefill(self.reference, keep=0)
        finally:
            self.reference.new_cache = before
        return wanted, found

    def decode(self, embeds: Array) -> tuple[Array, Array]:
        """Logits ``[1, 1, vocab]`` of both for one more token ``[1, 1, hidden]``."""
        if self.graph_cache is None or self.reference_cache is None:
            raise ValueError("decode before prefill")
        start = int(self.graph_cache.lengths[0])
        found = self.graph.decode(embeds, self.graph_cache, 1)
        self._take_codes(start, start + 1)
        return self.reference.decode(embeds, self.reference_cache, 1), found

    def _take_codes(self, start: int, stop: int) -> None:
        cache = self.graph_cache
        if not isinstance(cache, SharedCache):
            raise ArtifactError("the decoder's INT8 cache is not written in place")
        layers = range(len(self.cache.scales))
        self.cache.codes = [
            (
                torch.from_numpy(cache.stored(i, "key", start, stop)),
                torch.from_numpy(cache.stored(i, "value", start, stop)),
            )
            for i in layers
        ]


def check_kv_cache(
    gate: Gate,
    graph: OnnxRunner,
    reference: TorchRunner,
    scales: list[LayerScales],
    embeds: Mapping[str, DecoderInputs],
    embed: Embed,
    limit: float,
) -> None:
    """``decoder/kv_prefill[probe]``, ``decoder/kv_decode`` and ``decoder/kv_codes`` over both.

    `graph` is the decoder in exact mode with its INT8 cache, `reference` PyTorch with the graph's own weights; both are
    fed `embeds` (by probe), then greedy tokens of the first probe by `embed`.
    `limit` is the relative error that is allowed for logits and, of a channel's largest value, for what is rounded.
    """
    room = limit * _HIGHEST
    furthest = 0.0
    for name, sequence in embeds.items():
        with gate.guard(f"decoder/kv_prefill[{name}]", PART, "lowering"):
            pair = _Pair(graph, reference, scales, room)
            gate.close(f"decoder/kv_prefill[{name}]", PART, "lowering", *pair.prefill(sequence), limit)
            furthest = max(furthest, pair.cache.furthest)
    with gate.guard("decoder/kv_decode", PART, "lowering"):
        pair = _Pair(graph, reference, scales, room)
        rows = list(_greedy_rows(pair, next(iter(embeds.values())), embed))
        wanted, found = (np.concatenate(side, axis=1) for side in zip(*rows, strict=True))
        gate.close("decoder/kv_decode", PART, "lowering", wanted, found, limit)
        furthest = max(furthest, pair.cache.furthest)
    with gate.guard("decoder/kv_codes", PART, "lowering"):
        gate.at_most("decoder/kv_codes", PART, "lowering", furthest, room, "steps past a tie")


def _greedy_rows(pair: _Pair, prompt: DecoderInputs, embed: Embed) -> Iterator[tuple[Array, Array]]:
    """Logits of both sides, ``[1, 1, vocab]``, for `DECODE_STEPS` greedy tokens of the reference."""
    wanted, _ = pair.prefill(prompt)
    token = wanted[:, -1:].argmax(-1).astype(np.int64)
    for _ in range(DECODE_STEPS):
        wanted, found = pair.decode(embed(token).embeds)
        yield wanted, found
        token = wanted.argmax(-1).astype(np.int64)
