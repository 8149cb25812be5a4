"""The decoder's checks on graphs with a static cache: sound ones are green, each planted fault turns its check red."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.lower.tensorrt.graphs import DecoderShape, part_of, write_decoder
from vlmexport.manifest import Artifact, Manifest, write_manifest
from vlmexport.model.kv import KVGeometry
from vlmexport.runtime.decoder_inputs import DecoderInputs
from vlmexport.runtime.protocol import ModelInputs, require_right_padding
from vlmexport.runtime.sessions import SessionSettings, open_session
from vlmexport.runtime.static_decoder import StaticDecoder
from vlmexport.target import load_target
from vlmexport.verify.decoder import DecoderLimits, DecoderSubjects, check_consistency, check_lowering
from vlmexport.verify.dialect import check_dialect
from vlmexport.verify.gates import Gate
from vlmexport.verify.quantization import Item
from vlmexport.verify.static_cache import STEPS, answerable, capacity_of, check_overfull, with_room
from vlmexport.verify.structure import check_structure

SHAPE = DecoderShape(cache=96)
KV = KVGeometry(SHAPE.layers, SHAPE.kv_heads, SHAPE.head_dim)
REL = 4e-3
LIMITS = DecoderLimits(REL, 1e-2, exact_kl=1e-5, steps=STEPS, capacity=SHAPE.cache)
TABLE = np.random.default_rng(3).standard_normal((SHAPE.vocab, SHAPE.hidden)).astype(np.float16)
EMBEDS = {n: DecoderInputs(TABLE[np.arange(t)[None] * 7 % SHAPE.vocab]) for n, t in (("wide", 25), ("short", 5))}


class Runner:
    """A decoder graph as the gate calls it."""

    def __init__(self, path):
        self.decoder = StaticDecoder(open_session(path, "decoder", SessionSettings(1, exact=True)), KV)

    def prefill(self, embeds, mask, keep=1, *, reserve=64, extras=None):
        return self.decoder.prefill(embeds, mask, keep, reserve, extras)

    def decode(self, embeds, cache, keep=1, *, extras=None):
        return self.decoder.decode(embeds, cache, keep, extras)

    @staticmethod
    def embed(ids):
        return TABLE[ids]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Runner(write_decoder(tmp_path_factory.mktemp("sound"), SHAPE))


def changed(folder, change):
    """A runner of the sound graph after `change` of its ModelProto."""
    path = write_decoder(folder, SHAPE)
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    onnx.save(model, path)
    return Runner(path)


def embedded(ids):
    return DecoderInputs(Runner.embed(ids))


def judged(runner, reference):
    gate = Gate()
    subjects = DecoderSubjects(runner, runner, reference, embedded)
    check_lowering(gate, subjects, EMBEDS, LIMITS)
    check_consistency(gate, runner, EMBEDS, REL, left_pad=False)
    check_overfull(gate, runner, EMBEDS["short"], SHAPE.cache)
    return gate, {c.name for c in gate.checks if c.status == "failed"}


def test_a_sound_graph_is_green_over_64_steps_and_to_the_last_slot(sound):
    gate, failed = judged(sound, sound)
    assert failed == set()
    assert len(gate.series["decode_exact_rel"]) == STEPS + 1
    assert {"decoder/exact_kl", "decoder/overfull", "decoder/padding_guard"} <= {c.name for c in gate.checks}
    assert len(gate.series["shipped_rel"]) == len(EMBEDS) + 2


def shifted_writes(graph):
    """Every token goes one slot further than the caller says: the first slot stays empty, and is seen."""
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "one_more"))
    for node in graph.node:
        node.input[:] = ["later_indices" if name == "write_indices" else name for name in node.input]
    graph.node.insert(0, helper.make_node("Add", ["write_indices", "one_more"], ["later_indices"]))


def positions_from_zero(graph):
    """Rotary positions that start at 0 in every call, whatever the cache holds."""
    node = next(n for n in graph.node if n.op_type == "RotaryEmbedding")
    queries = next(n for n in graph.node if n.output[0] == node.input[3])
    first = queries.input[0]
    graph.node.insert(1, helper.make_node("Sub", ["write_indices", "write_indices"], ["nothing"]))
    for other in graph.node:
        if other.op_type == "Unsqueeze" and other.output[0] == first:
            other.input[0] = "nothing"


def crossed_caches(graph):
    crossed = {f"past_key_values.{i}.key": f"past_key_values.{1 - i}.key" for i in range(2)}
    for node in graph.node:
        node.input[:] = [crossed.get(name, name) for name in node.input]


@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        (shifted_writes, {"decoder/prefill[wide]", "decoder/decode", "decoder/overfull", "decoder/exact_kl"}),
        (positions_from_zero, {"decoder/decode", "decoder/cache", "decoder/ragged_batch"}),
        (crossed_caches, {"decoder/decode", "decoder/cache", "decoder/ragged_batch"}),
    ],
)
def test_a_graph_that_treats_the_cache_otherwise_is_seen(tmp_path, sound, fault, checks):
    _, failed = judged(changed(tmp_path, fault), sound)
    assert checks <= failed


def test_small_errors_everywhere_are_seen_by_their_divergence(sound):
    class Blurred(Runner):
        def __init__(self):
            self.decoder = sound.decoder

        def prefill(self, *args, **kwargs):
            logits, cache = sound.prefill(*args, **kwargs)
            signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), logits.shape)
            return logits + 1e-2 * signs, cache

    _, failed = judged(Blurred(), sound)
    assert "decoder/exact_kl" in failed
    assert "decoder/prefill[wide]" not in failed


def test_a_runner_that_writes_behind_the_end_fails(sound):
    class Careless(Runner):
        def __init__(self):
            self.decoder = sound.decoder

        def prefill(self, embeds, mask, keep=1, *, reserve=64):
            return sound.prefill(embeds[:, : SHAPE.cache], mask[:, : SHAPE.cache], keep)

        def decode(self, embeds, cache, keep=1, *, extras=None):
            cache.lengths = np.minimum(cache.lengths, SHAPE.cache - 1)
            return sound.decode(embeds, cache, keep, extras=extras)

    gate = Gate()
    check_overfull(gate, Careless(), EMBEDS["short"], SHAPE.cache)
    (check,) = gate.checks
    assert check.status == "failed"
    assert "a token behind the 96 of a full cache was accepted (and 1 more)" in check.reason


def test_a_cache_of_another_length_than_the_manifest_says_fails(sound):
    for length in (SHAPE.cache - 1, SHAPE.cache + 1):
        gate = Gate()
        check_overfull(gate, sound, EMBEDS["short"], length)
        assert [c.status for c in gate.checks] == ["failed"]


def test_what_does_not_fit_is_not_run_and_never_passed(sound):
    gate = Gate()
    assert with_room(gate, EMBEDS, None) == EMBEDS
    assert list(with_room(gate, EMBEDS, 30)) == ["short"]
    assert [(c.name, c.status) for c in gate.checks] == [("decoder/prefill[wide]", "not_run")]
    assert "25 tokens and 16 of an answer do not fit the static cache of 30" in gate.checks[0].reason
    short = replace(LIMITS, capacity=68)
    check_lowering(gate, DecoderSubjects(sound, sound, sound, embedded), {"wide": EMBEDS["wide"]}, short)
    (steps,) = [c for c in gate.checks if c.name == "decoder/decode"]
    assert steps.status == "not_run"
    assert "no room for 64 steps behind a prompt of 25" in steps.reason


@pytest.mark.parametrize("probes", [("wide",), ("wide", "again")])
def test_where_all_prompts_are_equally_long_a_batch_is_padded_all_the_same(sound, probes):
    """As with ``--max-seq 40``, where one probe fits."""
    embeds = {name: EMBEDS["wide"] for name in probes}
    padded = []

    class Watched(Runner):
        def __init__(self, *, blind=False):
            self.decoder, self.blind = sound.decoder, blind

        def prefill(self, rows, mask, keep=1, **options):
            if len(mask) > 1:
                padded.append(mask.sum(axis=1).tolist())
                require_right_padding(mask)
                mask = np.ones_like(mask) if self.blind else mask
            return sound.prefill(rows, mask, keep, **options)

    for runner, red in ((Watched(), set()), (Watched(blind=True), {"decoder/ragged_batch", "decoder/exact_kl"})):
        gate = Gate()
        check_consistency(gate, runner, embeds, REL, left_pad=False)
        check_lowering(gate, DecoderSubjects(runner, sound, sound, embedded), embeds, LIMITS)
        assert padded and all(row == [12, 25] for row in padded if row != [25, 25])
        assert [12, 25] in padded
        assert {c.name for c in gate.checks if c.status == "failed"} == red
        assert {"decoder/padding_guard", "decoder/right_padding", "decoder/ragged_batch"} <= {
            c.name for c in gate.checks if c.status != "not_run"
        }


def test_a_padding_check_that_could_see_no_padding_is_not_run(sound):
    gate = Gate()
    one = {"one": EMBEDS["short"].tokens(0, 1)}
    check_lowering(gate, DecoderSubjects(sound, sound, sound, embedded), one, LIMITS)
    check_consistency(gate, sound, one, REL, left_pad=False)
    names = ("ragged_batch", "padding_guard", "right_padding")
    found = {c.name: c for c in gate.checks}
    assert {found[f"decoder/{name}"].status for name in names} == {"not_run"}
    assert "has no padding" in found["decoder/padding_guard"].reason


def test_questions_that_do_not_fit_are_left_out_and_named():
    items = [Item(*(ModelInputs(np.zeros((1, n), np.int64)),) * 2) for n in (10, 60)]
    gate = Gate()
    assert answerable(gate, items, 48, None) == items
    assert gate.checks == []
    assert answerable(gate, items, 48, 64) == items[:1]
    assert [(c.name, c.status) for c in gate.checks] == [("quantization/room", "not_run")]


# Signatures and operators, judged from the files.

MODEL = {
    "attention": "static",
    "hidden_size": SHAPE.hidden,
    "vocab_size": SHAPE.vocab,
    "kv": {"layers": SHAPE.layers, "heads": SHAPE.kv_heads, "head_dim": SHAPE.head_dim, "dtype": "float16"},
    "tensorrt": {"limits": {"max_batch": 1, "max_seq": SHAPE.cache, "max_images": 1}},
}


@pytest.fixture
def artifact(tmp_path):
    path = write_decoder(tmp_path, SHAPE)
    return write_manifest(
        tmp_path, Manifest("tensorrt", "tensorrt", {}, {}, MODEL, {}, {"decoder": part_of(path)}, (), ())
    )


def rewritten(artifact, change):
    """The artifact after `change` of its decoder's ModelProto, with a manifest that says what the graph does."""
    path = artifact.part_path("decoder")
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)
    return Artifact(artifact.path, replace(artifact.manifest, parts={"decoder": part_of(path)}))


