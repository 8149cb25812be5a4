"""The masks that a decoder's layers get, found by looking: causal, or with blocks of tokens that see each other.

transformers builds the masks before the decoder where they are not plainly causal, one for each kind of layer. They are
rebuilt here from the prompt's ids and must be equal to the model's own, for every example.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.blocks import MaskKind, block_ids
from vlmexport.split.attention import attention_implementation
from vlmexport.split.chunks import find_chunks, seen_in_chunk
from vlmexport.split.decoder import DecoderCall, replay
from vlmexport.split.own_attention import require_interface

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.decoder import DecoderPart

_KINDS: tuple[MaskKind, ...] = ("causal", "image_blocks", "prefix", "image_tokens")
_PADDING_AXES = 2  # a mask ``[B, T]`` of the tokens that are not padding: the decoder makes its masks of it
# Shorter than any block of image tokens, so that it tells whether a window hides what is in a block.
_PROBE_WINDOW = 2


@dataclass(frozen=True)
class BlockMasks:
    """Masks of a decoder in which tokens of one block see each other.

    `windows`: the window of each mask by its name (None: no window); the name is "" where the decoder takes one tensor.
    `cut`: a window also hides tokens of the query's own block that lie before it. `whole`: masks without a window hold
    the blocks as well; else they are causal.
    """

    windows: tuple[tuple[str, int | None], ...]
    cut: bool
    whole: bool = True

    def build(
        self, blocks: torch.Tensor, valid: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the decoder takes as ``attention_mask``: additive masks ``[B, 1, S, T]`` of `dtype`.

        `blocks`: int64 ``[B, S]`` of the new tokens; `valid`: ``[B, T]``, 1 for each token so far that is not padding.
        """
        made = {}
        for name, window in self.windows:
            seen = self.seen(blocks, valid, window)
            made[name] = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return made.get("", made)

    def seen(self, blocks: torch.Tensor, valid: torch.Tensor, window: int | None) -> torch.Tensor:
        """`visible` for the mask of a window."""
        held = blocks if self.whole or window is not None else torch.zeros_like(blocks)
        return visible(held, valid, window, cut=self.cut)


@dataclass(frozen=True)
class SeenMasks:
    """What the layers see: `kind` says how the blocks follow from a prompt's ids; `blocks` is None for causal masks.

    `ids` are the blocks of each example, int64 ``[1, tokens]``; `tokens` the ids of the tokens that make the one block
    of ``image_tokens``. `chunks`: see `find_chunks`.
    """

    kind: MaskKind
    blocks: BlockMasks | None
    ids: tuple[torch.Tensor, ...] = ()
    tokens: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()


def visible(blocks: torch.Tensor, valid: torch.Tensor, window: int | None, *, cut: bool) -> torch.Tensor:
    """Bool ``[B, 1, S, T]``: does new token i see token j? See `BlockMasks.build`.

    A window counts valid tokens, wherever padding lies between them.
    """
    total, length = valid.shape[1], blocks.shape[1]
    ranks = valid.long().cumsum(dim=1)
    queries, keys = ranks[:, total - length :, None], ranks[:, None, :]
    whole = nn.functional.pad(blocks, (total - length, 0))
    same = (blocks[:, :, None] == whole[:, None, :]) & (blocks > 0)[:, :, None]
    causal = keys <= queries
    near = torch.ones_like(causal) if window is None else keys > queries - window
    seen = (causal | same) & near if cut else (causal & near) | same
    return (seen & valid.bool()[:, None, :])[:, None]


@dataclass(frozen=True)
class _Seen:
    """What reached a layer's attention: its mask, the window that it was called with, and what no mask would mean.

    `opens`: without a mask every token would see every other; else it would be the causal mask.
    """

    mask: torch.Tensor | None
    window: int | None
    opens: bool


class _ReachedError(Exception):
    """The decoder was reached; nothing behind it has to run."""


