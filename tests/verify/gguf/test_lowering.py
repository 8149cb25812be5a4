"""Every check of the lowering is red for what it is there for; llama.cpp is a stand-in here."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.lowering import Expected, LoweringLimits, LoweringTotals, check_lowering, check_shipped

IMAGE, VOCAB, HIDDEN, TAIL = 9, 32, 8, 3
LIMITS = LoweringLimits(encoder_rel=1e-3, prepared_rel=1e-2, kl=1e-5, shipped_kl=1e-4)
RNG = np.random.default_rng(0)


def subject(name="square", rows=4):
    ids = np.array([1, *([IMAGE] * rows), 2, 3, 4])
    llama = SimpleNamespace(name=name, ids=np.where(ids == IMAGE, -1, ids), tail=(2, 3, 4), image_tokens=rows)
    pair = SimpleNamespace(name=name, reference=SimpleNamespace(ids=ids), llama=llama)
    logits = RNG.standard_normal((TAIL + 4, VOCAB)).astype(np.float32)
    features = RNG.standard_normal((rows, HIDDEN)).astype(np.float32) if rows else None
    return Expected(pair, features, [int(i) for i in logits[TAIL - 1 :].argmax(-1)], logits)


class Stand:
    """What llama.cpp would say, with `change` to its logits, embeddings (by probe) or answer."""

    def __init__(self, subjects, *, logits=0.0, embeddings=None, answer=None):
        self.known = {s.pair.name: s for s in subjects}
        self.noise, self.changes, self.answer = logits, embeddings or {}, answer

    def _logits(self, prompt):
        wanted = self.known[prompt.name].logits
        return wanted + np.float32(self.noise) * np.random.default_rng(1).standard_normal(wanted.shape, np.float32)

    def image_embeddings(self, prompt):
        features = self.known[prompt.name].features
        deep = np.concatenate([features, features], axis=1)  # deepstack rows follow what enters below
        return deep * np.float32(1 + self.changes.get(prompt.name, 1e-5))

    def prompt_logits(self, prompt):
        return self._logits(prompt)[:TAIL]

    def forced(self, prompt, answer):
        return self._logits(prompt)[TAIL - 1 :]

    def reserve(self, tokens):
        pass

    def greedy(self, prompt, limit):
        return self.answer or self.known[prompt.name].answer


def judged(runner, subjects):
    gate = Gate()
    totals = check_lowering(gate, runner, subjects, LIMITS, IMAGE)
    check_shipped(gate, runner, subjects, LIMITS, totals)
    return {c.name: c for c in gate.checks}, totals


@pytest.fixture
def subjects():
    return [subject("square"), subject("wide", 6), subject("text", 0)]


def test_what_agrees_passes(subjects):
    found, totals = judged(Stand(subjects, logits=1e-4), subjects)
    assert {c.status for c in found.values()} == {"passed"}
    assert set(found) == {
        "vision_encoder/image_embeddings[square]", "vision_encoder/image_embeddings[wide]", "vision_encoder/encoder",
        "processor/pictures", "decoder/logits[square]", "decoder/logits[wide]", "decoder/logits[text]",
        "decoder/greedy", "decoder/shipped_kl",
    }  # fmt: skip
    summary = totals.summary()
    assert 0 < summary.max_abs_logit < 1e-3
    assert summary.top1 == 1.0
    assert 0 < summary.kl < 1e-6


def test_other_logits_fail(subjects):
    found, _ = judged(Stand(subjects, logits=0.1), subjects)
    assert {n for n, c in found.items() if c.status == "failed"} == {
        "decoder/logits[square]", "decoder/logits[wide]", "decoder/logits[text]", "decoder/shipped_kl"
    }  # fmt: skip


def test_logits_that_are_not_finite_fail(subjects):
    found, _ = judged(Stand(subjects, logits=np.nan), subjects)
    assert "values are NaN or infinite" in found["decoder/logits[text]"].reason
    assert found["decoder/shipped_kl"].status == "failed"


def test_an_encoder_that_differs_everywhere_is_the_encoders_fault(subjects):
    found, _ = judged(Stand(subjects, embeddings={"square": 0.1, "wide": 0.05}), subjects)
    assert found["vision_encoder/encoder"].status == "failed"
    assert found["processor/pictures"].status == "not_run"
    assert found["vision_encoder/image_embeddings[wide]"].status == "failed"


def test_a_picture_that_alone_differs_was_prepared_in_another_way(subjects):
    found, _ = judged(Stand(subjects, embeddings={"wide": 0.5}), subjects)
    assert found["vision_encoder/encoder"].status == "passed"
    check = found["processor/pictures"]
    assert check.status == "failed"
    assert check.reason.startswith("wide: llama.cpp prepares this picture in another way")


def test_a_greedy_answer_may_part_at_a_tie_only(subjects):
    one = [subjects[0]]
    row = one[0].logits[TAIL - 1]
    other = int(row.argsort()[-2])
    found, _ = judged(Stand(one, answer=[other, *one[0].answer[1:]]), one)
    assert found["decoder/greedy"].status == "failed"
    assert f"square: token 0 is {other}" in found["decoder/greedy"].reason
    row[other] = row.max() - 1e-6
    found, _ = judged(Stand(one, logits=1e-4, answer=[other, *one[0].answer[1:]]), one)
    assert found["decoder/greedy"].status == "passed"
    found, _ = judged(Stand(one, answer=one[0].answer[:2]), one)
    assert "it ends after 2 tokens" in found["decoder/greedy"].reason


def test_nothing_measured_is_no_summary():
    assert LoweringTotals().summary().max_abs_logit is None
