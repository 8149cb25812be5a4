"""The gate's view of engines, on stand-ins for a GPU: what turns red, and what is only "not run". No GPU was used."""

import dataclasses
import json

import numpy as np
import pytest

from tests.lower.tensorrt.graphs import TINY
from tests.runtime.tensorrt.exports import PLACE, static_export, write_engine
from tests.runtime.tensorrt.fakes import machine
from vlmexport.engines import ENGINES_FOLDER, engine_path, sidecar_path, specs_of
from vlmexport.errors import BadInputError
from vlmexport.manifest import Artifact, file_sha256
from vlmexport.runtime.decoder_inputs import DecoderInputs
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.tensorrt.cuda import GpuStatus
from vlmexport.verify import engines
from vlmexport.verify.engines import check_engines
from vlmexport.verify.gates import Gate

NO_GPU = machine(GpuStatus(reason="there is no NVIDIA GPU driver here"))
NAMES = ("decoder", "embed_tokens", "projector", "vision_encoder")


def rows(tokens):
    drawn = np.random.default_rng(tokens).standard_normal((1, tokens, TINY.hidden))
    return DecoderInputs(drawn.astype(np.float16).astype(np.float32))


EMBEDS = {"square": rows(20), "text": rows(7)}


@pytest.fixture
def artifact(tmp_path):
    return static_export(tmp_path / "export")


@pytest.fixture(autouse=True)
def one_picture(monkeypatch):
    pixels = np.random.default_rng(1).standard_normal((1, 1, 3, 32, 32)).astype(np.float32)
    inputs = ModelInputs(np.array([[3, 7, 7, 5]]), {"pixel_values": pixels})
    monkeypatch.setattr(engines, "probe_inputs", lambda artifact: inputs)


def judged(artifact, hardware=NO_GPU, embeds=EMBEDS):
    gate = Gate()
    check_engines(gate, artifact, embeds, hardware=hardware)
    names = [c.name for c in gate.checks]
    assert len(names) == len(set(names))
    return {c.name: c for c in gate.checks}


def statuses(checks):
    return {name: check.status for name, check in checks.items()}


def engine(artifact, name="decoder"):
    return engine_path(artifact.path, PLACE, name)


def spec_of(artifact, name="decoder"):
    return next(s for s in specs_of(artifact.manifest.model) if s.name == name)


def changed_model(artifact, **built):
    model = json.loads(json.dumps(artifact.manifest.model))
    model["tensorrt"]["built"].update(built)
    return Artifact(artifact.path, dataclasses.replace(artifact.manifest, model=model))


def test_without_a_gpu_the_files_are_judged_and_nothing_is_said_to_have_run(artifact):
    checks = judged(artifact)
    sidecars = {f"engines/sidecar[{PLACE}/{name}]": "passed" for name in NAMES}
    assert statuses(checks) == {"engines/listed": "passed", **sidecars, "engines/run[sm80]": "not_run"}
    reason = checks["engines/run[sm80]"].reason
    assert reason == (
        "there is no NVIDIA GPU driver here; to run them, copy the folder to a machine with a GPU of compute "
        "capability 8.0 (a100-80) and TensorRT for RTX 1.7.1.116, and run `vlmexport verify DIR` there"
    )


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        (machine(GpuStatus("H100", "9.0", 1)), "built for 8.0"),
        (machine(version=""), "pip install tensorrt-rtx==1.7.1.116"),
        (machine(version="1.8.0"), "1.8.0"),
    ],
)
def test_a_machine_that_does_not_fit_runs_nothing(artifact, hardware, words):
    check = judged(artifact, hardware)["engines/run[sm80]"]
    assert check.status == "not_run"
    assert words in check.reason


