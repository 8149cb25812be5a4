"""The decoder's comparisons with PyTorch on both sides: equal is green, and each planted fault turns its check red."""

import numpy as np
import pytest
import torch

from vlmexport.model.load import load_vlm
from vlmexport.runtime.decoder_inputs import DecoderInputs, stacked, token_inputs
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import ModelInputs, PartOutputError, require_right_padding
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.target import load_target
from vlmexport.verify.decoder import DecoderLimits, DecoderSubjects, check_consistency, check_lowering
from vlmexport.verify.gates import Gate
from vlmexport.verify.inputs import standard_probes
from vlmexport.verify.parts import Prompt, check_embedding, check_merged, check_processor, check_vision, merged_input
from vlmexport.verify.quantization import Item, collect_answers, greedy_answers, judge_quantization

LIMITS = DecoderLimits(exact_rel=1e-5, shipped_kl=1e-2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than these sizes need."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runner(tiny_idefics3):
    vlm = load_vlm(str(tiny_idefics3))
    return TorchRunner(vlm, split_model(vlm))


@pytest.fixture(scope="module")
def prompts(tiny_idefics3):
    builder = PromptBuilder(tiny_idefics3)
    inputs = {p.name: builder.build(p.images, p.text) for p in standard_probes()}
    return [Prompt(name, found, found) for name, found in inputs.items()]


@pytest.fixture(scope="module")
def embeds(runner, prompts):
    return {p.name: merged_input(runner, p.exported) for p in prompts}


class Broken:
    """The runner with one method replaced."""

    def __init__(self, runner, **methods):
        self._runner = runner
        for name, method in methods.items():
            setattr(self, name, method)

    def __getattr__(self, name):
        return getattr(self._runner, name)


def lowering(gate, runner, embeds, *, exact=None, shipped=None):
    subjects = DecoderSubjects(exact or runner, shipped or runner, runner, lambda ids: token_inputs(runner, ids))
    return check_lowering(gate, subjects, embeds, LIMITS)


def failed(gate):
    return {c.name for c in gate.checks if c.status == "failed"}


def test_the_reference_against_itself_is_green(runner, embeds):
    gate = Gate()
    totals = lowering(gate, runner, embeds)
    check_consistency(gate, runner, embeds, 1e-5, left_pad=True)
    assert failed(gate) == set()
    assert {"decoder/prefill[wide]", "decoder/one_token", "decoder/ragged_batch", "decoder/cache"} <= {
        c.name for c in gate.checks
    }
    assert len(gate.series["decode_exact_rel"]) == 17
    assert totals.max_abs_logit < 1e-5
    assert totals.top1() == 1.0


def test_a_small_error_at_one_position_is_seen(runner, embeds):
    def prefill(*args, **kwargs):
        logits, cache = runner.prefill(*args, **kwargs)
        logits = logits.copy()
        logits[0, 0, 3] += 1e-3
        return logits, cache

    gate = Gate()
    lowering(gate, runner, embeds, exact=Broken(runner, prefill=prefill))
    assert "decoder/prefill[wide]" in failed(gate)


def test_a_decoder_that_forgets_its_cache_fails_with_and_without_reference(runner, embeds):
    def decode(inputs_embeds, cache, keep=1, **kwargs):
        fresh, _ = runner.prefill(inputs_embeds, np.ones(inputs_embeds.shape[:2], np.int64), keep)
        return fresh

    gate = Gate()
    broken = Broken(runner, decode=decode)
    lowering(gate, runner, embeds, exact=broken)
    check_consistency(gate, broken, embeds, 1e-5, left_pad=True)
    assert {"decoder/decode", "decoder/ragged_batch", "decoder/cache"} <= failed(gate)
    assert "decoder/prefill[wide]" not in failed(gate)


def test_attention_to_padding_is_seen(runner, embeds):
    def prefill(inputs_embeds, attention_mask, keep=1, **kwargs):
        return runner.prefill(inputs_embeds, np.ones_like(attention_mask), keep, **kwargs)

    gate = Gate()
    broken = Broken(runner, prefill=prefill)
    lowering(gate, runner, embeds, exact=broken)
    assert failed(gate) == {"decoder/ragged_batch", "decoder/greedy"}


def test_last_logits_that_are_not_the_last_row(runner, embeds):
    def prefill(inputs_embeds, attention_mask, keep=1, **kwargs):
        logits, cache = runner.prefill(inputs_embeds, attention_mask, 0, **kwargs)
        return (logits if keep == 0 else logits[:, :1]), cache

    gate = Gate()
    check_consistency(gate, Broken(runner, prefill=prefill), embeds, 1e-5, left_pad=True)
    assert failed(gate) == {"decoder/keep_last"}


def test_left_padding_that_a_right_padded_graph_would_answer_wrongly_must_be_refused(runner, embeds):
    def prefill(inputs_embeds, attention_mask, keep=1, **kwargs):
        require_right_padding(attention_mask)
        return runner.prefill(inputs_embeds, attention_mask, keep, **kwargs)

    careless, careful = Gate(), Gate()
    check_consistency(careless, runner, embeds, 1e-5, left_pad=False)
    check_consistency(careful, Broken(runner, prefill=prefill), embeds, 1e-5, left_pad=False)
    assert failed(careless) == {"decoder/padding_guard"}
    assert failed(careful) == set()


def test_a_part_that_does_not_run_is_named(runner, embeds):
    def prefill(*args, **kwargs):
        raise PartOutputError("decoder", "logits have 3 of 9 values that are NaN")

    gate = Gate()
    lowering(gate, runner, embeds, exact=Broken(runner, prefill=prefill))
    check = next(c for c in gate.checks if c.name == "decoder/prefill[wide]")
    assert (check.status, check.part) == ("failed", "decoder")
    assert "NaN" in check.reason


def test_a_shipped_graph_that_differs_fails_its_own_limit_only(runner, embeds):
    def prefill(*args, **kwargs):
        logits, cache = runner.prefill(*args, **kwargs)
        return logits * 0.5, cache

    gate = Gate()
    totals = lowering(gate, runner, embeds, shipped=Broken(runner, prefill=prefill))
    assert failed(gate) == {"decoder/shipped_kl"}
    assert totals.max_abs_logit < 1e-5


def test_the_parts_before_the_decoder(runner, prompts, embeds):
    limits = load_target("cpu").parity
    gate = Gate()
    check_processor(gate, prompts)
    check_vision(gate, prompts, runner, runner, limits)
    check_embedding(gate, runner, runner, 448, prompts, limits)
    check_merged(gate, prompts, runner, embeds, limits)
    assert failed(gate) == set()
    assert {c.part for c in gate.checks} == {"processor", "vision_encoder", "projector", "embed_tokens", "model"}


@pytest.mark.parametrize(
    ("method", "check"),
    [
        ("vision", "vision_encoder/features[wide]"),
        ("project", "projector/features[wide]"),
        ("embed", "embed_tokens/table"),
    ],
)
def test_a_wrong_part_is_the_one_that_fails(runner, prompts, method, check):
    limits = load_target("cpu").parity
    broken = Broken(runner, **{method: lambda inputs: getattr(runner, method)(inputs) * 1.01})
    gate = Gate()
    check_vision(gate, prompts, broken, runner, limits)
    check_embedding(gate, broken, runner, 448, prompts, limits)
    assert check in failed(gate)
    assert {name.split("/")[0] for name in failed(gate)} == {check.split("/")[0]}


def doubled(arrays):
    return {name: array * 2 for name, array in arrays.items()}


def test_other_pixels_fail_the_processor(prompts):
    changed = [
        Prompt(p.name, ModelInputs(p.exported.input_ids, doubled(p.exported.pixel_inputs)), p.reference)
        for p in prompts
    ]
    gate = Gate()
    check_processor(gate, changed)
    assert failed(gate) == {"processor/pixels"}


def test_quantization_of_the_model_against_itself_is_free(runner, prompts):
    items = [Item(p.exported, p.reference, ("x",), "made up") for p in prompts]
    found = collect_answers(runner, runner, items, lambda tokens: "x", 6, 448)
    gate = Gate()
    summary = judge_quantization(gate, found, load_target("cpu").parity)
    assert failed(gate) == set()
    assert summary.kl == pytest.approx(0.0, abs=1e-9)
    assert (summary.top1, summary.perplexity_ratio) == (1.0, pytest.approx(1.0))
    assert (summary.accuracy, summary.reference_accuracy) == (1.0, 1.0)
    (task,) = found.tasks()
    assert (task.task, task.questions) == ("made up", 5)


def test_a_worse_model_fails_every_quantization_check(runner, prompts):
    other = Broken(runner, embed=lambda ids: runner.embed((ids * 7 + 3) % 400))
    items = [Item(p.exported, p.reference, ("right",), "t") for p in prompts[-1:]]
    right = greedy_answers(runner, [merged_input(runner, items[0].reference)], 6)[0]
    found = collect_answers(runner, other, items, lambda tokens: "right" if tokens == right else "wrong", 6, 448)
    gate = Gate()
    judge_quantization(gate, found, load_target("cpu").parity)
    assert {"quantization/kl", "quantization/top1", "quantization/accuracy"} <= failed(gate)


def test_batched_answers_equal_single_ones(runner, embeds):
    rows = list(embeds.values())
    together = greedy_answers(runner, rows, 5)
    assert together == [greedy_answers(runner, [row], 5)[0] for row in rows]


def test_padding_keeps_every_row():
    rows = [DecoderInputs(np.ones((1, 2, 3), np.float32)), DecoderInputs(np.full((1, 4, 3), 2.0, np.float32))]
    padded, mask = stacked(rows)
    assert padded.embeds.shape == (2, 4, 3)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert (padded.embeds[0] == 1).all()
