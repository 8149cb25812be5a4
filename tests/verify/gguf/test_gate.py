"""The gate on real exports of the bundled model: sound ones are green, every kind of damage is red by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.importers.encoders import make_gptq
from tests.verify.gguf import mutate
from vlmexport import demo, gguf_pipeline
from vlmexport.cli.main import run as main
from vlmexport.demo.variants import make_outlier_variant
from vlmexport.errors import ArtifactError, BadInputError, NotPossibleHereError
from vlmexport.gguf_options import GgufOptions
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.verify.gguf import run
from vlmexport.verify.gguf.reference import FullReference
from vlmexport.verify.gguf.run import verify_gguf
from vlmexport.verify.run import verify_artifact, verify_files

pytestmark = pytest.mark.slow


def write(model, out, **options):
    """An export that is not yet judged."""
    asked = GgufOptions(**{"imatrix": "none", **options})
    gguf_pipeline.export_gguf(str(model), out, asked, force=False, verify=False, progress=SilentProgress())
    return out


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf-gate")


@pytest.fixture(scope="module")
def q4_k_m(folder):
    return write("demo", folder / "q4_k_m", quant="Q4_K_M")


@pytest.fixture(scope="module")
def codes(folder):
    scheme = QuantScheme(bits=4, group_size=32, symmetric=False, scale_bits=7)
    return write("demo", folder / "codes", quant="Q4_1", scheme=scheme)


def questions(file, step):
    """Every `step`-th question of the bundled model, as a user's own file."""
    rows = [
        {"image": str(q.image), "question": q.question, "answers": list(q.answers), "task": q.task}
        for q in demo.frozen_questions()[::step]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def few(folder):
    """Three questions: damage shows before any answer."""
    return questions(folder / "few.jsonl", 500)


def failures(report):
    return {c.name: c for c in report.failures()}


def test_a_sound_k_quant_passes(q4_k_m, few):
    report = verify_artifact(q4_k_m, samples=few)
    assert report.status == "passed", [(c.name, c.reason) for c in report.checks if c.status != "passed"]
    assert report.not_run() == ()
    assert 0 < report.lowering.kl < 1e-2
    assert report.quantization.accuracy == 1.0
    names = {c.name.partition("[")[0] for c in report.checks}
    assert names >= {
        "gguf/architecture", "gguf/tensors", "gguf/accounted", "gguf/values", "gguf/pairing", "model/source",
        "tokenizer/image_tokens", "tokenizer/ids", "gguf/chat_template", "processor/prompt_ids", "gguf/image_splitting",
        "vision_encoder/image_embeddings", "vision_encoder/encoder", "decoder/logits", "decoder/greedy",
        "decoder/shipped_kl", "quantization/kl", "quantization/top1", "quantization/perplexity_ratio",
        "quantization/accuracy",
    }  # fmt: skip


def test_sound_codes_pass_and_have_a_check_of_their_own(codes, few):
    report = verify_artifact(codes, samples=few)
    assert report.status == "passed", failures(report)
    assert "codes/all" in {c.name for c in report.checks}


@pytest.fixture
def no_llama_cpp(monkeypatch):
    def missing(*_args, **_options):
        raise NotPossibleHereError("llama.cpp is not here; pip install 'vlmexport[gguf]'")

    monkeypatch.setattr(run, "LlamaCppRunner", missing)


@pytest.mark.parametrize(
    ("damage", "part", "check", "reason"),
    [
        (mutate.doubled_scale, "decoder", "gguf/values[text]", "blk.1.attn_output.weight: relative RMS error"),
        (mutate.swapped_layers, "decoder", "gguf/values[text]", "blk.0.attn_k.weight: relative RMS error"),
        (mutate.wrong_norm, "decoder", "gguf/values[text]", "blk.2.ffn_norm.weight: 1 of 256 values"),
        (mutate.wrong_position, "vision_encoder", "gguf/values[mmproj]", "v.position_embd.weight"),
        (mutate.dropped_tensor, "decoder", "gguf/tensors[text]", "output_norm.weight is missing"),
        (mutate.missing_token, "processor", "tokenizer/image_tokens", r"'\n\n' is not one token"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value if "/" in str(value) else ""),
)
@pytest.mark.usefixtures("no_llama_cpp")
def test_damage_in_the_bytes_is_seen_without_running_them(q4_k_m, few, tmp_path, damage, part, check, reason):
    report = verify_artifact(mutate.damaged(q4_k_m, tmp_path / "export", damage), samples=few)
    found = failures(report)
    assert report.status == "failed"
    assert list(found) == [check]
    assert found[check].part == part
    assert reason in found[check].reason


@pytest.mark.parametrize(
    ("damage", "part", "expected"),
    [
        (mutate.wrong_normalisation, "vision_encoder", {"vision_encoder/encoder": ""}),
        (mutate.wrong_rope, "decoder", {"decoder/logits[wide]": "", "decoder/shipped_kl": ""}),
        (mutate.other_merges, "processor", {"tokenizer/ids": "llama.cpp has"}),
        (
            mutate.other_template,
            "processor",
            {
                "gguf/chat_template[server]": "start|>User: <__media__>What is in t' where the model has",
                "gguf/chat_template[cli]": "llama-mtmd-cli, square: ",
            },
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_damage_is_seen_by_llama_cpp_and_named(q4_k_m, few, tmp_path, damage, part, expected):
    report = verify_artifact(mutate.damaged(q4_k_m, tmp_path / "export", damage), samples=few)
    found = failures(report)
    for check, reason in expected.items():
        assert check in found, f"{check} is not among {sorted(found)}"
        assert found[check].part == part
        assert reason in found[check].reason
    assert not {"gguf/pairing", "gguf/values[text]", "gguf/values[mmproj]"} & found.keys()


@pytest.mark.usefixtures("no_llama_cpp")
def test_a_doubled_scale_of_codes_names_the_weight(codes, few, tmp_path):
    report = verify_artifact(mutate.damaged(codes, tmp_path / "export", mutate.doubled_scale), samples=few)
    check = failures(report)["codes/all"]
    assert check.value == 1.0
    assert "layers.1.self_attn.o_proj.weight" in check.reason


@pytest.mark.usefixtures("no_llama_cpp")
def test_a_text_of_another_fine_tune_is_not_of_this_model(folder, q4_k_m, few):
    """Noise of a hundredth of their size in the query and value matrices, as an adapter leaves it."""
    tuned = folder / "tuned"
    shutil.copytree(demo.model_dir(), tuned)
    weights = load_file(tuned / "model.safetensors")
    torch.manual_seed(0)
    for name, weight in weights.items():
        if "text_model" in name and ("q_proj" in name or "v_proj" in name):
            weights[name] = (weight + 0.01 * weight.float().std() * torch.randn(weight.shape)).to(weight.dtype)
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    other = write(tuned, folder / "tuned-q4_k_m", quant="Q4_K_M")
    report = verify_files(mutate.files_of(other)[0], mutate.files_of(q4_k_m)[1], model="demo", samples=few)
    found = failures(report)
    assert "is of another model: 8 of " in found["gguf/pairing"].reason
    assert "not in the order of the model's" in found["gguf/values[text]"].reason


@pytest.mark.usefixtures("no_llama_cpp")
def test_another_model_is_not_the_source(folder, q4_k_m, few):
    report = verify_artifact(q4_k_m, model=str(folder / "tuned"), samples=few)
    assert failures(report).keys() == {"model/source", "gguf/pairing", "gguf/values[text]"}


def test_halves_of_different_models(tiny_idefics3, folder, q4_k_m, few):
    other = write(tiny_idefics3, folder / "tiny", quant="F16")
    text, mmproj = mutate.files_of(q4_k_m)[0], mutate.files_of(other)[1]
    found = failures(verify_files(text, mmproj, model="demo", samples=few))
    assert "they are halves of different models" in found["gguf/architecture"].reason
    assert "runtime/load" in found
    found = failures(verify_files(mmproj, text, model="demo", samples=few))
    assert "is a vision half" in found["gguf/architecture"].reason


def test_a_model_that_does_not_split_images_is_told_that_llama_cpp_does(folder, q4_k_m, few):
    whole = folder / "whole-images"
    shutil.copytree(demo.model_dir(), whole)
    file = whole / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"]["do_image_splitting"] = False
    file.write_text(json.dumps(config))
    report = verify_files(*mutate.files_of(q4_k_m), model=str(whole), samples=few)
    check = failures(report)["gguf/image_splitting"]
    assert "do_image_splitting is false" in check.reason
    assert "square" in check.reason
    assert {"quantization/answers", "processor/prompt_ids[square]"} <= failures(report).keys()


def test_planted_outliers_under_plain_rounding_in_long_groups_fail_the_quantization_question(folder):
    """Blocks of 32 hold the outliers apart (KL 5e-3); groups of 128 with one scale do not."""
    variant = make_outlier_variant(demo.model_dir(), folder / "outliers")
    scheme = QuantScheme(bits=4, group_size=128, symmetric=True)
    export = write(variant, folder / "rtn-128", quant="Q4_0", scheme=scheme)
    report = verify_artifact(export, samples=questions(folder / "some.jsonl", 26))
    assert report.status_of("lowering") == "passed", failures(report)
    assert {"quantization/kl", "quantization/perplexity_ratio"} <= failures(report).keys()


def test_a_changed_file_is_refused(q4_k_m, tmp_path):
    copy = mutate.damaged(q4_k_m, tmp_path / "export", lambda text, mmproj: None)
    mutate.doubled_scale(*mutate.files_of(copy))
    with pytest.raises(ArtifactError, match=r"gguf was changed"):
        verify_artifact(copy)


def test_a_truncated_file_is_no_gguf(q4_k_m, tmp_path):
    text, mmproj = mutate.files_of(q4_k_m)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(text.read_bytes()[:5000])
    report = verify_files(cut, mmproj, model="demo")
    assert [c.name for c in report.checks] == ["gguf/readable"]
    assert report.status == "failed"


def test_without_the_original_only_the_files_are_judged(q4_k_m, tmp_path):
    copy = shutil.copytree(q4_k_m, tmp_path / "export")
    data = json.loads((copy / "manifest.json").read_text())
    data["source"]["model"] = str(tmp_path / "gone")
    (copy / "manifest.json").write_text(json.dumps(data))
    report = verify_artifact(copy)
    assert report.status == "incomplete"
    passed = {c.name for c in report.checks if c.status == "passed"}
    assert {"gguf/architecture", "gguf/tensors[text]", "tokenizer/ids", "tokenizer/image_tokens"} == passed - {
        "gguf/tensors[mmproj]"
    }
    missing = {c.name for c in report.not_run()}
    assert {"gguf/values", "gguf/pairing", "decoder/logits", "quantization/kl", "gguf/chat_template"} <= missing
    assert all("could not be loaded" in c.reason for c in report.not_run())


def test_loose_files_from_the_command_line(q4_k_m, few, tmp_path):
    text, mmproj = map(str, mutate.files_of(q4_k_m))
    page, junit, data = (tmp_path / name for name in ("gate.html", "gate.xml", "gate.json"))
    asked = ["verify", text, "--mmproj", mmproj, "--model", "demo", "--samples", str(few), "-q"]
    assert main([*asked, "--html", str(page), "--junit", str(junit), "--json", str(data)]) == 0
    assert json.loads(data.read_text())["status"] == "passed"
    assert "llama.cpp against PyTorch with the weights that the files hold." in page.read_text()
    assert 'name="gguf/pairing"' in junit.read_text()
    assert main(["verify", text, "-q"]) == 2


@pytest.mark.usefixtures("no_llama_cpp")
def test_without_llama_cpp_what_needs_it_is_not_run(q4_k_m, few):
    report = verify_artifact(q4_k_m, samples=few)
    assert report.status == "incomplete"
    assert {"tokenizer/ids", "processor/prompt_ids", "decoder/logits", "quantization/kl"} <= {
        c.name for c in report.not_run()
    }
    assert all("pip install 'vlmexport[gguf]'" in c.reason for c in report.not_run())
    assert "gguf/values[text]" in {c.name for c in report.checks if c.status == "passed"}


def test_without_an_image_processor_text_is_judged_all_the_same(q4_k_m, few, monkeypatch):
    def missing(*_args, **_options):
        raise ImportError("requires the Torchvision library")

    monkeypatch.setattr("vlmexport.verify.gguf.reference.PromptBuilder", missing)
    report = verify_artifact(q4_k_m, samples=few)
    assert report.status == "incomplete"
    assert "decoder/logits[text]" in {c.name for c in report.checks if c.status == "passed"}
    assert all("pip install torchvision" in c.reason for c in report.not_run())
    assert {"processor/prompt_ids[wide]", "gguf/image_splitting", "quantization/kl"} <= {
        c.name for c in report.not_run()
    }


@pytest.mark.parametrize(("kind", "part"), [(RuntimeError, "decoder"), (TypeError, "model")])
def test_a_model_that_fails_on_a_prompt_fails_that_prompt_alone(q4_k_m, few, monkeypatch, kind, part):
    features, prompts = FullReference.features, []

    def broken(self, prompt):
        prompts.append(prompt)
        if len(prompts) == 1:
            raise kind("shapes do not fit")
        return features(self, prompt)

    monkeypatch.setattr(FullReference, "features", broken)
    report = verify_artifact(q4_k_m, samples=few)
    found = failures(report)
    assert list(found) == ["decoder/logits[square]"]
    assert found["decoder/logits[square]"].part == part
    assert "shapes do not fit" in found["decoder/logits[square]"].reason
    passed = {c.name for c in report.checks if c.status == "passed"}
    assert {"gguf/values[text]", "decoder/logits[wide]", "decoder/shipped_kl", "quantization/accuracy"} <= passed


def test_llama_cpp_that_does_not_load_the_files_a_second_time_is_a_failed_check(q4_k_m, few, monkeypatch):
    def second(*arguments, exact=False, **options):
        if not exact:
            raise ArtifactError("llama.cpp does not load it: out of memory")
        return run_runner(*arguments, exact=exact, **options)

    run_runner = run.LlamaCppRunner
    monkeypatch.setattr(run, "LlamaCppRunner", second)
    report = verify_artifact(q4_k_m, samples=few)
    assert {name: c.reason for name, c in failures(report).items()} == {
        "runtime/load": "llama.cpp does not load it: out of memory"
    }
    assert {"gguf/values[text]", "decoder/logits[text]"} <= {c.name for c in report.checks if c.status == "passed"}


@pytest.mark.usefixtures("no_llama_cpp")
def test_a_loose_pair_of_a_quantized_model_is_judged_by_what_its_codes_mean(tiny_idefics3, folder, few, tmp_path):
    source, _ = make_gptq(tiny_idefics3, folder / "gptq")
    export = write(source, folder / "gptq-q8_0", quant="Q8_0", named=True)
    report = verify_files(*mutate.files_of(export), model=str(source), samples=few)
    assert failures(report) == {}
    assert "gguf/values[text]" in {c.name for c in report.checks if c.status == "passed"}
    damaged = mutate.damaged(export, tmp_path / "export", mutate.doubled_scale)
    report = verify_files(*mutate.files_of(damaged), model=str(source), samples=few)
    assert "blk.1.attn_output.weight: relative RMS error" in failures(report)["gguf/values[text]"].reason


def test_loose_files_need_both_halves_and_a_model(q4_k_m):
    text, mmproj = mutate.files_of(q4_k_m)
    with pytest.raises(BadInputError, match="give --mmproj"):
        verify_files(text, None, model="demo")
    with pytest.raises(BadInputError, match="give --model"):
        verify_files(text, mmproj, model=None)
    with pytest.raises(BadInputError, match="is a folder"):
        verify_files(q4_k_m, mmproj, model="demo")
    with pytest.raises(BadInputError, match=r"no such file: .*gone\.gguf"):
        verify_gguf(q4_k_m / "gone.gguf", mmproj, model="demo")
