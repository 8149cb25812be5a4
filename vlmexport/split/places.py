"""Where image features go among the embeddings, found by looking at what reached the decoder, and proven on it.

Most families replace the image tokens' embeddings by features. Some add the features to them, and some replace the
embeddings of further tokens by rows of a table of the projector, in prompts with images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.merge import MergeSpec
from vlmexport.model.placing import place_features
from vlmexport.split.decoder import DecoderCall, DecoderPart, replay, text_decoder
from vlmexport.split.difference import refuse_difference
from vlmexport.split.features import find_feature_call
from vlmexport.split.logits import find_hidden_tokens
from vlmexport.split.parts import Part
from vlmexport.split.vision import Projector, flat_features

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

Example = dict[str, torch.Tensor]
_IDS_AT_ONCE = 8192


class FixedRowsProjector(Projector):
    """A projector whose last rows are rows of its own table: those of `MergeSpec.fixed_tokens`."""

    def __init__(self, projector: Projector, table: str, rows: tuple[int, ...], used: tuple[str, ...]) -> None:
        super().__init__(projector.wrapped, projector.call, projector._inputs, used)
        self._table, self._rows = table, rows

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Feature rows in the order of the image tokens, then the fixed rows."""
        features = super().forward(**inputs)
        return torch.cat([features, self.fixed_rows().to(features.dtype)])

    def fixed_rows(self) -> torch.Tensor:
        """The rows of the fixed tokens ``[tokens, hidden]``."""
        return self.get_parameter(self._table)[torch.tensor(self._rows)]


def fixed_rows(projector: nn.Module) -> torch.Tensor | None:
    """The rows that end what a projector gives; None for one that gives features alone."""
    return projector.fixed_rows() if isinstance(projector, FixedRowsProjector) else None


def with_embeddings(vlm: VLM, examples: Sequence[Example], calls: Sequence[DecoderCall]) -> list[DecoderCall]:
    """`calls` as they would be for embeddings, where the decoder is given ids and puts features in itself.

    Nothing is taken for granted: the decoder and the LM head must give the whole model's logits for those embeddings,
    on every example. Raises `UnsupportedModelError` naming the family when they do not.
    """
    return [
        call if call.kwargs.get("inputs_embeds") is not None else _embedded_call(vlm, example, call)
        for example, call in zip(examples, calls, strict=True)
    ]


def _embedded_call(vlm: VLM, example: Example, call: DecoderCall) -> DecoderCall:
    with torch.no_grad():
        rows = flat_features(vlm, find_feature_call(vlm.model, vlm.facts.image_token_id, example)(example))
    embeds = merged_embeddings(vlm, MergeSpec(vlm.facts.image_token_id), example, rows, None)
    beside = {name: value for name, value in call.kwargs.items() if name not in {"input_ids", *call.extras}}
    made = DecoderCall({**beside, "inputs_embeds": embeds}, call.logits)
    part = DecoderPart(text_decoder(vlm.model), vlm.model.get_output_embeddings())
    part.hidden_tokens = find_hidden_tokens([call])
    refuse_difference(vlm, "decoder and LM head, given embeddings for its ids,", replay(part, made), call.logits)
    return made


def find_places(
    vlm: VLM,
    merge: MergeSpec,
    projector: Part,
    examples: Sequence[Example],
    calls: Sequence[DecoderCall],
    features: Sequence[torch.Tensor],
) -> tuple[MergeSpec, Part]:
    """`merge` with its place, and the projector with the rows of further tokens, where there are any.

    `features` are the projector's rows of every example, as they are packed. Nothing is proven here: what is found is,
    by `merged_embeddings`, on every example. Raises `UnsupportedModelError` for rows that are in no table.
    """
    if merge.place == "cross_attention":
        return merge, projector
    place = merge.place
    strangers: set[int] = set()
    for example, call, rows in zip(examples, calls, features, strict=True):
        table, wanted = _embedded(vlm, example["input_ids"]), call.kwargs["inputs_embeds"]
        images = example["input_ids"] == merge.image_token_id
        if int(images.sum()) == len(rows) and wanted.shape == table.shape:
            new = rows[:, : table.shape[-1]].to(table.dtype)
            near = [_difference(guess, wanted[images]) for guess in (new, table[images] + new)]
            place = "add" if near[1] < near[0] else place
            other = (wanted != table).any(dim=-1) & ~images
            strangers |= set(example["input_ids"][other].tolist())
    merge = dataclasses.replace(merge, place=place)
    if not strangers:
        return merge, projector
    found = _replaced_rows(vlm, merge.image_token_id, examples[0], features[0])
    return _with_fixed_rows(vlm, merge, projector, found)


