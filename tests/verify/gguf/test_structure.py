"""What the files must hold, on stand-ins of files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vlmexport.gguf_options import GgufTensor
from vlmexport.verify.gates import Gate
from vlmexport.verify.gguf.files import StoredTensor
from vlmexport.verify.gguf.structure import check_accounted, check_architecture, check_tensors, complete

TEXT = {"llama.embedding_length": 256}
MMPROJ = {"clip.has_vision_encoder": True, "clip.vision.projection_dim": 256, "clip.projector_type": "idefics3"}


def file(name, arch, keys=None, tensors=()):
    return SimpleNamespace(
        path=SimpleNamespace(name=name), arch=arch, value=(keys or {}).get, tensors={t.name: t for t in tensors}
    )


def pair(text, mmproj):
    return SimpleNamespace(text=text, mmproj=mmproj, of=lambda half: text if half == "text" else mmproj)


def architecture(text, mmproj, arch="llama", projector="idefics3"):
    gate = Gate()
    readable = check_architecture(gate, pair(text, mmproj), arch, projector)
    return readable, gate.checks[0]


GOOD_TEXT, GOOD_MMPROJ = file("t.gguf", "llama", TEXT), file("m.gguf", "clip", MMPROJ)


@pytest.mark.parametrize(
    ("text", "mmproj", "readable", "reason"),
    [
        (GOOD_TEXT, GOOD_MMPROJ, True, ""),
        (GOOD_MMPROJ, GOOD_MMPROJ, False, "m.gguf is a vision half"),
        (GOOD_TEXT, GOOD_TEXT, False, "t.gguf is a model of 'llama', not a vision half"),
        (file("t.gguf", "qwen2", {"qwen2.embedding_length": 256}), GOOD_MMPROJ, True, "a model of 'qwen2', expected"),
        (GOOD_TEXT, file("m.gguf", "clip", {**MMPROJ, "clip.projector_type": "mlp"}), True, "a projector of 'mlp'"),
        (GOOD_TEXT, file("m.gguf", "clip", {**MMPROJ, "clip.has_vision_encoder": False}), True, "no vision encoder"),
        (file("t.gguf", "llama", {"llama.embedding_length": 512}), GOOD_MMPROJ, True, "halves of different models"),
    ],
)
def test_the_halves_are_what_they_should_be_and_fit(text, mmproj, readable, reason):
    found, check = architecture(text, mmproj)
    assert found is readable
    assert check.status == ("failed" if reason else "passed")
    assert reason in check.reason


def test_where_nobody_says_the_architecture_the_widths_are_judged():
    assert architecture(GOOD_TEXT, GOOD_MMPROJ, None, None)[1].status == "passed"


def stored(name, shape=(4, 32), kind="F16"):
    return StoredTensor(name, shape, kind, np.zeros((shape[0], 2), np.uint8))


PLAN = [
    GgufTensor("a.weight", "text", (4, 32), "F16", "", source="x.a.weight"),
    GgufTensor("v.conv", "mmproj", (1, 4, 32), "F16", "", source="x.conv"),
]


@pytest.mark.parametrize(
    ("tensors", "types", "reason"),
    [
        ([stored("a.weight")], True, ""),
        ([], True, "a.weight is missing (x.a.weight)"),
        ([stored("a.weight", (4, 64))], True, "a.weight has shape [4, 64], expected [4, 32]"),
        ([stored("a.weight", kind="Q8_0")], True, "a.weight is Q8_0, the plan says F16"),
        ([stored("a.weight", kind="Q8_0")], False, ""),
        ([stored("a.weight", kind="type 39")], False, "a.weight has ggml type 39, which is not known here"),
        ([stored("a.weight"), stored("b.weight")], False, "b.weight has no place in the model"),
    ],
)
def test_the_planned_tensors_and_no_others(tensors, types, reason):
    files = pair(file("t", "llama", tensors=tensors), file("m", "clip", tensors=[stored("v.conv")]))
    gate = Gate()
    check_tensors(gate, files, PLAN, types=types)
    text, mmproj = gate.checks
    assert mmproj.status == "passed"
    assert text.status == ("failed" if reason else "passed")
    assert text.reason == reason
    whole = not reason or "no place" in reason or "plan says" in reason
    assert complete(files, PLAN) is whole


@pytest.mark.parametrize(
    ("weights", "unused", "reason"),
    [
        (["x.a.weight", "x.conv", "head"], {"head": "tied"}, ""),
        (["x.a.weight", "x.conv", "head"], {}, "head is in no file and not listed as unused"),
        (["x.a.weight"], {}, "x.conv is no weight of the model"),
        (["x.a.weight", "x.conv"], {"x.conv": "why"}, "x.conv is used and listed as unused"),
        (["x.a.weight", "x.conv", "head"], {"head": ""}, "head is unused without a reason"),
    ],
)
def test_every_weight_is_accounted_for_once(weights, unused, reason):
    gate = Gate()
    check_accounted(gate, weights, PLAN, unused)
    assert gate.checks[0].reason == reason
    assert gate.checks[0].status == ("failed" if reason else "passed")


def test_a_weight_that_is_written_twice():
    gate = Gate()
    check_accounted(gate, ["x.a.weight", "x.conv"], [*PLAN, PLAN[0]], {})
    assert gate.checks[0].reason == "x.a.weight is written twice"
