"""What the key-value cache holds on calibration samples: the peaks from which an INT8 cache takes its scales."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.calibrate.recipe import CalibrationOptions, resolve_recipe
from vlmexport.errors import UnsupportedModelError
from vlmexport.progress import Progress
from vlmexport.quantize.kv_cache import CachePeaks, LayerPeaks
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.decoder import text_decoder

if TYPE_CHECKING:
    from vlmexport.calibrate.capture import Batch
    from vlmexport.model.kv import KVGeometry
    from vlmexport.model.load import VLM

# The whole decoder runs on every sample, and a largest value is known sooner than a second moment.
MOST_SAMPLES = 32


def with_cache_peaks(
    weights: DecoderWeights,
    report: dict[str, Any] | None,
    vlm: VLM,
    options: CalibrationOptions,
    progress: Progress,
) -> tuple[DecoderWeights, dict[str, Any]]:
    """`weights` with the peaks of the cache on the first samples of the recipe, and `report` with what they were.

    The cache is that of the model as loaded: weights change it by less than the margin of its scales, and what folds
    change is known to the emitter.
    """
    from vlmexport.calibrate.capture import capture_batches
    from vlmexport.calibrate.dataset import load_samples

    recipe = resolve_recipe(options)
    found = load_samples(dataclasses.replace(recipe, samples=min(recipe.samples, MOST_SAMPLES)))
    with progress.stage("look at the KV cache") as stage:
        batches = _told(capture_batches(vlm, found.samples, found.recipe), stage.advance)
        peaks = observe_cache(text_decoder(vlm.model), vlm.facts.kv, batches)
    return dataclasses.replace(weights, cache_peaks=peaks), {**(report or {}), "kv_cache": found.to_dict()}


def observe_cache(decoder: Any, kv: KVGeometry, batches: Iterable[Batch]) -> CachePeaks:
    """Run `decoder` on `batches`, one at a time, and keep the peaks of its cache; padding is not looked at.

    Raises `BadInputError` when there are no batches, `UnsupportedModelError` when the cache is not one key and one
    value tensor ``[B, heads, S, head_dim]`` per layer.
    """
    return CachePeaks.over(_layer_peaks(decoder, kv, batch) for batch in batches)


def _layer_peaks(decoder: Any, kv: KVGeometry, batch: Batch) -> list[LayerPeaks]:
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        decoder(**{**_cast(batch.kwargs, decoder.dtype), "past_key_values": cache, "use_cache": True})
    layers: Any = cache.layers
    shapes = [tensor.shape for layer in layers for tensor in (layer.keys, layer.values)]
    if len(layers) != kv.layers or any((s[1], s[3]) != (kv.heads, kv.head_dim) for s in shapes):
        raise UnsupportedModelError(
            f"{decoder.config.model_type}: --kv-cache int8 needs one key and one value of {kv.heads} heads x "
            f"{kv.head_dim} in each of {kv.layers} layers; use --kv-cache same"
        )
    return [LayerPeaks.of(_valid(layer.keys, batch.valid), _valid(layer.values, batch.valid)) for layer in layers]


def _valid(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``[B, heads, S, head_dim]`` without padding, as ``[heads, tokens, head_dim]``."""
    return states.transpose(1, 2)[mask].transpose(0, 1)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with every floating tensor in it, however nested, as `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _told(batches: Iterable[Batch], done: Any) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        done()