def merged_embeddings(
    vlm: VLM, merge: MergeSpec, example: Example, features: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """What the runners put together for one example, by their own code; `rows` are those of the fixed tokens.

    Raises `UnsupportedModelError` when there are more or fewer feature rows than image tokens.
    """
    embeds = _embedded(vlm, example["input_ids"])
    every = features.to(embeds.dtype) if rows is None else torch.cat([features, rows]).to(embeds.dtype)
    ids, arrays = example["input_ids"].numpy(), (t.float().numpy() for t in (embeds, every))
    try:
        placed: Any = place_features(merge, next(arrays), ids, next(arrays))
    except BadInputError as error:
        raise UnsupportedModelError(f"{vlm.facts.model_type}: {error}") from error
    return torch.from_numpy(placed).to(embeds.dtype)


@torch.no_grad()
def _embedded(vlm: VLM, ids: torch.Tensor) -> torch.Tensor:
    table: Any = vlm.model.get_input_embeddings()
    embeds: torch.Tensor = table(ids)
    return embeds


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted.float()).abs().max()) if got.numel() else 0.0


def _replaced_rows(vlm: VLM, image: int, example: Example, features: torch.Tensor) -> dict[int, torch.Tensor]:
    """Every token of the vocabulary whose embedding the model replaces in a prompt with images, and by which row."""
    table: Any = vlm.model.get_input_embeddings()
    images = torch.full((1, len(features)), image)
    of_images = {n: t for n, t in example.items() if t.shape[:2] != example["input_ids"].shape}
    found: dict[int, torch.Tensor] = {}
    for start in range(0, table.num_embeddings, _IDS_AT_ONCE):
        every = torch.arange(start, min(start + _IDS_AT_ONCE, table.num_embeddings))
        every = every[every != image]
        ids = torch.cat([images, every[None]], dim=1)
        probe = {**of_images, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        got = _reaching(vlm, probe)[0, images.shape[1] :]
        changed = (got != _embedded(vlm, every)).any(dim=-1)
        found |= {int(token): row for token, row in zip(every[changed], got[changed], strict=True)}
    return found


class _ReachedError(Exception):
    """The decoder was reached; nothing behind it has to run."""


def _reaching(vlm: VLM, inputs: Example) -> torch.Tensor:
    """The embeddings that reach the decoder; it does not run."""
    seen: list[torch.Tensor] = []

    def stop(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["inputs_embeds"])
        raise _ReachedError

    run: Callable[..., Any] = vlm.model
    handle = text_decoder(vlm.model).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_ReachedError):
            run(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def _with_fixed_rows(vlm: VLM, merge: MergeSpec, part: Part, found: dict[int, torch.Tensor]) -> tuple[MergeSpec, Part]:
    family = vlm.facts.model_type
    projector = part.module
    if not isinstance(projector, Projector) or projector.packing is not None or merge.deepstack_layers:
        raise UnsupportedModelError(
            f"{family}: tokens {sorted(found)[:8]} are replaced beside the image tokens, and features are packed or "
            "also added to early layers; the two together are not supported"
        )
    for name, table in projector.named_parameters():
        if table.ndim == 2 and (rows := _rows_of(table, list(found.values()))) is not None:
            used = tuple(dict.fromkeys((*projector.used, f"{part.prefix}{name}")))
            module = FixedRowsProjector(projector, name, rows, used)
            return dataclasses.replace(merge, fixed_tokens=tuple(found)), dataclasses.replace(part, module=module)
    raise UnsupportedModelError(
        f"{family}: the embeddings of tokens {sorted(found)[:8]} are replaced in prompts with images by rows that are "
        "in no table of the projector; only such rows are supported"
    )


def _rows_of(table: torch.Tensor, rows: Sequence[torch.Tensor]) -> tuple[int, ...] | None:
    """Where each of `rows` is in `table` ``[N, H]``; None unless all are."""
    places = []
    for row in rows:
        if row.shape != table.shape[1:]:
            return None
        same = (table == row.to(table.dtype)).all(dim=1).nonzero()
        if not len(same):
            return None
        places.append(int(same[0]))
    return tuple(places)