def test_a_gpu_that_fits_judges_every_engine_against_onnx_runtime(artifact):
    checks = judged(artifact, machine())
    made = {
        *(
            f"engines/{part}[sm80]"
            for part in ("vision_encoder", "projector", "embed_tokens", "decode", "ragged_batch")
        ),
        *(f"engines/prefill[sm80/{probe}]" for probe in EMBEDS),
        "engines/run[sm80]",
    }
    assert made <= checks.keys()
    assert set(statuses(checks).values()) == {"passed"}
    assert checks["engines/decode[sm80]"].limit == pytest.approx(4e-3)


@pytest.mark.parametrize(
    ("name", "red"),
    [
        ("decoder", {"prefill[sm80/square]", "prefill[sm80/text]", "decode[sm80]", "ragged_batch[sm80]"}),
        ("vision_encoder", {"vision_encoder[sm80]"}),
        ("projector", {"projector[sm80]"}),
        ("embed_tokens", {"embed_tokens[sm80]"}),
    ],
)
def test_wrong_numbers_of_one_engine_turn_its_checks_red(artifact, name, red):
    write_engine(artifact, spec_of(artifact, name), factor=1.01)
    checks = judged(artifact, machine())
    failed = {n for n, status in statuses(checks).items() if status == "failed"}
    assert failed == {f"engines/{n}" for n in (*red, "run[sm80]")}
    assert "failed" in checks["engines/run[sm80]"].reason


@pytest.mark.parametrize(
    ("where", "red"),
    [
        ({"wrong_profile": 1}, {"decode[sm80]", "ragged_batch[sm80]"}),
        ({"wrong_rows": 2}, {"ragged_batch[sm80]"}),
    ],
)
def test_wrong_steps_and_wrong_batches_have_checks_of_their_own(artifact, where, red):
    write_engine(artifact, spec_of(artifact), factor=1.01, **where)
    failed = {name for name, status in statuses(judged(artifact, machine())).items() if status == "failed"}
    assert failed == {f"engines/{name}" for name in (*red, "run[sm80]")}


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_turn_red(artifact, factor):
    write_engine(artifact, spec_of(artifact), factor=factor)
    checks = judged(artifact, machine())
    assert checks["engines/run[sm80]"].status == "failed"
    assert checks["engines/decode[sm80]"].status == "failed"


def test_an_engine_that_does_not_load_turns_red(artifact):
    path = engine(artifact, "projector")
    path.write_bytes(b"garbage, though its sidecar is right")
    said = json.loads(sidecar_path(path).read_text())
    said |= {"engine": file_sha256(path), "bytes": path.stat().st_size}
    sidecar_path(path).write_text(json.dumps(said))
    checks = judged(artifact, machine())
    assert checks["engines/projector[sm80]"].status == "failed"
    assert "does not load" in checks["engines/projector[sm80]"].reason
    assert checks["engines/run[sm80]"].status == "failed"


def damage_bytes(artifact):
    path = engine(artifact)
    path.write_bytes(path.read_bytes()[:-1] + b" ")


def damage_graph(artifact):
    data = artifact.path / "decoder.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x7f")


def drop_sidecar(artifact):
    sidecar_path(engine(artifact)).unlink()


def other_version(artifact):
    write_engine(artifact, spec_of(artifact), version="1.8.0")


def other_name(artifact):
    write_engine(artifact, dataclasses.replace(spec_of(artifact), profiles=spec_of(artifact).profiles[::-1]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_bytes, "changed after it was built"),
        (damage_graph, "built from another decoder.onnx"),
        (drop_sidecar, "no sidecar"),
        (other_version, "was built by rtx 1.8.0, the others of sm80 by rtx 1.7.1.116"),
        (other_name, r"has the profiles ['decode', 'prefill']"),
    ],
)
@pytest.mark.parametrize("hardware", [NO_GPU, machine()])
def test_files_that_are_not_what_they_say_turn_red_and_are_not_loaded(artifact, damage, words, hardware):
    damage(artifact)
    checks = judged(artifact, hardware)
    assert [n for n, s in statuses(checks).items() if s == "failed"] == ["engines/sidecar[sm80/decoder]"]
    assert words in checks["engines/sidecar[sm80/decoder]"].reason
    assert checks["engines/run[sm80]"].status == "not_run"
    assert "nothing was loaded" in checks["engines/run[sm80]"].reason


