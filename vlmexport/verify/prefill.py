"""The prompt graph of ``--prefill int8``, judged on its own codes.

Its activation rounding is chaotic at the last digit: a sum in another order moves one value in ten thousand to the next
code, so no reference that computes its own activations agrees to 1e-5. So the two halves are judged apart. The graph
without the rounding (`with_float_products`) against PyTorch with the dequantized INT8 weights, like every decoder; and
each product of the shipped graph, rounding included, against integer arithmetic on the very input it had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from torch import nn

from vlmexport.errors import ArtifactError
from vlmexport.manifest import PREFILL_PART, Artifact, QuantizedRecord
from vlmexport.model.kv import KVGeometry
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.runtime.decoder_inputs import DecoderInputs
from vlmexport.runtime.protocol import DEFAULT_RESERVE, Array, Cache, Extras
from vlmexport.runtime.sessions import SessionSettings, open_session
from vlmexport.runtime.torch import TorchRunner
from vlmexport.verify.codes import CodeFault, GraphWeights, read_codes
from vlmexport.verify.gates import Gate
from vlmexport.verify.reference import Reference

PRODUCTS = f"{PREFILL_PART}/products"
_LEVELS, _TINY = np.float32(127), np.float32(1e-30)


def has_prompt_graph(artifact: Artifact) -> bool:
    """Does the export compute prompts in a graph of their own?"""
    return PREFILL_PART in artifact.manifest.parts


def prompt_codes(artifact: Artifact) -> tuple[dict[str, QuantizedTensor], list[CodeFault]]:
    """The prompt graph's own weights by checkpoint name, and their faults; nothing where there is no such graph."""
    return read_codes(artifact, PREFILL_PART) if has_prompt_graph(artifact) else ({}, [])


class PromptReference(TorchRunner):
    """The reference with other weights for prompts: calls of more than one token run `codes`, dequantized.

    It shares the model with ``reference.runner``; what `codes` does not name stays as it is there.
    """

    def __init__(self, reference: Reference, codes: Mapping[str, QuantizedTensor]) -> None:
        super().__init__(reference.vlm, reference.runner.split)
        self._weights = {name: nn.Parameter(tensor.dequantize(), False) for name, tensor in codes.items()}

    def prefill(
        self,
        inputs_embeds: Array,
        attention_mask: NDArray[np.int64],
        keep: int = 1,
        *,
        reserve: int = DEFAULT_RESERVE,
        extras: Extras | None = None,
    ) -> tuple[Array, Cache]:
        """See `TorchRunner.prefill`."""
        with self._branch(inputs_embeds):
            return super().prefill(inputs_embeds, attention_mask, keep, reserve=reserve, extras=extras)

    def decode(self, inputs_embeds: Array, cache: Cache, keep: int = 1, *, extras: Extras | None = None) -> Array:
        """See `TorchRunner.decode`."""
        with self._branch(inputs_embeds):
            return super().decode(inputs_embeds, cache, keep, extras=extras)

    def _branch(self, inputs_embeds: Array) -> AbstractContextManager[None]:
        weights: dict[str, torch.Tensor] = dict(self._weights)
        return self.substituted(weights) if inputs_embeds.shape[1] > 1 else nullcontext()


@dataclass(frozen=True)
class _Product:
    """Names of one INT8 product's input ``[..., K]`` and result ``[..., N]`` in the graph."""

    record: QuantizedRecord
    given: str
    result: str


def check_products(
    gate: Gate, artifact: Artifact, settings: SessionSettings, kv: KVGeometry, prompt: DecoderInputs, limit: float
) -> None:
    """``decoder_prefill/products``: every INT8 product of the shipped graph on one prompt.

    A product's error is its largest absolute difference over its largest absolute value.
    """
    with gate.guard(PRODUCTS, PREFILL_PART, "lowering"):
        products = list(_products(artifact))
        names = tuple(sorted({name for p in products for name in (p.given, p.result)}))
        session = open_session(
            artifact.part_path(PREFILL_PART), PREFILL_PART, SessionSettings(settings.threads, watch=names)
        )
        values = dict(zip(names, session.run(list(names), _feed(prompt, kv, session)), strict=True))
        weights = GraphWeights(artifact.part_path(PREFILL_PART))
        faults = []
        for product in products:
            wanted = _expected(values[product.given], weights.read(product.record))
            error = _relative(wanted, values[product.result])
            if not error <= limit:
                faults.append(f"{product.record.initializer}: off by {error:.1e} of its largest value")
        if not products:
            faults.append("the prompt graph has no INT8 product")
        gate.verdict(PRODUCTS, PREFILL_PART, "lowering", faults, "products that differ")


def _products(artifact: Artifact) -> Iterator[_Product]:
    import onnx

    graph = onnx.load(artifact.part_path(PREFILL_PART), load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    by_codes = {n.input[1]: n for n in graph.node if n.op_type == "MatMulIntegerToFloat"}
    for record in artifact.manifest.quantized:
        node = by_codes.get(f"{record.initializer}.codes")
        if record.part == PREFILL_PART and node is not None:
            yield _Product(record, _source(makers, node), _scaled(graph, node))


def _source(makers: Mapping[str, Any], node: Any) -> str:
    """The activation before it was divided by its row's step and rounded."""
    rounding = makers.get(node.input[0])
    unit = makers.get(rounding.input[0]) if rounding is not None else None
    if rounding is None or unit is None or (rounding.op_type, unit.op_type) != ("QuantizeLinear", "Mul"):
        raise ArtifactError(f"{node.input[1]}: the product's input is not a row times a factor, rounded")
    return str(unit.input[0])


def _scaled(graph: Any, node: Any) -> str:
    """The product after its rows were multiplied by their steps."""
    readers = [n for n in graph.node if node.output[0] in n.input]
    if [n.op_type for n in readers] != ["Mul"]:
        raise ArtifactError(f"{node.input[1]}: the product's rows are not multiplied by their steps")
    return str(readers[0].output[0])


def _feed(prompt: DecoderInputs, kv: KVGeometry, session: InferenceSession) -> dict[str, Array]:
    pasts = {name: np.zeros((1, kept.heads, 0, kept.head_dim), np.float32) for name, kept in kv.pasts().items()}
    given = {
        **prompt.mapped(lambda array: array.astype(np.float32)).extras,
        "inputs_embeds": prompt.embeds.astype(np.float32),
        "attention_mask": np.ones((1, prompt.length), np.int64),
        "num_logits_to_keep": np.array(1, np.int64),
        **pasts,
    }
    return {i.name: given[i.name] for i in session.get_inputs()}


def _expected(x: Array, weight: QuantizedTensor) -> Array:
    """The product by docs/manifest.md: whole numbers (exact in float64), then the two scales."""
    peak = np.maximum(np.abs(x).max(axis=-1, keepdims=True), _TINY)
    codes = np.rint(x * (_LEVELS / peak)).astype(np.float64)
    whole = weight.codes.numpy().astype(np.float64) - 128
    product: Array = codes @ whole.T * weight.scale.numpy().reshape(-1) * (peak / _LEVELS)
    return product


def _relative(wanted: Array, found: Array) -> float:
    largest = float(np.abs(wanted).max())
    return float(np.abs(wanted - found).max()) / largest if largest else float(np.abs(found).max())