def find_masks(
    vlm: VLM, part: DecoderPart, examples: Sequence[dict[str, torch.Tensor]], calls: Sequence[DecoderCall]
) -> SeenMasks:
    """What the layers of `part` see in `calls`, which are the decoder's in the whole model on `examples`.

    Raises `UnsupportedModelError` naming the family and the first layer or mask that is neither causal nor follows from
    the prompt's blocks.
    """
    family = vlm.facts.model_type
    given = [_given(call) for call in calls]
    named = _filled(given[0], calls[0], ())
    looked = _look(part, dataclasses.replace(calls[0], kwargs=calls[0].kwargs | _argument(named)))
    require_interface(vlm, part, looked)
    # Prompts of examples may be shorter than a chunk, so their masks do not show it.
    chunks = find_chunks(family, part, lambda *given: {layer: seen.mask for layer, seen in _look(*given).items()})
    if not named:
        _require_causal(family, part, looked, chunks)
        return SeenMasks("causal", None, chunks=chunks)
    if chunks:
        raise UnsupportedModelError(
            f"{family}: layers of its decoder see chunks of {max(chunks)} tokens by masks that the model makes before "
            "the decoder, which is not supported yet"
        )
    layers = _layers_by_mask(family, looked, named)
    opens = tuple(name for name, seen in layers.items() if seen.opens)
    windows = tuple((name, seen.window) for name, seen in layers.items())
    reached = [_filled(masks, call, opens) for masks, call in zip(given, calls, strict=True)]
    wrong, together = "", _together(examples, reached)
    unlimited = [mask for masks in reached for name, mask in masks.items() if dict(windows).get(name) is None]
    whole = not all(_is_causal(mask, None) for mask in unlimited) or not unlimited
    for kind in _KINDS:
        tokens = together if kind == "image_tokens" else ()
        blocks = [_blocks(vlm, kind, example, tokens) for example in examples]
        masks = BlockMasks(windows, cut=True, whole=whole)
        if kind != "causal" and any(window is not None for _, window in windows):
            masks = dataclasses.replace(masks, cut=_cuts(vlm, part, examples[0], blocks[0], masks))
        wrong = next((w for b, n in zip(blocks, reached, strict=True) if (w := _wrong(masks, b, n))), "")
        if not wrong:
            return SeenMasks(kind, None if kind == "causal" else masks, tuple(blocks), tokens)
    raise _refusal(family, wrong)


def _given(call: DecoderCall) -> dict[str, torch.Tensor | None]:
    """The masks that the decoder is given ready-made, by name; empty where it makes them itself."""
    given = call.kwargs.get("attention_mask")
    if isinstance(given, dict):
        return given
    return {} if given is None or given.ndim == _PADDING_AXES else {"": given}


def _filled(given: dict[str, torch.Tensor | None], call: DecoderCall, opens: Sequence[str]) -> dict[str, torch.Tensor]:
    """`given` with a tensor for every None, which hides nothing for the names in `opens` and is causal for others."""
    length = call.kwargs["inputs_embeds"].shape[1]
    everything = torch.ones(1, 1, length, length, dtype=torch.bool)
    return {
        name: mask if mask is not None else everything.clone() if name in opens else everything.tril()
        for name, mask in given.items()
    }


def _argument(named: dict[str, torch.Tensor]) -> dict[str, Any]:
    """`named` as the decoder's keyword argument."""
    return {} if not named else {"attention_mask": named.get("", named)}


def _look(part: DecoderPart, call: DecoderCall) -> dict[int, _Seen]:
    """What reaches the attention of each layer when the decoder is called as in `call`."""
    found: dict[int, _Seen] = {}

    def look(module: Any, query: Any, _key: Any, value: Any, mask: torch.Tensor | None, **kwargs: Any) -> Any:
        causal = kwargs.get("is_causal")
        opens = not (getattr(module, "is_causal", True) if causal is None else causal)
        found[getattr(module, "layer_idx", -1)] = _Seen(mask, kwargs.get("sliding_window"), opens)
        batch, heads, length, _ = query.shape
        return query.new_zeros(batch, length, heads, value.shape[-1]), None

    decoder: Any = part.decoder
    with attention_implementation(decoder, "vlmexport_look", look):
        replay(part, call)
    return found


def _require_causal(family: str, part: DecoderPart, looked: dict[int, _Seen], chunks: tuple[int, ...]) -> None:
    """Refuse layers that make masks of their own which are not causal, or leave them out and are not causal then."""
    decoder: Any = part.decoder
    leaves_out = decoder.config._attn_implementation != "eager"
    for layer, seen in looked.items():
        chunk = chunks[layer] if layer < len(chunks) else 0
        if seen.mask is not None and not _is_causal(seen.mask, seen.window, chunk):
            raise _refusal(family, f"layer {layer}")
        if seen.opens and leaves_out:
            raise _refusal(family, f"layer {layer}")


