"""Inputs that every decoder layer gets of its own for each token (per-layer embeddings), from a second token table.

What a layer gets is made in the decoder from rows ``[layers, width]`` of each token and from its embedding; only the
rows are an input. Image tokens have the row of another token.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.manifest import TensorSpec
from vlmexport.model.merge import MergeSpec
from vlmexport.model.per_token import PER_LAYER
from vlmexport.split.names import module_path
from vlmexport.split.parts import Part, Role, Signature

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.decoder import DecoderCall

# Rows that are looked up at once: all of them together may be larger than the memory.
_CHUNK = 1024
_TOKENS = ("batch_size", "sequence_length")
# What transformers' layers call what they get, and its decoders the function that makes it for all of them.
PER_LAYER_ARGUMENT, PER_LAYER_MAKER = "per_layer_input", "project_per_layer_inputs"
_TABLE = "get_per_layer_input_embeddings"


def per_layer_shape(decoder: Any) -> tuple[int, int] | None:
    """Layers, and values for each, of the rows that `decoder` takes for a token; None where it takes none."""
    text = decoder.config.get_text_config()
    width = getattr(text, "hidden_size_per_layer_input", None)
    if not width or PER_LAYER not in inspect.signature(decoder.forward).parameters:
        return None
    return int(text.num_hidden_layers), int(width)


def text_arguments(decoder: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """What `decoder` must be given beside the embeddings of any ``[batch, length]`` tokens: random rows, or nothing."""
    shape = per_layer_shape(decoder)
    if shape is None:
        return {}
    generator = torch.Generator().manual_seed(3)
    return {PER_LAYER: torch.randn(batch, length, *shape, generator=generator).to(decoder.dtype)}


def with_per_layer(merge: MergeSpec, calls: Sequence[DecoderCall]) -> MergeSpec:
    """`merge` with the rows as a further input, when the decoder is given them."""
    if not any(PER_LAYER in call.extras for call in calls):
        return merge
    return dataclasses.replace(merge, extras=(*merge.extras, PER_LAYER))


def per_layer_spec(decoder: Any) -> dict[str, TensorSpec]:
    """The further input of a decoder that takes rows, by its name; empty for others."""
    shape = per_layer_shape(decoder)
    return {} if shape is None else {PER_LAYER: TensorSpec(PER_LAYER, "float32", (*_TOKENS, *shape))}


def embedding_part(
    vlm: VLM, decoder: Any, examples: Sequence[dict[str, torch.Tensor]], calls: Sequence[DecoderCall]
) -> Part:
    """The token embedding, with the rows that `decoder` takes, too. Raises as `token_tables`."""
    table: Any = vlm.model.get_input_embeddings()
    outputs = (TensorSpec("inputs_embeds", "float32", (*_TOKENS, vlm.facts.hidden_size)),)
    signature = Signature((TensorSpec("input_ids", "int64", _TOKENS),), (*outputs, *per_layer_spec(decoder).values()))
    ids = tuple({"input_ids": example["input_ids"]} for example in examples)
    tables = token_tables(vlm, decoder, examples, calls)
    return Part(Role.EMBEDDING, tables or table, module_path(vlm.model, table) + ".", signature, ids)


class TokenTables(nn.Module):
    """The token embedding and the table of rows: ids ``[B, S]`` to ``[B, S, H]`` and ``[B, S, layers, width]``.

    The rows of the ids in `replaced` are those of `stand_in`, as are those of ids behind the table's end. `rows_path`
    is where the module `rows` is in the whole model.
    """

    def __init__(
        self,
        embedding: nn.Module,
        rows: nn.Module,
        rows_path: str,
        shape: tuple[int, int],
        replaced: tuple[int, ...],
        stand_in: int,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.rows = rows
        self.rows_path = rows_path
        self.shape = shape
        self.replaced = replaced
        self.stand_in = stand_in

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See above."""
        return self.embedding(input_ids), self.per_layer(input_ids)

    def per_layer(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The rows alone."""
        table: Any = self.rows
        other = torch.isin(input_ids, torch.tensor(self.replaced)) | (input_ids >= table.weight.shape[0])
        rows: torch.Tensor = table(torch.where(other, self.stand_in, input_ids))
        return rows.reshape(*input_ids.shape, *self.shape)


def token_tables(
    vlm: VLM, decoder: Any, examples: Sequence[dict[str, torch.Tensor]], calls: Sequence[DecoderCall]
) -> TokenTables | None:
    """The two tables of `vlm`, proven on what reached its decoder; None for a decoder without rows of its own.

    Raises `UnsupportedModelError` when the rows are not looked up by the ids of the prompt, with one other row for the
    image token.
    """
    shape = per_layer_shape(decoder)
    if shape is None:
        return None
    model: Any = vlm.model
    family, table = vlm.facts.model_type, getattr(model, _TABLE, lambda: None)()
    if table is None:
        raise UnsupportedModelError(f"{family}: its decoder takes {PER_LAYER}, but the model has no table of them")
    image = vlm.facts.image_token_id
    ids, given = examples[0]["input_ids"], calls[0].kwargs[PER_LAYER]
    stand_in = _place(table, given[ids == image][0].flatten())
    if stand_in is None:
        raise UnsupportedModelError(f"{family}: the {PER_LAYER} of its image tokens are no row of its table")
    replaced = () if stand_in == image else (image,)
    tables = TokenTables(model.get_input_embeddings(), table, module_path(model, table), shape, replaced, stand_in)
    for index, (example, call) in enumerate(zip(examples, calls, strict=True)):
        with torch.no_grad():
            rows = tables.per_layer(example["input_ids"])
        if not torch.equal(rows, call.kwargs[PER_LAYER]):
            raise UnsupportedModelError(f"{family}: the {PER_LAYER} of example {index} are not rows of its table")
    return tables


@torch.no_grad()
def _place(table: Any, row: torch.Tensor) -> int | None:
    """The first id whose looked-up values are `row`."""
    count = table.weight.shape[0]
    for start in range(0, count, _CHUNK):
        found = (table(torch.arange(start, min(start + _CHUNK, count))) == row).all(dim=1).nonzero()
        if len(found):
            return start + int(found[0])
    return None
