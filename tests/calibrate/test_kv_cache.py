"""What the cache reached on samples: every layer, every sample, no padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from vlmexport.calibrate.capture import Batch
from vlmexport.calibrate.kv_cache import MOST_SAMPLES, observe_cache, with_cache_peaks
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.kv import KVGeometry
from vlmexport.model.load import VLM, load_vlm
from vlmexport.progress import SilentProgress
from vlmexport.quantize.kv_cache import LayerPeaks
from vlmexport.quantize.weights import DecoderWeights


@pytest.fixture(scope="module")
def vlm(tiny_idefics3: Path) -> Iterator[VLM]:
    loaded = load_vlm(str(tiny_idefics3))
    loaded.model.float()
    yield loaded


def batch(vlm: VLM, lengths: tuple[int, ...], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    embeds = torch.randn(len(lengths), width, vlm.facts.hidden_size, generator=generator)
    valid = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    embeds[~valid] = 1e3  # padding that would show
    kwargs = {"inputs_embeds": embeds, "attention_mask": valid.long(), "past_key_values": None, "use_cache": False}
    nothing = torch.zeros_like(valid)
    return Batch(kwargs, valid, nothing, nothing.long(), nothing)


def alone(vlm: VLM, one: Batch, row: int) -> list[LayerPeaks]:
    """The peaks of one row, without any padding."""
    cache = DynamicCache()
    embeds = one.kwargs["inputs_embeds"][row : row + 1, one.valid[row]]
    with torch.no_grad():
        vlm.model.get_decoder()(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return [LayerPeaks.of(layer.keys[0], layer.values[0]) for layer in cache.layers]


def test_peaks_are_those_of_every_row_alone(vlm: VLM) -> None:
    batches = [batch(vlm, (9, 5)), batch(vlm, (7,), seed=1)]
    peaks = observe_cache(vlm.model.get_decoder(), vlm.facts.kv, iter(batches))
    rows = [alone(vlm, batches[0], 0), alone(vlm, batches[0], 1), alone(vlm, batches[1], 0)]
    assert len(peaks.layers) == vlm.facts.kv.layers
    for index, found in enumerate(peaks.layers):
        for name in ("half", "interleaved", "value"):
            wanted = torch.stack([getattr(row[index], name) for row in rows]).amax(0)
            assert torch.allclose(getattr(found, name), wanted, rtol=1e-4, atol=1e-6)


def test_another_geometry_is_refused_with_the_way_out(vlm: VLM) -> None:
    kv = vlm.facts.kv
    for wrong in (KVGeometry(kv.layers + 1, kv.heads, kv.head_dim), dataclasses.replace(kv, head_dim=kv.head_dim * 2)):
        with pytest.raises(UnsupportedModelError, match="use --kv-cache same"):
            observe_cache(vlm.model.get_decoder(), wrong, [batch(vlm, (4,))])


def test_no_samples_are_refused(vlm: VLM) -> None:
    with pytest.raises(BadInputError, match="at least one calibration sample"):
        observe_cache(vlm.model.get_decoder(), vlm.facts.kv, [])


@pytest.mark.slow
def test_the_recipe_is_followed_and_reported(vlm: VLM) -> None:
    options = CalibrationOptions(samples=2)
    weights, report = with_cache_peaks(DecoderWeights({}), {"algorithm": "x"}, vlm, options, SilentProgress())
    assert weights.cache_peaks is not None and len(weights.cache_peaks.layers) == vlm.facts.kv.layers
    assert report["algorithm"] == "x" and report["kv_cache"]["samples"] == 2
    _, report = with_cache_peaks(
        DecoderWeights({}), None, vlm, CalibrationOptions(samples=MOST_SAMPLES + 1), SilentProgress()
    )
    assert report["kv_cache"]["samples"] == MOST_SAMPLES