def signature(artifact):
    gate = Gate()
    check_structure(gate, artifact, KV)
    return next(c for c in gate.checks if c.name == "decoder/signature")


def dialect(artifact):
    gate = Gate()
    check_dialect(gate, artifact)
    return gate.checks[-1]


def value(model, name):
    return next(v for v in (*model.graph.input, *model.graph.output) if v.name == name).type.tensor_type


def open_length(model):
    for side in ("past_key_values", "present"):
        value(model, f"{side}.1.value").shape.dim[2].dim_param = "length"


def other_length(model):
    value(model, "present.0.key").shape.dim[2].dim_value = SHAPE.cache + 1


def narrow_indices(model):
    value(model, "write_indices").elem_type = TensorProto.INT32


def half_logits(model):
    value(model, "logits").elem_type = TensorProto.FLOAT16


def mask_input(model):
    model.graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "n"]))


def lost_output(model):
    del model.graph.output[-1]


def test_the_sound_graph_has_the_form_of_the_contract(artifact):
    assert signature(artifact).status == dialect(artifact).status == "passed"
    assert capacity_of(artifact) == SHAPE.cache


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (open_length, "past_key_values.1.value is float16"),
        (other_length, "present.0.key is float16 ['batch_size', 2, 97, 16], expected"),
        (narrow_indices, "write_indices is int32"),
        (half_logits, "logits is float16"),
        (mask_input, "input attention_mask is none of this form"),
        (lost_output, "output present.1.value is missing"),
    ],
)
def test_another_form_is_a_fault_whatever_the_manifest_says(artifact, change, reason):
    check = signature(rewritten(artifact, change))
    assert check.status == "failed"
    assert reason in check.reason


