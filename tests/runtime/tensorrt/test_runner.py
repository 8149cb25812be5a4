"""The runner on stand-ins for NVIDIA's module and a GPU's memory: its numbers are ONNX Runtime's. No GPU was used."""

import dataclasses

import numpy as np
import pytest

from tests.lower.tensorrt.graphs import TINY
from tests.runtime.tensorrt.exports import PLACE, static_export, write_engine
from tests.runtime.tensorrt.fakes import GPU, FakeDevice, IRuntimeCache, machine
from vlmexport.engines import MAX_KEPT, specs_of
from vlmexport.errors import ArtifactError, BadInputError, NotPossibleHereError
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.protocol import Cache, PartOutputError
from vlmexport.runtime.tensorrt.cuda import GpuStatus
from vlmexport.runtime.tensorrt.runner import TensorRtRunner, engine_places

LIMIT = 4e-3


@pytest.fixture(scope="module", params=["one engine", "two engines", "window"])
def artifact(request, tmp_path_factory):
    window = 8 if request.param == "window" else 0
    split = request.param == "two engines"
    return static_export(tmp_path_factory.mktemp("trt"), split_decoder=split, window=window)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return static_export(tmp_path_factory.mktemp("trt"))


@pytest.fixture
def runner(artifact):
    return TensorRtRunner(artifact, hardware=machine())


@pytest.fixture
def onnx_runner(artifact):
    return OnnxRunner(artifact, threads=1, exact=True, provider="CPUExecutionProvider")


def static_export_of(artifact, changed):
    """The name of a place that was built later, with `changed` in place of the manifest's engine of that name."""
    for spec in specs_of(artifact.manifest.model):
        write_engine(artifact, changed if spec.name == changed.name else spec, "a100-80")
    return "a100-80"


def prompt(*shape):
    return np.random.default_rng(sum(shape)).standard_normal((*shape, TINY.hidden)).astype(np.float32)


def ones(rows):
    return np.ones(rows.shape[:2], np.int64)


