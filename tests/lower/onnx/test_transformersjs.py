"""The ``transformersjs`` layout judged from Python: names, types and dims, root files, variants, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from tests.zoo import registry
from vlmexport import dtypes
from vlmexport.api import export_onnx
from vlmexport.dtypes import WEB_LAYOUT, check_folder_name, check_widths, settle_dtypes
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.lower.onnx import web_vision
from vlmexport.lower.onnx.decoder import lower_decoder
from vlmexport.lower.onnx.layouts import transformersjs
from vlmexport.lower.onnx.web_decoder import as_client_decodes
from vlmexport.lower.onnx.web_families import web_family
from vlmexport.lower.onnx.web_vision import trace_web_vision
from vlmexport.lower.onnx.weights import stream_weights
from vlmexport.manifest import Artifact, open_artifact, write_manifest
from vlmexport.model.kv import KVGeometry, LayerKV, State
from vlmexport.model.merge import MergeSpec
from vlmexport.model.pictures import EachPicture
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.progress import SilentProgress
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.runtime.decoder import DecoderSession
from vlmexport.runtime.decoder_inputs import merged_inputs
from vlmexport.runtime.ort import OnnxRunner
from vlmexport.runtime.prompt import PromptBuilder
from vlmexport.runtime.protocol import ModelInputs
from vlmexport.runtime.torch import TorchRunner
from vlmexport.split.capture import split_model
from vlmexport.split.examples import draw_picture
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role
from vlmexport.target import load_target
from vlmexport.variants import as_variant, variant_names
from vlmexport.verify.run import verify_artifact

NAMES = ("fp32", "q4f16", "q4")
WEB = OnnxOptions(layout=WEB_LAYOUT)


def export(model: Path, out: Path, *names: str, **more: Any) -> Artifact:
    scheme = None if set(names) <= {"fp32", "fp16"} else make_scheme("rtn")
    options = OnnxOptions(layout=WEB_LAYOUT, dtypes=names, scheme=scheme, scheme_named=True, **more)
    return export_onnx(str(model), out, options, verify=False).artifact


@pytest.fixture(scope="module")
def traces() -> list[str]:
    return []


@pytest.fixture(scope="module")
def web(tiny_idefics3: Path, tmp_path_factory: pytest.TempPathFactory, traces: list[str]) -> Artifact:
    vision = web_vision.trace_vision

    def counted(model: Any, part: Any, opset: int) -> Any:
        traces.append(str(part.role))
        return vision(model, part, opset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web_vision, "trace_vision", counted)
        return export(tiny_idefics3, tmp_path_factory.mktemp("web") / "tiny", *NAMES)


def signature(artifact: Artifact, name: str, part: str) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    file = as_variant(artifact, name).manifest.parts[part]
    return {spec.name: (spec.dtype, spec.dims) for spec in (*file.inputs, *file.outputs)}


@pytest.mark.slow
def test_files_are_named_as_the_client_asks_for_them(web: Artifact) -> None:
    files = {path.name for path in (web.path / "onnx").iterdir()}
    parts = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    assert files == {f"{part}{suffix}.onnx" for part in parts for suffix in ("", "_q4", "_q4f16")}


@pytest.mark.slow
def test_the_vision_side_is_traced_once(web: Artifact, traces: list[str]) -> None:
    assert sorted(traces) == ["projector", "vision_encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_the_clients(web: Artifact, name: str) -> None:
    kind = "float16" if name == "q4f16" else "float32"
    vision = signature(web, name, "vision_encoder")
    assert vision["pixel_values"] == ("float32", ("batch_size", "num_images", 3, 32, 32))
    assert vision["pixel_attention_mask"] == ("bool", ("batch_size", "num_images", 32, 32))
    assert vision["image_features"] == (kind, ("image_tokens", 128))
    assert signature(web, name, "embed_tokens")["inputs_embeds"][0] == kind
    decoder = signature(web, name, "decoder")
    assert decoder["inputs_embeds"][0] == kind
    assert decoder["past_key_values.0.key"] == (kind, ("batch_size", 2, "past_sequence_length", 32))
    known = {"inputs_embeds", "attention_mask", "num_logits_to_keep", "logits"}
    assert {n for n in decoder if not n.startswith(("past_key_values.", "present."))} == known


@pytest.mark.slow
def test_dtypes_of_one_width_share_their_codes(web: Artifact) -> None:
    digests = [[m.digest for r in as_variant(web, name).manifest.quantized for m in r.members] for name in NAMES]
    assert digests[1] == digests[2]
    assert digests[1]
    assert not digests[0]


@pytest.mark.slow
def test_pictures_of_several_prompts_run_at_once(web: Artifact) -> None:
    runner = OnnxRunner(web, variant="fp32", threads=1)
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(2, 3, 3, 32, 32)).astype(np.float32)
    mask = np.ones((2, 3, 32, 32), bool)
    mask[1, 2, 20:] = False
    together = runner.image_features({"pixel_values": pixels, "pixel_attention_mask": mask})
    alone = [
        runner.image_features({"pixel_values": pixels[i : i + 1], "pixel_attention_mask": mask[i : i + 1]})
        for i in (0, 1)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    seen = runner.image_features({"pixel_values": pixels, "pixel_attention_mask": np.ones_like(mask)})
    assert np.abs(seen - together).max() > 1e-3


@pytest.mark.slow
def test_root_files(web: Artifact, tiny_idefics3: Path) -> None:
    read = lambda name: json.loads((web.path / name).read_text())  # noqa: E731
    settings = read("config.json")["transformers.js_config"]
    assert settings["dtype"] == "q4f16"
    assert settings["kv_cache_dtype"] == {"fp16": "float16", "q4f16": "float16"}
    assert settings["use_external_data_format"] == {}
    flat = read("preprocessor_config.json")
    assert (flat["image_processor_type"], flat["processor_class"]) == ("Idefics3ImageProcessor", "Idefics3Processor")
    assert "image_mean" in flat
    assert read("processor_config.json")["image_seq_len"] == 4
    template = (tiny_idefics3 / "chat_template.jinja").read_text()
    assert read("tokenizer_config.json")["chat_template"] == template


@pytest.mark.slow
def test_the_gate_judges_every_variant(web: Artifact) -> None:
    report = verify_artifact(web.path)
    assert [name for name in report.runtime["variants"]] == list(variant_names(web.manifest))
    assert report.status_of("lowering") == "passed", [check.name for check in report.failures()]
    for name in NAMES:
        checks = [check for check in report.checks if check.name.startswith(f"{name}:")]
        assert {"decoder", "vision_encoder", "embed_tokens", "model", "processor"} <= {c.part for c in checks}
        assert report.runtime["variants"][name]["lowering"]["status"] == "passed"


@pytest.mark.slow
def test_the_gate_names_the_variant_and_part_that_was_damaged(web: Artifact, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(web.path, broken)
    graph = broken / "onnx" / "decoder_model_merged_q4f16.onnx"
    model = onnx.load(graph)
    scale = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".scale"))
    array = onnx.numpy_helper.to_array(scale) * np.float16(1.5)
    scale.CopyFrom(onnx.numpy_helper.from_array(array, scale.name))
    onnx.save(model, graph)
    shutil.copyfile(broken / "onnx" / "vision_encoder_q4f16.onnx", broken / "onnx" / "vision_encoder.onnx")
    write_manifest(broken, web.manifest)
    failed = [check.name for check in verify_artifact(broken).failures() if check.question == "lowering"]
    assert any(name.startswith("q4f16:codes/") for name in failed)
    assert "fp32:vision_encoder/signature" in failed
    assert not any(name.startswith("q4:") for name in failed)


@pytest.mark.slow
def test_a_variant_that_is_not_there_is_refused(web: Artifact) -> None:
    assert variant_names(web.manifest)[0] == "q4f16"
    with pytest.raises(BadInputError, match="has no variant 'int8'; it has q4f16, fp32, q4"):
        OnnxRunner(web, variant="int8")
    plain = Artifact(web.path, dataclasses.replace(web.manifest, model={}))
    with pytest.raises(BadInputError, match="of one precision"):
        as_variant(plain, "q4")


@pytest.mark.slow
def test_llava_counts_image_tokens_in_words_that_mean_the_same_in_python_and_in_the_client(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformersjs, "ONE_FILE_BYTES", 100_000)
    made = export(tiny_llava, tmp_path / "llava", "fp32")
    settings = json.loads((made.path / "processor_config.json").read_text())
    assert (settings["num_additional_image_tokens"], settings["vision_feature_select_strategy"]) == (0, "full")
    ours, theirs = (PromptBuilder(folder).build([draw_picture(64, 40)], "What?") for folder in (made.path, tiny_llava))
    np.testing.assert_array_equal(ours.input_ids, theirs.input_ids)
    external = json.loads((made.path / "config.json").read_text())["transformers.js_config"]["use_external_data_format"]
    assert external == {"decoder_model_merged.onnx": 1, "embed_tokens.onnx": 1, "vision_encoder.onnx": 1}
    assert OnnxRunner(open_artifact(made.path), threads=1).image_features(ours.pixel_inputs).shape == (16, 128)


@pytest.mark.slow
@pytest.mark.family
@pytest.mark.parametrize("family", ["paligemma", "qwen2_vl", "qwen2_5_vl"])
def test_graphs_of_further_families_are_the_models(family: str, tmp_path: Path) -> None:
    vlm, examples = registry.make(family, tmp_path / "model")
    split = split_model(vlm, examples)
    target, form = load_target("cpu"), web_family(vlm, split)
    reference = TorchRunner(vlm, split)
    vision = trace_web_vision(vlm.model, split, target.onnx.opset).graph(form, "fp32", ir.DataType.FLOAT)
    stream_weights(vision.model, vision.groups, tmp_path / "vision.onnx", SilentProgress(), "write")
    plan = plan_export(vlm, split, target, settle_dtypes(dataclasses.replace(WEB, dtypes=("fp32",))))
    decoder = split.parts[Role.DECODER]
    weights = DecoderWeights(weight_names(vlm.model, decoder.module))
    lowered = lower_decoder(vlm, decoder, plan, target, weights)
    made = as_client_decodes(lowered.model.graph)
    stream_weights(lowered.model, lowered.linears.groups, tmp_path / "decoder.onnx", SilentProgress(), "write")
    sees = ort.InferenceSession(tmp_path / "vision.onnx")
    session = DecoderSession(ort.InferenceSession(tmp_path / "decoder.onnx"), split.kv, "gqa")
    assert made == (("block_ids",) if family == "paligemma" else ())
    assert ("grid_thw" in {value.name for value in sees.get_inputs()}) == (family == "qwen2_vl")
    for example in examples:
        arrays = {name: tensor.numpy() for name, tensor in example.items()}
        pixels = {n: a for n, a in arrays.items() if n in ("pixel_values", "image_grid_thw")}
        wanted = reference.image_features(pixels)
        (found,) = sees.run(None, {form.inputs.get(name, name): array for name, array in pixels.items()})
        np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())
        inputs, mask = merged_inputs(reference, [ModelInputs(arrays["input_ids"], pixels)])
        logits, _ = inputs.prefill(reference, mask, 0)
        extras = {name: array for name, array in inputs.extras.items() if name not in made}
        given, cache = session.prefill(inputs.embeds, mask, 0, 4, extras)
        np.testing.assert_allclose(given, logits, atol=1e-4 * np.abs(logits).max())
        _, own = inputs.prefill(reference, mask, 1)
        step = reference.embed(logits[:, -1:].argmax(-1))
        behind = reference.decode(step, own, 1)
        np.testing.assert_allclose(session.decode(step, cache, 1), behind, atol=1e-4 * np.abs(behind).max())


def test_the_primary_dtype_has_the_fewest_bits() -> None:
    settled = settle_dtypes(dataclasses.replace(WEB, dtypes=("fp32", "int8", "q4f16", "q4")))
    assert settled.dtypes == ("q4f16", "fp32", "int8", "q4")
    assert (settled.decoder_dtype, settled.encoder_dtype) == ("fp16", "fp16")
    assert settled.scheme == WEB.scheme
    only = settle_dtypes(dataclasses.replace(WEB, dtypes=("int8",)))
    assert only.scheme is not None
    assert only.scheme.bits == 8
    assert settle_dtypes(dataclasses.replace(WEB, dtypes=("fp16",))).scheme is None
    assert settle_dtypes(OnnxOptions()) == OnnxOptions()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OnnxOptions(dtypes=("q4",)), "--dtypes is for --layout transformersjs"),
        (dataclasses.replace(WEB, dtypes=("q5",)), "there is no 'q5'; choose of fp32, fp16, q4, q4f16, int8"),
        (dataclasses.replace(WEB, attention="standard"), "runs only --attention gqa"),
        (dataclasses.replace(WEB, kv_cache="int8"), "runs only --kv-cache same"),
        (dataclasses.replace(WEB, prefill="int8"), "runs only --prefill same"),
        (dataclasses.replace(WEB, preprocessor=True), "prepares pictures by itself"),
        (dataclasses.replace(WEB, decoder_dtype="fp16"), "--decoder-dtype fp16 has no effect"),
        (dataclasses.replace(WEB, scheme=None), "with --quant none choose fp32,fp16"),
        (dataclasses.replace(WEB, scheme=make_scheme("rtn", 8), scheme_named=True), "not 8-bit ones; add --bits 4"),
        (dataclasses.replace(WEB, dtypes=("fp32",), scheme_named=True), "holds floats only; add q4, q4f16 or int8"),
        (dataclasses.replace(WEB, scheme=make_scheme("nf4"), scheme_named=True), "evenly spaced codes only"),
    ],
)
def test_options_that_the_layout_has_no_place_for_are_refused(options: OnnxOptions, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        settle_dtypes(options)


@pytest.mark.parametrize("name", ["my--model", "-model", "a..b", "model.git", "x" * 97, "mod el", "modèle"])
def test_folders_that_the_client_does_not_load_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError, match=r"transformers\.js loads no folder named"):
        check_folder_name(tmp_path / name, WEB)
    check_folder_name(tmp_path / name, OnnxOptions())
    check_folder_name(tmp_path / "SmolVLM-256M_v1.0", WEB)


def test_codes_of_another_width_are_refused() -> None:
    plan: Any = SimpleNamespace(schemes={"w": make_scheme("rtn", 4)})
    with pytest.raises(BadInputError, match="--dtypes int8 holds 8-bit codes, but the weights have 4-bit codes"):
        check_widths(plan, dtypes.WEB_DTYPES["int8"])


@pytest.mark.parametrize(
    ("name", "merge", "uniform", "reason"),
    [
        ("gemma3", {"mask": "image_blocks"}, True, "the decoder cannot see image positions in transformers.js"),
        ("aya_vision", {}, True, "transformers.js runs no such model"),
        ("qwen2_vl", {"deepstack_layers": 3}, True, "reads image_features alone"),
        ("idefics3", {"place": "add"}, True, "in a way that transformers.js does not know"),
        ("llava", {}, False, "keep different things"),
        ("llava", {"pictures": EachPicture(axis=0)}, True, "lays out no tiles"),
        ("lfm2_vl", {"pictures": EachPicture(axis=0, patches=True, fixed=(("frames", 1),))}, True, "lays out no tiles"),
        ("mistral3", {}, False, "keep different things"),
        ("llava_onevision", {}, True, "lays out its tiles"),
        ("lighton_ocr", {"pictures": EachPicture(axis=0)}, True, "has no processor for it"),
    ],
)
def test_models_that_the_client_does_not_run_are_refused(
    name: str, merge: dict[str, Any], uniform: bool, reason: str
) -> None:
    vlm: Any = SimpleNamespace(facts=SimpleNamespace(model_type=name))
    states = () if uniform else (State(0, "conv", (4, 3)),)
    split: Any = SimpleNamespace(merge=MergeSpec(image_token_id=1, **merge), kv=KVGeometry(2, 1, 8, states=states))
    with pytest.raises(UnsupportedModelError, match=f"{name}: no transformersjs layout: .*{reason}"):
        web_family(vlm, split)


def test_states_and_layers_without_keys_are_taken_where_the_client_names_them() -> None:
    vlm: Any = SimpleNamespace(facts=SimpleNamespace(model_type="lfm2_vl"))
    merge = MergeSpec(image_token_id=1, pictures=EachPicture(axis=0, patches=True))
    layers = (None, LayerKV(1, 8))

    def taken(kind: str, kept: tuple[LayerKV | None, ...]) -> str:
        kv = KVGeometry(len(kept), 1, 8, kept, (State(0, kind, (4, 3)),))
        split: Any = SimpleNamespace(merge=merge, kv=kv)
        return web_family(vlm, split).processor

    assert taken("conv", layers) == "Lfm2VlProcessor"
    for kind, kept in (("recurrent", layers), ("conv", (*layers, LayerKV(2, 8)))):
        with pytest.raises(UnsupportedModelError, match="keep different things"):
            taken(kind, kept)


def test_every_family_of_the_table_is_taken() -> None:
    split: Any = SimpleNamespace(merge=MergeSpec(image_token_id=1), kv=SimpleNamespace(uniform=True))
    for name in ("idefics3", "smolvlm", "llava", "qwen2_vl", "qwen2_5_vl"):
        vlm: Any = SimpleNamespace(facts=SimpleNamespace(model_type=name))
        assert web_family(vlm, split).processor.lower().startswith(name.replace("_", "")[:5])