def test_an_engine_that_was_listed_and_is_missing_turns_red(artifact):
    engine(artifact).unlink()
    checks = judged(artifact)
    assert checks["engines/listed"].status == "failed"
    assert checks["engines/listed"].reason == "engines/sm80/decoder.engine is missing"
    assert checks["engines/sidecar[sm80/decoder]"].status == "failed"
    for name in NAMES[1:]:
        engine(artifact, name).unlink()
    checks = judged(artifact)
    assert statuses(checks) == {"engines/listed": "failed", "engines/run": "not_run"}
    assert checks["engines/run"].reason.startswith("the engines that the manifest lists are gone; run")


def test_an_engine_that_nothing_lists_turns_red(artifact):
    (artifact.path / ENGINES_FOLDER / PLACE / "other.engine").write_bytes(b"?")
    checks = judged(artifact)
    assert checks["engines/sidecar[sm80/other]"].reason == "sm80/other is none of the engines that the manifest lists"


def test_engines_built_later_by_the_script_may_be_of_another_version(artifact):
    for spec in specs_of(artifact.manifest.model):
        write_engine(artifact, spec, "sm86", version="11.4.0.106", compute_capability="8.6")
        write_engine(artifact, spec, version="1.8.0")
    checks = judged(artifact)
    sidecars = {f"engines/sidecar[{place}/{name}]" for place in ("sm80", "sm86") for name in NAMES}
    assert {checks[name].status for name in sidecars} == {"passed"}
    assert checks["engines/run[sm86]"].status == "not_run"


def other_shapes(artifact, place=PLACE):
    spec = spec_of(artifact)
    decode = spec.profiles[1]
    low, usual, high = decode.shapes["inputs_embeds"]
    shapes = {**decode.shapes, "inputs_embeds": (low, usual, (99, *high[1:]))}
    changed = dataclasses.replace(spec, profiles=(spec.profiles[0], dataclasses.replace(decode, shapes=shapes)))
    write_engine(artifact, changed, place)


@pytest.mark.parametrize("hardware", [NO_GPU, machine()])
def test_other_shapes_than_the_manifests_turn_red_in_a_place_that_it_lists(artifact, hardware):
    other_shapes(artifact)
    checks = judged(artifact, hardware)
    assert [n for n, s in statuses(checks).items() if s == "failed"] == ["engines/sidecar[sm80/decoder]"]
    assert "[99, 1, 64] in decode; the manifest has" in checks["engines/sidecar[sm80/decoder]"].reason
    assert "nothing was loaded" in checks["engines/run[sm80]"].reason


def test_a_folder_with_another_name_than_its_engines_were_built_for_turns_red(artifact):
    folder = artifact.path / ENGINES_FOLDER
    (folder / PLACE).rename(folder / "sm86")
    later = changed_model(artifact, places=["sm86"])
    checks = judged(later, machine())
    assert {checks[f"engines/sidecar[sm86/{name}]"].status for name in NAMES} == {"failed"}
    assert "lies in sm86 and was built for 8.0 (a100-80)" in checks["engines/sidecar[sm86/decoder]"].reason
    assert checks["engines/run[sm86]"].status == "not_run"


def only_some(artifact, *names):
    """A place that the manifest does not list, in which a script built no more than `names`."""
    for name in names:
        write_engine(artifact, spec_of(artifact, name), "a100-80")