def close(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.abs(found - wanted).max() <= LIMIT * np.abs(wanted).max()


@pytest.mark.parametrize("keep", [0, 1, 3, 13, 30])
def test_prompt_logits_are_onnx_runtimes(runner, onnx_runner, keep):
    rows = prompt(1, 21)
    assert close(runner.prefill(rows, ones(rows), keep)[0], onnx_runner.prefill(rows, ones(rows), keep)[0])


@pytest.mark.parametrize("keep", [0, 1, 12])
def test_a_padded_batch_goes_on_behind_each_rows_own_tokens(runner, onnx_runner, keep):
    rows, later = prompt(3, 19), prompt(3, 4)
    mask = (np.arange(19) < np.array([19, 2, 11])[:, None]).astype(np.int64)
    results = []
    for each in (runner, onnx_runner):
        logits, cache = each.prefill(rows, mask, keep)
        logits = np.where(mask[:, :, None] == 1, logits, 0) if keep == 0 else logits
        steps = [each.decode(later[:, i : i + 1], cache) for i in range(2)]
        steps.append(each.decode(later[:, 2:], cache, 0))
        assert cache.lengths.tolist() == [23, 6, 15]
        results.append((logits, *steps))
    for found, wanted in zip(*results, strict=True):
        assert close(found, wanted)


def test_steps_to_the_last_slot_equal_one_prompt_and_no_further(runner):
    rows = prompt(1, TINY.cache)
    whole, _ = runner.prefill(rows, ones(rows), 0)
    logits, cache = runner.prefill(rows[:, :30], ones(rows[:, :30]))
    steps = [logits, *(runner.decode(rows[:, i : i + 1], cache) for i in range(30, TINY.cache))]
    assert close(np.concatenate(steps, axis=1), whole[:, 29:])
    with pytest.raises(BadInputError, match=f"1 tokens behind {TINY.cache} of them do not fit"):
        runner.decode(rows[:, :1], cache)
    assert cache.lengths.tolist() == [TINY.cache]


def test_two_caches_do_not_touch_each_other_and_are_given_back(artifact):
    device = FakeDevice()
    runner = TensorRtRunner(artifact, hardware=machine(device=device))
    a, b = prompt(1, 9), prompt(1, 12)
    alone = [runner.decode(a[:, :1], runner.prefill(rows, ones(rows))[1]) for rows in (a, b)]
    before = len(device.memory)
    caches = [runner.prefill(rows, ones(rows))[1] for rows in (a, b)]
    assert len(device.memory) == before + 2 * 2 * TINY.layers
    assert [close(runner.decode(a[:, :1], cache), w) for cache, w in zip(caches, alone, strict=True)] == [True, True]
    del caches
    assert len(device.memory) == before


def test_all_logits_of_a_prompt_are_asked_for_a_few_at_a_time_and_steps_have_a_profile_of_their_own(plain, monkeypatch):
    runner = TensorRtRunner(plain, hardware=machine())
    engine = runner._decoder._prefill.engine
    calls, run = [], engine.run

    def watched(inputs, profile, residents):
        calls.append((profile, *inputs["logits_positions"].shape))
        return run(inputs, profile, residents)

    monkeypatch.setattr(engine, "run", watched)
    rows = prompt(1, 20)
    _, cache = runner.prefill(rows, ones(rows), 0)
    assert calls == [(0, 1, MAX_KEPT), (0, 1, MAX_KEPT), (0, 1, 4)]
    calls.clear()
    runner.prefill(rows, ones(rows), 1)
    runner.decode(rows[:, :1], cache)
    assert calls == [(0, 1, 1), (1, 1, 1)]


def test_the_other_parts_are_onnx_runtimes(runner, onnx_runner):
    pixels = np.random.default_rng(0).standard_normal((1, 1, 3, 32, 32)).astype(np.float32)
    inputs = {"pixel_values": pixels, "pixel_attention_mask": np.ones((1, 1, 32, 32), np.int64)}
    assert close(runner.image_features(inputs), onnx_runner.image_features(inputs))
    padded = {"pixel_values": np.concatenate([pixels, np.zeros_like(pixels)], axis=1)}
    assert close(runner.vision(padded), onnx_runner.vision(inputs))
    ids = np.array([[3, 5, 7]])
    assert (runner.embed(ids) == onnx_runner.embed(ids)).all()
    assert (runner.merge_spec, runner.eos_token_ids) == (onnx_runner.merge_spec, onnx_runner.eos_token_ids)


def test_a_long_prompt_is_embedded_in_several_calls(artifact, onnx_runner):
    spec = next(s for s in specs_of(artifact.manifest.model) if s.name == "embed_tokens")
    (profile,) = spec.profiles
    short = dataclasses.replace(profile, shapes={"input_ids": ((1, 1), (1, 4), (3, 8))})
    later = static_export_of(artifact, dataclasses.replace(spec, profiles=(short,)))
    ids = np.arange(2 * 21).reshape(2, 21) % TINY.vocab
    assert (TensorRtRunner(artifact, later, hardware=machine()).embed(ids) == onnx_runner.embed(ids)).all()


def test_more_than_the_engines_were_built_for_is_refused(plain):
    runner = TensorRtRunner(plain, hardware=machine())
    with pytest.raises(BadInputError, match=r"a batch of 4 rows; the engine was built for 3 \(--max-batch\)"):
        runner.prefill(prompt(4, 2), ones(prompt(4, 2)))
    long = prompt(1, TINY.cache + 1)
    with pytest.raises(BadInputError, match=f"{TINY.cache + 1} tokens do not fit the static cache"):
        runner.prefill(long, ones(long))
    with pytest.raises(BadInputError, match=r"pixel_values has shape \[1, 5, 3, 32, 32\]; the engine was built for"):
        runner.vision({"pixel_values": np.ones((1, 5, 3, 32, 32), np.float32)})
    left = np.array([[0, 1, 1]])
    with pytest.raises(BadInputError, match="not right-padded"):
        runner.prefill(prompt(1, 3), left)
    with pytest.raises(BadInputError, match="not a cache of this runner"):
        runner.decode(prompt(1, 1), Cache(np.zeros(1, np.int64)))


def test_missing_inputs_and_a_full_gpu_name_the_part(plain):
    runner = TensorRtRunner(plain, hardware=machine())
    with pytest.raises(PartOutputError, match=r"vision_encoder: the engine needs the inputs \['pixel_values'\]"):
        runner.vision({})
    full = TensorRtRunner(plain, hardware=machine(device=FakeDevice(room=10_000)))
    with pytest.raises(PartOutputError, match=r"decoder: no room for a cache of \[1, 2, 48, 16\]: .*out of memory"):
        full.prefill(prompt(1, 3), ones(prompt(1, 3)))
    with pytest.raises(PartOutputError, match=r"vision_encoder: does not run: .*out of memory"):
        full.vision({"pixel_values": np.ones((1, 1, 3, 32, 32), np.float32)})


def test_compiled_kernels_are_kept_where_a_folder_is_given(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(IRuntimeCache, "read", [])
    for expected in ([], [b"kernels"]):
        runner = TensorRtRunner(plain, hardware=machine(), kernels=tmp_path / "kernels")
        runner.prefill(prompt(1, 3), ones(prompt(1, 3)))
        runner.close()
        assert IRuntimeCache.read == expected
    assert [p.name for p in (tmp_path / "kernels").iterdir()] == [f"{PLACE}-decoder.kernels"]


def test_all_engines_load_at_once(artifact):
    runner = TensorRtRunner(artifact, hardware=machine())
    assert runner.load() > 0
    assert runner._engines.keys() == {spec.name for spec in specs_of(artifact.manifest.model)}


def test_the_place_that_fits_the_gpu_is_taken(tmp_path):
    artifact = static_export(tmp_path / "export")
    for spec in specs_of(artifact.manifest.model):
        write_engine(artifact, spec, "sm86", compute_capability="8.6")
    assert engine_places(artifact) == ["sm80", "sm86"]
    assert TensorRtRunner(artifact, hardware=machine()).place == "sm80"
    assert TensorRtRunner(artifact, hardware=machine(GpuStatus("A10", "8.6", 1))).place == "sm86"
    with pytest.raises(NotPossibleHereError, match=r"sm80: .* built for 8.0 .*sm86: .* built for 8.6"):
        TensorRtRunner(artifact, hardware=machine(GpuStatus("H100", "9.0", 1)))
    with pytest.raises(ArtifactError, match=r"built for 8.6"):
        TensorRtRunner(artifact, "sm86", hardware=machine())


def test_engines_are_not_loaded_that_are_not_what_manifest_and_folder_say(tmp_path):
    artifact = static_export(tmp_path / "export")
    spec = next(s for s in specs_of(artifact.manifest.model) if s.name == "embed_tokens")
    shapes = {"input_ids": ((1, 1), (1, 8), (99, 48))}
    write_engine(artifact, dataclasses.replace(spec, profiles=(dataclasses.replace(spec.profiles[0], shapes=shapes),)))
    with pytest.raises(ArtifactError, match=r"^sm80/embed_tokens.engine takes input_ids .*\[99, 48\] in embed"):
        TensorRtRunner(artifact, "sm80", hardware=machine())
    write_engine(artifact, spec)
    (artifact.path / "engines" / "sm80").rename(artifact.path / "engines" / "sm86")
    with pytest.raises(ArtifactError, match=r"lies in sm86 and was built for 8.0"):
        TensorRtRunner(artifact, "sm86", hardware=machine())
    with pytest.raises(NotPossibleHereError, match=r"sm86: sm86/.* lies in sm86"):
        TensorRtRunner(artifact, hardware=machine())


def test_some_engines_of_a_place_serve_what_they_can(tmp_path):
    artifact = static_export(tmp_path / "export")
    runner = TensorRtRunner(artifact, PLACE, hardware=machine(), only={"embed_tokens"})
    assert runner.embed(np.array([[3, 5]])).shape == (1, 2, TINY.hidden)
    with pytest.raises(ArtifactError, match="there is no engine of projector in sm80"):
        runner.project(np.zeros((1, 16, 48), np.float32))
    with pytest.raises(ArtifactError, match="no engine of the decoder has the profile 'decode'"):
        runner.prefill(prompt(1, 3), ones(prompt(1, 3)))


def test_without_gpu_library_or_engines_the_reason_is_given(plain, tmp_path):
    with pytest.raises(NotPossibleHereError, match="cannot run its engines here: no driver"):
        TensorRtRunner(plain, hardware=machine(GpuStatus(reason="no driver")))
    with pytest.raises(NotPossibleHereError, match=r"pip install tensorrt-rtx==1\.7\.1\.116"):
        TensorRtRunner(plain, hardware=machine(version=""))
    with pytest.raises(NotPossibleHereError, match=r"Tensor.* 1\.8\.0"):
        TensorRtRunner(plain, hardware=machine(version="1.8.0"))
    bare = static_export(tmp_path / "bare", built=False)
    with pytest.raises(NotPossibleHereError, match=r"has no engines; run build_engines\.sh"):
        TensorRtRunner(bare, hardware=machine())
    assert machine().gpu is GPU


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"no_context": True}, "no execution context"),
        ({"factor": float("nan")}, "NaN or infinite"),
        ({"alias": {"present.0.key": "past_key_values.1.key"}}, "writes present.0.key into past_key_values.1.key"),
    ],
)
def test_an_engine_that_misbehaves_is_named(tmp_path, damage, words):
    artifact = static_export(tmp_path / "export")
    (spec,) = (s for s in specs_of(artifact.manifest.model) if s.part == "decoder")
    write_engine(artifact, spec, **damage)
    runner = TensorRtRunner(artifact, hardware=machine())
    with pytest.raises(PartOutputError, match=f"decoder: .*{words}"):
        runner.prefill(prompt(1, 3), ones(prompt(1, 3)))
