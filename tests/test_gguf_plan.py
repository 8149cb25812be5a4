"""The plan of a GGUF export: every weight has a place, every tensor a type, and what is asked for is checked."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tests.model.importers.encoders import make_gptq
from vlmexport.calibrate.imatrix import coverage, weighted_layers
from vlmexport.errors import BadInputError, NotPossibleHereError, UnsupportedModelError
from vlmexport.gguf_options import GgufPlan, gguf_options, tensors_from_dict
from vlmexport.gguf_pipeline import check_quantizers, model_name
from vlmexport.gguf_plan import plan_gguf
from vlmexport.model.family import GgufHalf
from vlmexport.model.load import VLM, load_vlm
from vlmexport.quantize.ggml import blocks, library


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return load_vlm("demo")


def types(plan: GgufPlan) -> dict[str, str]:
    return {t.name: t.type for t in plan.tensors}


def test_every_weight_is_in_the_plan_once(vlm: VLM) -> None:
    plan = plan_gguf(vlm, gguf_options())
    names = [t.source for t in plan.tensors if t.output == 0]
    assert sorted([*names, *plan.unused]) == sorted(vlm.model.state_dict())
    assert {t.file for t in plan.tensors} == {"text", "mmproj"}


def test_a_mix_of_k_types_with_a_vision_side_of_f16(vlm: VLM) -> None:
    found = types(plan_gguf(vlm, gguf_options("q4_k_m")))
    assert found["blk.0.attn_q.weight"] == "Q4_K"
    assert found["output.weight"] == "Q6_K"
    assert found["blk.0.attn_norm.weight"] == "F32"
    assert {kind for name, kind in found.items() if name.startswith(("v.", "mm."))} == {"F16", "F32"}


def test_an_override_replaces_the_type_of_what_it_matches(vlm: VLM) -> None:
    plan = plan_gguf(vlm, gguf_options(tensor_types=[("ffn_up", "q8_0")]))
    assert {t.type for t in plan.tensors if "ffn_up.weight" in t.name and t.file == "text"} == {"Q8_0"}


@pytest.mark.parametrize(
    ("quant", "bits", "symmetric", "expected"),
    [("rtn", 4, True, "Q4_0"), ("rtn", 4, False, "Q4_1"), ("rtn", 8, True, "Q8_0"), ("awq+gptq", 4, True, "Q4_0")],
)
def test_codes_of_an_algorithm_get_the_type_that_holds_them(
    vlm: VLM, quant: str, bits: int, symmetric: bool, expected: str
) -> None:
    plan = plan_gguf(vlm, gguf_options(quant, bits=bits, symmetric=symmetric))
    coded = [t for t in plan.tensors if t.scheme is not None]
    assert {t.type for t in coded} == {expected}
    assert len(coded) == 28
    assert types(plan)["output.weight"] != expected or expected == "Q8_0"


def test_fall_backs_are_named(tmp_path: Path) -> None:
    from tests.tiny import make_tiny

    odd = load_vlm(str(make_tiny("idefics3", tmp_path / "odd", hidden=96, intermediate=288, heads=3, kv_heads=3)))
    plan = plan_gguf(odd, gguf_options("Q4_K_M"))
    fallen = {t.name: (t.wanted, t.type) for t in plan.fallbacks}
    assert fallen["blk.0.attn_q.weight"] == ("Q4_K", "Q5_0")
    assert plan.bits_per_weight("text") > 5


def test_the_plan_survives_its_json(vlm: VLM) -> None:
    plan = plan_gguf(vlm, gguf_options("awq+gptq"))
    assert tensors_from_dict(plan.to_dict()["tensors"]) == plan.tensors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"quant": "Q4_K_X"}, "Q4_K_M"),
        ({"quant": "nf4"}, "GGUF holds no such codes"),
        ({"quant": "rtn", "bits": 8, "symmetric": False}, "no GGUF type"),
        ({"quant": "awq", "smooth": "awq"}, "smooths by itself"),
        ({"quant": "Q4_K_M", "symmetric": False}, "has its own"),
        ({"imatrix": "nowhere.gguf"}, "no such file"),
        ({"quant": "awq", "imatrix": __file__}, "does not read it"),
        ({"mmproj_type": "q9"}, "Q8_0"),
        ({"tensor_types": [("ffn", "q9")]}, "q9"),
        ({"tensor_types": [("no_such_tensor", "q8_0")]}, "no_such_tensor"),
        ({"tensor_types": [("ffn(", "q8_0")]}, "ffn("),
    ],
)
def test_what_cannot_be_is_refused_with_the_choices(vlm: VLM, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(words)):
        plan_gguf(vlm, gguf_options(**arguments))  # type: ignore[arg-type]


def test_a_weight_without_a_place_is_an_error(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmexport.families import gguf_llama

    real = gguf_llama.text

    def without_norms(*args: object) -> GgufHalf:
        half = real(*args)  # type: ignore[arg-type]
        return dataclasses.replace(half, rules=tuple(r for r in half.rules if "post_attention" not in r.source))

    monkeypatch.setattr(gguf_llama, "text", without_norms)
    with pytest.raises(UnsupportedModelError, match=r"post_attention_layernorm\.weight has no place"):
        plan_gguf(vlm, gguf_options())


def test_an_unknown_family_is_refused(tiny_vipllava: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="vipllava"):
        plan_gguf(load_vlm(str(tiny_vipllava)), gguf_options())


def test_codes_of_a_quantized_checkpoint_are_kept_unless_a_type_is_named(tiny_idefics3: Path, tmp_path: Path) -> None:
    kept = load_vlm(str(make_gptq(tiny_idefics3, tmp_path / "gptq")[0]))
    plan = plan_gguf(kept, gguf_options(named=False))
    assert plan.options.quant == "Q4_0"
    assert plan.schemes.keys() == kept.quantized.formats.keys()  # type: ignore[union-attr]
    again = plan_gguf(kept, gguf_options("Q4_K_M"))
    assert not again.schemes
    assert "rounded again" in again.notes[-1]
    with pytest.raises(BadInputError, match="already quantized"):
        plan_gguf(kept, gguf_options("awq"))


def test_an_override_counts_more_than_codes(vlm: VLM) -> None:
    plan = plan_gguf(vlm, gguf_options("rtn", tensor_types=[("ffn_down", "Q6_K")]))
    assert {t.type for t in plan.of("text") if "ffn_down" in t.name} == {"Q6_K"}
    assert not any("down_proj" in name for name in plan.schemes)


def test_an_algorithm_without_symmetric_codes_is_asymmetric_by_itself(vlm: VLM) -> None:
    assert {t.type for t in plan_gguf(vlm, gguf_options("hqq")).tensors if t.scheme is not None} == {"Q4_1"}


def test_the_short_names_of_llama_quantize_are_known() -> None:
    assert gguf_options("q4_k").quant == "Q4_K_M"


def test_importance_is_measured_only_where_it_changes_bytes(vlm: VLM) -> None:
    assert not weighted_layers(plan_gguf(vlm, gguf_options("Q8_0")))
    assert len(weighted_layers(plan_gguf(vlm, gguf_options("Q4_K_M")))) == 28


def test_a_type_that_needs_importances_where_there_are_none_is_refused_at_once(vlm: VLM) -> None:
    plan = plan_gguf(vlm, gguf_options("Q4_K_M", tensor_types=[("token_embd", "IQ2_XXS")]))
    with pytest.raises(BadInputError, match=r"token_embd\.weight is to be IQ2_XXS"):
        coverage([t.name for t in weighted_layers(plan)], plan)


def test_missing_quantizers_are_noticed_before_any_work(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: None)
    monkeypatch.setattr(blocks, "library_path", lambda: None)
    check_quantizers(plan_gguf(vlm, gguf_options("Q8_0")))  # numpy has them
    with pytest.raises(NotPossibleHereError, match=r"vlmexport\[gguf\]"):
        check_quantizers(plan_gguf(vlm, gguf_options("Q4_K_M", imatrix="none")))


@pytest.mark.parametrize(
    ("source", "name"), [("demo", "vlmexport-demo"), ("org/Some-VLM", "Some-VLM"), ("org/Some-VLM@main", "Some-VLM")]
)
def test_files_are_named_after_the_model(vlm: VLM, source: str, name: str) -> None:
    assert model_name(dataclasses.replace(vlm, source=source)) == name


def test_a_folder_keeps_its_whole_name(vlm: VLM, tmp_path: Path) -> None:
    (tmp_path / "run@3").mkdir()
    assert model_name(dataclasses.replace(vlm, source=str(tmp_path / "run@3"))) == "run@3"