def test_a_manifest_that_promises_another_length_is_a_fault(artifact):
    model = {**MODEL, "tensorrt": {"limits": {"max_batch": 1, "max_seq": 128, "max_images": 1}}}
    assert signature(Artifact(artifact.path, replace(artifact.manifest, model=model))).status == "failed"
    odd = Artifact(artifact.path, replace(artifact.manifest, model={**MODEL, "attention": "ring"}))
    assert "attention 'ring' is unknown; gqa, standard, static" in signature(odd).reason


def own_operator(model):
    model.graph.node[-1].domain = "com.microsoft"


def inner_operator(model):
    node = helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft")
    branch = helper.make_graph([node], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))


def function(model):
    opsets = [helper.make_opsetid("", 24)]
    model.functions.append(helper.make_function("own", "Twice", ["x"], ["y"], [], opsets))


def older(model):
    model.opset_import[0].version = load_target("tensorrt").onnx.opset - 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (own_operator, "is com.microsoft's"),
        (inner_operator, "FastGelu is com.microsoft's"),
        (function, "Twice is a function"),
        (older, "opset [23], expected 24"),
    ],
)
def test_what_is_not_standard_is_named(artifact, change, reason):
    check = dialect(rewritten(artifact, change))
    assert (check.status, check.part) == ("failed", "decoder")
    assert reason in check.reason
