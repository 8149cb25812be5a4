"""A decoder with a static cache in ONNX Runtime: every way to the same tokens gives the same logits."""

import numpy as np
import pytest

from tests.lower.tensorrt.graphs import TINY, write_decoder
from vlmexport.errors import BadInputError
from vlmexport.model.kv import KVGeometry
from vlmexport.runtime.protocol import Cache, PartOutputError
from vlmexport.runtime.sessions import SessionSettings, open_session
from vlmexport.runtime.static_decoder import StaticDecoder

KV = KVGeometry(TINY.layers, TINY.kv_heads, TINY.head_dim)
EXACT = SessionSettings(1, exact=True)
LIMIT = 4e-3


@pytest.fixture(scope="module", params=["int4", "fp16", "window"])
def decoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("static")
    weights, window = ("fp16", 8) if request.param == "window" else (request.param, 0)
    return opened(write_decoder(folder, weights=weights, window=window))


def opened(path, kv=KV):
    return StaticDecoder(open_session(path, "decoder", EXACT), kv)


def prompt(*shape):
    return np.random.default_rng(sum(shape)).standard_normal((*shape, TINY.hidden)).astype(np.float16)


def ones(rows):
    return np.ones(rows.shape[:2], np.int64)


def close(found, wanted):
    return np.abs(found - wanted).max() <= LIMIT * np.abs(wanted).max()


def test_steps_and_chunks_over_the_cache_equal_one_prompt(decoder):
    rows = prompt(1, 20)
    whole, _ = decoder.prefill(rows, ones(rows), 0, 0)
    for sizes in ((12, *[1] * 8), (5, 9, 6)):
        first, cache = decoder.prefill(rows[:, : sizes[0]], ones(rows[:, : sizes[0]]), 0, 0)
        parts, start = [first], sizes[0]
        for size in sizes[1:]:
            parts.append(decoder.decode(rows[:, start : start + size], cache, 0))
            start += size
        assert close(np.concatenate(parts, axis=1), whole)
        assert cache.lengths.tolist() == [20]


def test_rows_of_a_padded_batch_go_on_behind_their_own_tokens(decoder):
    rows, lengths = prompt(2, 14), (14, 6)
    mask = (np.arange(14) < np.array(lengths)[:, None]).astype(np.int64)
    logits, cache = decoder.prefill(rows, mask, 1, 0)
    later = prompt(2, 3)
    together = [logits, decoder.decode(later[:, :1], cache, 1), decoder.decode(later[:, 1:], cache, 2)]
    assert cache.lengths.tolist() == [17, 9]
    for row, length in enumerate(lengths):
        alone = np.concatenate([rows[row : row + 1, :length], later[row : row + 1]], axis=1)
        wanted, _ = decoder.prefill(alone, ones(alone), 4, 0)
        assert close(np.concatenate(together, axis=1)[row], wanted[0])


def test_the_last_logits_are_those_of_the_last_valid_tokens(decoder):
    rows = prompt(2, 9)
    mask = np.array([[1] * 9, [1] * 4 + [0] * 5])
    whole, _ = decoder.prefill(rows, mask, 0, 0)
    last, _ = decoder.prefill(rows, mask, 2, 0)
    assert whole.shape == (2, 9, TINY.vocab)
    assert close(last[0], whole[0, 7:9])
    assert close(last[1], whole[1, 2:4])
    assert last.dtype == np.float32


def test_new_keys_are_written_in_place_and_nothing_else_is(decoder):
    rows = prompt(1, 5)
    _, cache = decoder.prefill(rows, ones(rows), 1, 0)
    before = {name: value.numpy().copy() for name, value in cache.buffers.items()}
    addresses = {name: value.data_ptr() for name, value in cache.buffers.items()}
    decoder.decode(prompt(1, 1), cache, 1)
    (binding,) = cache.bindings
    outputs = dict(zip([o.name for o in decoder.session.get_outputs()], binding.get_outputs(), strict=False))
    bound = {value.data_ptr() for value in outputs.values()}
    for name, value in cache.buffers.items():
        held = value.numpy()
        assert addresses[name] == value.data_ptr()
        assert value.data_ptr() in bound
        assert held[:, :, 5].any()
        assert not held[:, :, 6:].any()
        assert np.array_equal(held[:, :, :5], before[name][:, :, :5])


def test_a_full_cache_refuses_more_and_keeps_what_it_holds(decoder):
    rows = prompt(1, TINY.cache)
    with pytest.raises(BadInputError, match=r"static cache of 48; export with a larger --max-seq"):
        decoder.prefill(prompt(1, TINY.cache + 1), ones(prompt(1, TINY.cache + 1)), 1, 0)
    _, cache = decoder.prefill(rows, ones(rows), 1, 64)
    with pytest.raises(BadInputError, match="behind 48 of them"):
        decoder.decode(rows[:, :1], cache, 1)
    assert cache.lengths.tolist() == [TINY.cache]


def test_left_padding_and_foreign_caches_are_refused(decoder):
    rows = prompt(2, 3)
    with pytest.raises(BadInputError, match="not right-padded"):
        decoder.prefill(rows, np.array([[1, 1, 1], [0, 1, 1]]), 1, 0)
    with pytest.raises(BadInputError, match="not a cache of this runner"):
        decoder.decode(rows[:, :1], Cache(np.zeros(2, np.int64)), 1)


def test_a_graph_of_another_form_is_named(tmp_path):
    path = write_decoder(tmp_path)
    with pytest.raises(PartOutputError, match=r"no input 'past_key_values\.2\.key'"):
        opened(path, KVGeometry(3, TINY.kv_heads, TINY.head_dim))
    import onnx

    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if len(value.type.tensor_type.shape.dim) == 4:
            value.type.tensor_type.shape.dim[2].dim_param = "length"
    onnx.save(model, path)
    with pytest.raises(PartOutputError, match="a static cache has a fixed length"):
        opened(path)
