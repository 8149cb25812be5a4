"""A quantized checkpoint in another format: the same codes, the same other bytes, or one line that says why not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.importers.encoders import make_awq, make_gptq
from tests.tiny import make_tiny
from vlmexport import api
from vlmexport.checkpoint_conversion import conversion_schemes, most_common_scheme
from vlmexport.checkpoint_plan import FORMATS, CheckpointOptions
from vlmexport.errors import BadInputError
from vlmexport.model.importers.packed import CodeFormat, QuantizedCheckpoint
from vlmexport.model.load import load_vlm
from vlmexport.quantize.scheme import make_scheme
from vlmexport.verify.checkpoint import changed_codes, changed_tensors, source_codes

Q_PROJ = "model.text_model.layers.0.self_attn.q_proj"
CODES = CodeFormat(4, 32, True, "", 128, 0, False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(
        "idefics3", tmp_path_factory.mktemp("source") / "idefics3", layers=1, vision_layers=1, dtype="bfloat16"
    )


def options(kind: str, quant: str = "", **scheme: Any) -> CheckpointOptions:
    return CheckpointOptions(kind, make_scheme(quant or FORMATS[kind].default_quant, **scheme))


def convert(model: Path, out: Path, kind: str, *, verify: bool = True) -> Any:
    return api.quantize_checkpoint(str(model), out, options(kind), verify=verify)


def digests(folder: Path) -> dict[str, str]:
    kept = load_vlm(str(folder)).quantized
    assert kept is not None
    return {name: codes.digest() for name, codes in kept.codes.items()}


def statuses(result: Any) -> dict[str, str]:
    return {check.name: check.status for check in result.report.checks}


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_round_trip_through_the_formats_keeps_every_digest(source: Path, tmp_path: Path, symmetric: bool) -> None:
    first = options("compressed-tensors", "rtn", symmetric=symmetric)
    folder = api.quantize_checkpoint(str(source), tmp_path / "0", first, verify=False).path
    before = digests(folder)
    assert len(before) == 7
    for step, kind in enumerate(("gptq", "awq"), start=1):
        result = convert(folder, tmp_path / str(step), kind)
        checks = statuses(result)
        assert {checks[name] for name in ("codes/all", "codes/kept", "source/unchanged", "config/ignore")} == {"passed"}
        assert {w.name: w.digest for w in result.manifest.quantized} == before
        folder = result.path
    back = convert(folder, tmp_path / "back", "compressed-tensors")
    assert back.report.status == "passed"  # transformers loads it
    assert digests(back.path) == before
    own = json.loads((source / "config.json").read_text())
    made = json.loads((back.path / "config.json").read_text())
    assert made.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert made == own
    old, new = load_file(source / "model.safetensors"), load_file(back.path / "model.safetensors")
    for name in old.keys() & new.keys():
        assert torch.equal(old[name].view(torch.int16), new[name].view(torch.int16)), name
    assert {name for name in new if "self_attn.q_proj" in name and "vision" not in name} == {
        f"{Q_PROJ}.weight_{kind}" for kind in ("packed", "scale", "shape", *(() if symmetric else ("zero_point",)))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "quant", "then"),
    [
        ("bnb-nf4", "nf4:nested", "bnb-nf4"),
        ("compressed-tensors", "fp8", "compressed-tensors"),
        ("compressed-tensors", "smoothquant-like", "compressed-tensors"),
        ("compressed-tensors", "hqq", "torchao"),
    ],
)
def test_other_codes_are_kept_and_transformers_loads_them(
    source: Path, tmp_path: Path, first: str, quant: str, then: str
) -> None:
    chosen = options(first, "rtn", bits=8, group_size=-1) if quant == "smoothquant-like" else options(first, quant)
    folder = api.quantize_checkpoint(str(source), tmp_path / "0", chosen, verify=False).path
    result = convert(folder, tmp_path / "1", then)
    assert result.report.status == "passed", result.report.failures()
    assert {w.name: w.digest for w in result.manifest.quantized} == digests(folder)


def test_codes_of_another_tools_checkpoint_are_converted(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, drawn = make_awq(tiny_idefics3, tmp_path / "awq")
    (folder / "quant_config.json").write_text("{}")
    result = convert(folder, tmp_path / "gptq", "gptq", verify=False)
    manifest = result.manifest
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert (config["checkpoint_format"], config["sym"], config["group_size"]) == ("gptq_v2", False, 32)
    assert "version" not in config
    assert not (result.path / "quant_config.json").exists()
    assert manifest.plan["kept_from"] == "awq"
    assert len(manifest.quantized) == len(drawn)
    assert {w.algorithm for w in manifest.quantized} == {"imported"}
    assert "codes kept from the awq checkpoint, 4 bits, asymmetric" in (result.path / "README.md").read_text()
    reasons = {k.reason for k in manifest.unquantized}
    assert reasons == {"unquantized in the awq checkpoint"}
    assert not changed_codes(source_codes(str(folder)), manifest)


def test_a_zero_bias_without_a_place_is_not_carried_on(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, _ = make_gptq(tiny_idefics3, tmp_path / "gptq")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, f"{Q_PROJ}.bias": torch.zeros(128)}, folder / "model.safetensors", metadata={"format": "pt"})
    result = convert(folder, tmp_path / "out", "compressed-tensors", verify=False)
    assert f"{Q_PROJ}.bias" not in load_file(result.path / "model.safetensors")
    assert not changed_tensors(result.path, str(folder), result.manifest, source_codes(str(folder)))


def test_the_gate_names_codes_that_are_not_the_sources(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, _ = make_gptq(tiny_idefics3, tmp_path / "gptq")
    manifest = convert(folder, tmp_path / "out", "compressed-tensors", verify=False).manifest
    packed = source_codes(str(folder))
    wrong = dataclasses.replace(manifest.quantized[0], digest="0")
    changed = dataclasses.replace(manifest, quantized=(wrong, *manifest.quantized[2:]))
    found = changed_codes(packed, changed)
    assert len(found) == 2
    assert any("has other codes" in fault for fault in found)
    assert any("is missing" in fault for fault in found)
    assert changed_tensors(tmp_path / "out", str(folder), manifest, {})  # the parts of packed weights have gone


def test_methods_and_patterns_need_the_original_weights(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, _ = make_gptq(tiny_idefics3, tmp_path / "gptq")
    for chosen in (
        options("gptq", "rtn"),
        dataclasses.replace(options("gptq"), scheme_named=True),
        dataclasses.replace(options("gptq"), keep=("*.layers.0.*",)),
    ):
        with pytest.raises(BadInputError, match=r"already quantized .gptq 4-bit g32 sym.*original") as caught:
            api.quantize_checkpoint(str(folder), tmp_path / "out", chosen, verify=False)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def kept(*formats: CodeFormat) -> QuantizedCheckpoint:
    return QuantizedCheckpoint("gptq", {f"w{index}": codes for index, codes in enumerate(formats)}, {})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("awq", {"bits": 8}, "w0 has 8 bits, --format awq holds 4; choose --format compressed-tensors"),
        ("awq", {"wide_scales": True}, "w0 has scales that float16 does not hold"),
        ("gptq", {"codebook": "nf4", "wide_scales": True}, "w0 is nf4, whose levels --format gptq does not hold"),
        ("compressed-tensors", {"codebook": "nf4"}, "w0 is nf4"),
        ("bnb-nf4", {"codebook": "fp8", "bits": 8}, "w0 is fp8"),
        ("bnb-nf4", {}, "w0 has integer codes, and --format bnb-nf4 holds nf4, nf4:nested only"),
        ("compressed-tensors", {"bits": 5}, "w0 has 5 bits"),
        ("compressed-tensors", {"group_size": 512, "in_features": 2048}, "w0 came quantized.*group size is 512"),
    ],
)
def test_what_a_format_does_not_hold_is_refused(kind: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message) as caught:
        conversion_schemes(kept(dataclasses.replace(CODES, **change)), FORMATS[kind], {"w0"}, set())
    assert "\n" not in str(caught.value)


def test_codes_outside_the_decoder_and_outside_linear_layers() -> None:
    one = kept(CODES)
    with pytest.raises(BadInputError, match="w0 is not the weight of a linear layer"):
        conversion_schemes(one, FORMATS["compressed-tensors"], set(), set())
    with pytest.raises(BadInputError, match="w0 is none of the decoder's layers"):
        conversion_schemes(one, FORMATS["gptq"], {"w0"}, {"w0"})
    assert conversion_schemes(one, FORMATS["compressed-tensors"], {"w0"}, {"w0"})


def test_several_kinds_of_codes_need_a_format_that_holds_them() -> None:
    wide = dataclasses.replace(CODES, bits=8)
    mixed = kept(CODES, wide, wide)
    with pytest.raises(BadInputError, match=r"of several kinds .gptq 8-bit g32 sym, 4-bit g32 sym"):
        conversion_schemes(mixed, FORMATS["gptq"], {"w0", "w1", "w2"}, set())
    found = conversion_schemes(mixed, FORMATS["compressed-tensors"], {"w0", "w1", "w2"}, set())
    assert [s.bits for s in found.values()] == [4, 8, 8]
    assert most_common_scheme(found).bits == 8


def test_whole_rows_and_chance_symmetry_make_no_mixture() -> None:
    rows = (dataclasses.replace(CODES, group_size=128), dataclasses.replace(CODES, group_size=192, in_features=192))
    found = conversion_schemes(kept(*rows), FORMATS["gptq"], {"w0", "w1"}, set())
    assert {s.group_size for s in found.values()} == {-1}
    chance = conversion_schemes(
        kept(CODES, dataclasses.replace(CODES, symmetric=False)), FORMATS["awq"], {"w0", "w1"}, set()
    )
    assert {s.symmetric for s in chance.values()} == {False}


def test_the_sources_quantization_config_does_not_leak_from_the_text_part(tiny_idefics3: Path, tmp_path: Path) -> None:
    folder, _ = make_gptq(tiny_idefics3, tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    made = json.loads((convert(folder, tmp_path / "out", "awq", verify=False).path / "config.json").read_text())
    assert made["quantization_config"]["quant_method"] == "awq"
    assert "quantization_config" not in made["text_config"]
