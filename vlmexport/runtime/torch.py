"""`TorchRunner`: the reference, a loaded PyTorch model behind the same protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache

from vlmexport.errors import BadInputError
from vlmexport.model.cross import STATES, TILE_MASK
from vlmexport.model.per_token import PER_LAYER
from vlmexport.model.positions import AXES
from vlmexport.runtime.protocol import (
    DEFAULT_RESERVE,
    Array,
    Cache,
    Extras,
    VisionFeatures,
    named_features,
    next_shift,
    no_per_layer,
)
from vlmexport.runtime.tiles import check_states, last_rows
from vlmexport.runtime.torch_cross import encoded, plain_merge, tile_arguments
from vlmexport.runtime.torch_rows import RowCaches, decode_rows, prefill_rows
from vlmexport.split.decoder import DecoderPart, text_decoder
from vlmexport.split.deepstack import deepstack_added
from vlmexport.split.expert_forms import with_packed_experts
from vlmexport.split.features import feature_rows, find_feature_call
from vlmexport.split.per_layer import TokenTables
from vlmexport.split.places import fixed_rows
from vlmexport.split.states import keeps_states
from vlmexport.split.windows import shortest_window

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Part, Split


@dataclass
class TorchCache(Cache):
    """The transformers cache and the mask ``[batch, tokens so far]`` of everything fed to it.

    `states`: further arguments of the decoder, for what it attends to beside its tokens.
    """

    past: Any
    mask: torch.Tensor
    states: dict[str, Any] = field(default_factory=dict, kw_only=True)


class TorchRunner:
    """Runs ``vlm.model`` in the dtype it is in (call ``.float()`` on it first for an FP32 reference).

    `split` gives the cut between `vision` and `project`; without it only `image_features`, the model's own whole path,
    is there. `new_cache` makes the cache of every prefill. Satisfies `Runner`.
    """

    def __init__(self, vlm: VLM, split: Split | None = None) -> None:
        self.model = cast(Any, vlm.model)
        self.split = split
        self.merge_spec = split.merge if split else plain_merge(vlm)
        self.eos_token_ids = vlm.facts.eos_token_ids
        self._decoder = self._decoder_part()
        self.new_cache: Callable[[], DynamicCache] = DynamicCache
        # transformers counts padding behind a prompt as tokens of its chunks.
        counts = bool(self._decoder.chunks or self._decoder.counted)
        self._row_by_row = counts or keeps_states(self._decoder.decoder)
        if keeps_states(self._decoder.decoder):
            self.new_cache = lambda: DynamicCache(config=self._decoder.decoder.config)
        self._window = shortest_window(self._decoder.decoder)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the decoder computes in."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    def vision(self, pixel_inputs: Mapping[str, Array]) -> VisionFeatures:
        """Vision features by the split's encoder module."""
        part = self._part("vision_encoder")
        names = [spec.name for spec in part.signature.inputs]

        def encode(inputs: Mapping[str, Array]) -> tuple[Array, ...]:
            features = self._call(part.module, **{n: self._tensor(inputs[n]) for n in names})
            return tuple(map(_array, features)) if isinstance(features, tuple) else (_array(features),)

        return self.merge_spec.encode(pixel_inputs, encode)

    def project(self, vision_features: VisionFeatures) -> Array:
        """Image features by the split's projector module."""
        tensors = {name: self._tensor(array) for name, array in named_features(vision_features).items()}
        return _array(self._call(self._part("projector").module, **tensors))

    def image_features(self, pixel_inputs: Mapping[str, Array]) -> Array:
        """Image features ``[image_tokens, hidden]`` by the model's own ``get_image_features``."""
        tensors = {name: self._tensor(array) for name, array in pixel_inputs.items()}
        ask = find_feature_call(self.model, self.merge_spec.image_token_id, tensors)
        rows = feature_rows(self._call(ask, tensors), self.merge_spec.deepstack_layers)
        fixed = fixed_rows(self._part("projector").module) if self.merge_spec.fixed_tokens else None
        return _array(rows if fixed is None else torch.cat([rows, fixed.to(rows.dtype)]))

    def embed(self, input_ids: NDArray[np.int64]) -> Array:
        """Embeddings ``[batch, tokens, hidden]``."""
        return _array(self._call(self.model.get_input_embeddings(), torch.from_numpy(input_ids)))

    def per_layer(self, input_ids: NDArray[np.int64]) -> Array:
        """What the layers get of each token, by the split's tables."""
        tables = self._part("embed_tokens").module
        if not isinstance(tables, TokenTables):
            raise no_per_layer(type(self.model).__name__)
        return _array(self._call(tables.per_layer, torch.from_numpy(input_ids)))

    def prefill(
        self,
        inputs_embeds: Array,
        attention_mask: NDArray[np.int64],
        keep: int = 1,
        *,
        reserve: int = DEFAULT_RESERVE,
        extras: Extras | None = None,
    ) -> tuple[Array, Cache]:
        """Start a batch; any padding is right here. See `Runner.prefill`; its cache needs no room.

        transformers counts a window in slots: where one would end within padding, rows are run one by one.
        """
        check_states(extras or {})
        ends = self._window is not None and attention_mask.shape[1] + reserve > self._window
        if len(attention_mask) > 1 and (self._row_by_row or (ends and not attention_mask.all())):
            return prefill_rows(self, inputs_embeds, attention_mask, keep, extras)
        mask = torch.from_numpy(attention_mask)
        cache = TorchCache(np.zeros(len(mask), np.int64), self.new_cache(), mask[:, :0])
        if self.merge_spec.decoder_start_token_id is not None:
            start = np.full((len(mask), 1), self.merge_spec.decoder_start_token_id)
            cache.states = encoded(self.model, self.split, self._tensor(inputs_embeds), mask)
            cache.past, cache.mask = EncoderDecoderCache(cache.past, self.new_cache()), mask[:, :0]
            inputs_embeds, mask, keep = self.embed(start), torch.ones(start.shape, dtype=torch.int64), 1
        return self._forward(inputs_embeds, mask, cache, keep, extras), cache

    def decode(self, inputs_embeds: Array, cache: Cache, keep: int = 1, *, extras: Extras | None = None) -> Array:
        """Continue every row; see `Runner.decode`."""
        if isinstance(cache, RowCaches):
            return decode_rows(self, inputs_embeds, cache, keep, extras)
        if not isinstance(cache, TorchCache):
            raise BadInputError(f"a {type(cache).__name__} is not a cache of this runner")
        mask = torch.ones(inputs_embeds.shape[:2], dtype=torch.int64)
        return self._forward(inputs_embeds, mask, cache, keep, extras)

    def _forward(
        self, inputs_embeds: Array, mask: torch.Tensor, cache: TorchCache, keep: int, extras: Extras | None
    ) -> Array:
        given = dict(extras or {})
        given |= {name: row.repeat(mask.shape[1], axis=1) for name, row in cache.repeated.items() if name not in given}
        states = given.pop(STATES, None)
        if unknown := sorted(given.keys() - set(self.merge_spec.extras)):
            raise BadInputError(f"the decoder takes no {unknown[0]}")
        new = mask.numpy()
        counted = np.maximum(cache.lengths[:, None] + np.cumsum(new, axis=1) - 1, 0)
        positions = given.get("position_ids", counted + cache.position_shift[:, None] + self.merge_spec.position_start)
        cache.mask = torch.cat([cache.mask, mask], dim=1)
        cache.lengths = cache.lengths + new.sum(axis=1)
        if "position_ids" in self.merge_spec.extras:
            cache.position_shift = next_shift(positions, new, cache.lengths)
            positions = np.broadcast_to(positions, (AXES, *new.shape))
        tensors = {name: self._tensor(array) for name, array in given.items()}
        if TILE_MASK in tensors:
            kept = None if states is None else self._tensor(states)
            cache.states = tile_arguments(self._decoder, tensors[TILE_MASK], kept, self.dtype)
            cache.repeated = {TILE_MASK: last_rows(given[TILE_MASK], new)}
        embeds = self._tensor(inputs_embeds)
        with deepstack_added(self._decoder.decoder, tensors.get("deepstack_embeds")):
            out = self._call(
                self._decoder.decoder,
                inputs_embeds=embeds,
                attention_mask=self._decoder.masks(cache.mask, tensors.get("block_ids"), embeds),
                position_ids=self._tensor(positions),
                **({PER_LAYER: tensors[PER_LAYER]} if PER_LAYER in tensors else {}),
                **cache.states,
                past_key_values=cache.past,
                use_cache=True,
            )
        hidden = _last_valid(out.last_hidden_state, mask, keep) if keep else out.last_hidden_state
        return _array(self._call(self._decoder.logits, hidden)).astype(np.float32, copy=False)

    def substitute(self, weights: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
        """Replace weights by name (``lm_head.weight``) and return the originals; give those back to restore.

        Only the named module's weight is replaced: a head that is tied to the embedding leaves the table as it is.
        Experts' matrices ``[N, K]`` go by ``<packed parameter>.<expert>``; the original is the whole parameter.
        Raises `BadInputError` for an unknown name or another shape.
        """
        originals: dict[str, nn.Parameter] = {}
        for name, value in with_packed_experts(self.model, self._decoder.decoder, weights).items():
            module, leaf, original = self._find(name)
            if value.shape != original.shape:
                raise BadInputError(f"{name} has shape {tuple(original.shape)}, not {tuple(value.shape)}")
            originals[name] = original
            new = value if isinstance(value, nn.Parameter) else nn.Parameter(value.to(original.dtype), False)
            setattr(module, leaf, new)
        return originals

    @contextmanager
    def substituted(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """`substitute` for the length of a ``with`` block."""
        originals = self.substitute(weights)
        try:
            yield
        finally:
            self.substitute(originals)

    def _find(self, name: str) -> tuple[nn.Module, str, nn.Parameter]:
        path, _, leaf = name.rpartition(".")
        try:
            module: nn.Module = self.model.get_submodule(path)
        except AttributeError as error:
            raise BadInputError(f"{name} is not a weight of {type(self.model).__name__}") from error
        original = getattr(module, leaf, None)
        if not isinstance(original, nn.Parameter):
            raise BadInputError(f"{name} is not a weight of {type(self.model).__name__}")
        return module, leaf, original

    def _decoder_part(self) -> DecoderPart:
        module = None if self.split is None else self._part("decoder").module
        if isinstance(module, DecoderPart):
            return module
        return DecoderPart(text_decoder(self.model), self.model.get_output_embeddings())

    def _part(self, role: str) -> Part:
        if self.split is None:
            raise BadInputError("this reference was made without a split, so vision and project are not separate")
        return {r.value: part for r, part in self.split.parts.items()}[role]

    def _tensor(self, array: Array) -> torch.Tensor:
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    @staticmethod
    @torch.no_grad()
    def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def _last_valid(hidden: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
    """The last `keep` valid positions of each row of ``hidden`` ``[batch, tokens, width]``."""
    last = mask.shape[1] - mask.flip(1).argmax(dim=1)
    rows = (last[:, None] + torch.arange(-min(keep, mask.shape[1]), 0)).clamp_min(0)
    return hidden.gather(1, rows[:, :, None].expand(-1, -1, hidden.shape[2]))


def _array(tensor: torch.Tensor) -> Array:
    """The tensor as numpy; bfloat16, which numpy lacks, becomes float32."""
    result: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).contiguous().numpy()
    return result