def _layers_by_mask(family: str, looked: dict[int, _Seen], named: dict[str, torch.Tensor]) -> dict[str, _Seen]:
    """What reached the layers that take the mask of each name; they must agree."""
    layers: dict[str, _Seen] = {}
    for layer, seen in looked.items():
        name = next((name for name, mask in named.items() if _same_memory(mask, seen.mask)), None)
        if name is None:
            raise _refusal(family, f"layer {layer}")
        whole = dataclasses.replace(seen, mask=named[name])
        if layers.setdefault(name, whole) != whole:
            raise _refusal(family, f"layer {layer}")
    return layers


def _same_memory(mask: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Is `other` the tensor `mask`, or a view of all of it?"""
    return mask is other or (other is not None and mask.data_ptr() == other.data_ptr() and mask.shape == other.shape)


def _blocks(vlm: VLM, kind: MaskKind, example: dict[str, torch.Tensor], tokens: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(block_ids(kind, example["input_ids"].numpy(), vlm.facts.image_token_id, tokens))


def _together(
    examples: Sequence[dict[str, torch.Tensor]], reached: Sequence[dict[str, torch.Tensor]]
) -> tuple[int, ...]:
    """Ids of all tokens that see a later one, or that an earlier one sees, in any mask of any example."""
    found: set[int] = set()
    for example, masks in zip(examples, reached, strict=True):
        for mask in masks.values():
            later = _shown(mask)[0, 0].triu(1)
            found |= set(example["input_ids"][0, later.any(dim=1) | later.any(dim=0)].tolist())
    return tuple(sorted(found))


def _wrong(masks: BlockMasks, blocks: torch.Tensor, named: dict[str, torch.Tensor]) -> str:
    """Which of the masks in `named` is not the rebuilt one; "" when all are."""
    valid = torch.ones_like(blocks)
    for name, window in masks.windows:
        seen = masks.seen(blocks, valid, window)
        if not torch.equal(_shown(named[name]).expand_as(seen), seen):
            return f"mask {name!r}" if name else "every layer"
    return ""


def _cuts(
    vlm: VLM, part: DecoderPart, example: dict[str, torch.Tensor], blocks: torch.Tensor, masks: BlockMasks
) -> bool:
    """Does a window hide earlier tokens of the query's block? Seen with a window that is shorter than a block.

    A block of the model's own examples may be shorter than its windows, which would leave both possible.
    """
    with _window(part, _PROBE_WINDOW):
        call = _call_only(vlm, part, example)
        named = _filled(_given(call), call, ())
    short = tuple((name, None if window is None else _PROBE_WINDOW) for name, window in masks.windows)
    return bool(named) and not _wrong(BlockMasks(short, cut=True, whole=masks.whole), blocks, named)


@contextmanager
def _window(part: DecoderPart, window: int) -> Iterator[None]:
    """Within, the model makes its masks with another window."""
    decoder: Any = part.decoder
    text = decoder.config.get_text_config()
    before, text.sliding_window = text.sliding_window, window
    try:
        yield
    finally:
        text.sliding_window = before


def _call_only(vlm: VLM, part: DecoderPart, example: dict[str, torch.Tensor]) -> DecoderCall:
    """What the whole model calls its decoder with; the decoder does not run."""
    seen: list[dict[str, Any]] = []

    def stop(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)
        raise _ReachedError

    handle = part.decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_ReachedError):
            vlm.model(**example, use_cache=False)
    finally:
        handle.remove()
    return DecoderCall(seen[0], torch.empty(0))


def _is_causal(mask: torch.Tensor, window: int | None, chunk: int = 0) -> bool:
    """True when the mask ``[B, 1, S, T]`` is exactly the causal one, cut to `window` or into chunks where given."""
    length, total = mask.shape[-2:]
    expected = visible(torch.zeros(1, length, dtype=torch.int64), torch.ones(1, total), window, cut=True)
    expected = expected & seen_in_chunk(torch.ones(1, total), length, chunk)
    return bool((_shown(mask) == expected).all())


def _shown(mask: torch.Tensor) -> torch.Tensor:
    """Where a boolean or additive mask lets a query see a key."""
    return mask if mask.dtype == torch.bool else mask == 0


def _refusal(family: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{family}: {what} uses a mask that is neither causal, nor causal with image blocks or a whole prompt whose "
        "tokens see each other; this decoder form is not supported yet"
    )