def test_what_a_script_left_out_is_not_run_and_the_others_are_judged(artifact):
    only_some(artifact, "decoder")
    checks = {n: c for n, c in judged(artifact, machine()).items() if "a100-80" in n}
    missing = {f"engines/sidecar[a100-80/{name}]" for name in NAMES[1:]}
    missing |= {f"engines/{part}[a100-80]" for part in NAMES[1:]}
    assert {n for n, c in checks.items() if c.status == "not_run"} == {*missing, "engines/run[a100-80]"}
    assert all("was not built; run build_engines.sh" in checks[n].reason for n in missing)
    assert checks["engines/sidecar[a100-80/decoder]"].status == "passed"
    assert checks["engines/prefill[a100-80/text]"].status == checks["engines/decode[a100-80]"].status == "passed"
    assert judged(artifact)["engines/run[a100-80]"].reason.startswith("there is no NVIDIA GPU driver here; to run them")


def test_one_wrong_engine_of_a_script_turns_red(artifact):
    write_engine(artifact, spec_of(artifact, "embed_tokens"), "a100-80", factor=1.01)
    checks = judged(artifact, machine())
    failed = {name for name, status in statuses(checks).items() if status == "failed"}
    assert failed == {"engines/embed_tokens[a100-80]", "engines/run[a100-80]"}
    assert checks["engines/decode[a100-80]"].status == "not_run"


def test_a_batch_of_one_prompt_is_padded_all_the_same(artifact):
    assert set(statuses(judged(artifact, machine(), {"text": rows(TINY.cache)})).values()) == {"passed"}
    write_engine(artifact, spec_of(artifact), factor=1.01, wrong_rows=2)
    seen = judged(artifact, machine(), {"text": rows(TINY.cache)})
    failed = {name for name, status in statuses(seen).items() if status == "failed"}
    assert failed == {"engines/ragged_batch[sm80]", "engines/run[sm80]"}


def test_an_export_without_engines_says_why_and_what_builds_them(tmp_path):
    checks = judged(static_export(tmp_path / "bare", built=False))
    assert statuses(checks) == {"engines/run": "not_run"}
    reason = checks["engines/run"].reason
    assert reason.startswith("no engine was built: TensorRT for RTX builds nothing for h100; run build_engines.sh")


def test_a_manifest_without_what_was_built_turns_red(artifact):
    bad = changed_model(artifact)
    del bad.manifest.model["tensorrt"]["built"]["places"]
    check = judged(bad)["engines/listed"]
    assert (check.status, "lacks 'places'" in check.reason) == ("failed", True)
    del bad.manifest.model["tensorrt"]["built"]
    check = judged(bad)["engines/listed"]
    assert check.status == "failed"
    assert "ArtifactError: the manifest's model.tensorrt lacks 'built'" in check.reason


def test_what_the_engines_were_not_built_for_is_not_run(artifact, monkeypatch):
    checks = judged(artifact, machine(), {**EMBEDS, "long": rows(TINY.cache + 1)})
    assert checks["engines/prefill[sm80/long]"].status == "not_run"
    assert checks["engines/run[sm80]"].status == "not_run"
    assert "prefill[sm80/long] was not run: 49 tokens do not fit" in checks["engines/run[sm80]"].reason
    assert judged(artifact, machine(), {})["engines/decode[sm80]"].status == "not_run"
    five = ModelInputs(np.array([[3]]), {"pixel_values": np.ones((1, 5, 3, 32, 32), np.float32)})
    monkeypatch.setattr(engines, "probe_inputs", lambda artifact: five)
    assert "the engine was built for" in judged(artifact, machine())["engines/vision_encoder[sm80]"].reason


def test_a_processor_that_does_not_load_leaves_the_picture_parts_not_run(artifact, monkeypatch):
    def refuse(artifact):
        raise BadInputError("the processor does not load")

    monkeypatch.setattr(engines, "probe_inputs", refuse)
    checks = judged(artifact, machine())
    assert {checks[f"engines/{part}[sm80]"].status for part in NAMES[1:]} == {"not_run"}
    assert checks["engines/decode[sm80]"].status == "passed"
    assert checks["engines/run[sm80]"].status == "not_run"
