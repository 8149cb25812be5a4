"""The decoder's engine on stand-ins: which engines it takes, and how calls are cut. No GPU was used.

What its calls compute is judged against ONNX Runtime in test_runner.py.
"""

import dataclasses

import numpy as np
import pytest

from tests.lower.tensorrt.graphs import TINY
from tests.runtime.tensorrt.exports import static_export
from tests.runtime.tensorrt.fakes import MODULE, VERSION, FakeDevice
from vlmexport.engines import engine_path
from vlmexport.errors import BadInputError
from vlmexport.model.kv import KVGeometry
from vlmexport.runtime.protocol import Cache, PartOutputError
from vlmexport.runtime.tensorrt.bindings import Library
from vlmexport.runtime.tensorrt.decoder import EngineDecoder, Step
from vlmexport.runtime.tensorrt.engine import Engine

KV = KVGeometry(TINY.layers, TINY.kv_heads, TINY.head_dim)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return static_export(tmp_path_factory.mktemp("trt"))


@pytest.fixture
def device():
    return FakeDevice()


@pytest.fixture
def engine(export, device):
    return Engine("decoder", engine_path(export.path, "sm80", "decoder"), Library("rtx", VERSION, MODULE), device)


@pytest.fixture
def decoder(engine, device):
    return EngineDecoder(device, Step(engine, 0), Step(engine, 1), KV)


def rows(*shape):
    return np.random.default_rng(sum(shape)).standard_normal((*shape, TINY.hidden)).astype(np.float32)


def ones(*shape):
    return np.ones(shape, np.int64)


def test_what_it_takes_is_read_from_the_engine(decoder, engine):
    assert (decoder.capacity, decoder.vocab_size) == (TINY.cache, TINY.vocab)
    assert Step(engine, 0).largest == (3, TINY.cache, 8)
    assert Step(engine, 1).largest == (3, 1, 1)


@pytest.mark.parametrize(
    ("kv", "words"),
    [
        (dataclasses.replace(KV, layers=TINY.layers + 1), f"has no 'past_key_values.{TINY.layers}.key'; it has"),
        (dataclasses.replace(KV, heads=TINY.kv_heads + 1), r"the cache has shape \[.*\]; the manifest has"),
        (dataclasses.replace(KV, head_dim=TINY.head_dim * 2), r"the cache has shape \[.*\]; the manifest has"),
    ],
)
def test_an_engine_of_another_geometry_is_refused(engine, device, kv, words):
    with pytest.raises(PartOutputError, match=words):
        EngineDecoder(device, Step(engine, 0), Step(engine, 1), kv)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_an_engine_without_a_tensor_of_the_contract_is_refused(engine, device, side, monkeypatch):
    lost = {"inputs": "write_indices", "outputs": "logits"}[side]
    monkeypatch.setattr(engine, side, tuple(name for name in getattr(engine, side) if name != lost))
    with pytest.raises(PartOutputError, match=f"the engine has no '{lost}'"):
        EngineDecoder(device, Step(engine, 0), Step(engine, 1), KV)


def test_two_engines_with_caches_of_different_length_are_refused(engine, device, tmp_path):
    longer = static_export(tmp_path / "longer", shape=dataclasses.replace(TINY, cache=2 * TINY.cache))
    path = engine_path(longer.path, "sm80", "decoder")
    other = Engine("decoder", path, Library("rtx", VERSION, MODULE), device)
    with pytest.raises(PartOutputError, match="the cache has shape"):
        EngineDecoder(device, Step(engine, 0), Step(other, 1), KV)


def test_a_prompt_longer_than_the_profile_is_cut_and_equals_one_call(decoder, monkeypatch):
    sequence = rows(2, 21)
    whole, _ = decoder.prefill(sequence, ones(2, 21), 1)
    monkeypatch.setattr(Step, "largest", property(lambda step: (3, 8 if step.profile == 0 else 1, 8)))
    tokens, run = [], decoder._prefill.engine.run

    def watched(inputs, profile, residents):
        tokens.append(inputs["inputs_embeds"].shape[1])
        return run(inputs, profile, residents)

    monkeypatch.setattr(decoder._prefill.engine, "run", watched)
    pieces, cache = decoder.prefill(sequence, ones(2, 21), 1)
    assert tokens == [8, 8, 5]
    assert cache.lengths.tolist() == [21, 21]
    assert np.abs(pieces - whole).max() <= 4e-3 * np.abs(whole).max()


def test_no_room_a_full_batch_and_another_cache_are_bad_input(decoder):
    with pytest.raises(BadInputError, match=f"{TINY.cache + 1} tokens do not fit the static cache of {TINY.cache}"):
        decoder.prefill(rows(1, TINY.cache + 1), ones(1, TINY.cache + 1), 1)
    with pytest.raises(BadInputError, match="the engine was built for 3"):
        decoder.prefill(rows(4, 2), ones(4, 2), 1)
    with pytest.raises(BadInputError, match="a Cache is not a cache of this runner"):
        decoder.decode(rows(1, 1), Cache(np.zeros(1, np.int64)), 1)
