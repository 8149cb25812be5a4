"""The plan decides the fate of every parameter exactly once, and refuses what the target cannot take."""

import dataclasses
from pathlib import Path

import pytest

from tests.tiny import make_tiny
from vlmexport.errors import BadInputError
from vlmexport.model.load import VLM, load_vlm
from vlmexport.plan import ExportPlan, OnnxOptions, check_options, plan_export
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.split.capture import split_model
from vlmexport.split.parts import Split
from vlmexport.target import load_target

CPU = load_target("cpu")


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[VLM, Split]:
    folder = make_tiny("llava", tmp_path_factory.mktemp("plan") / "model", tied=request.param == "tied")
    vlm = load_vlm(str(folder))
    return vlm, split_model(vlm)


def plan_of(model: tuple[VLM, Split], **choices: object) -> ExportPlan:
    return plan_export(*model, CPU, OnnxOptions(**choices))  # type: ignore[arg-type]


def test_every_parameter_is_planned_once(model: tuple[VLM, Split]) -> None:
    plan = plan_of(model)
    names = [w.name for w in plan.weights]
    assert len(names) == len(set(names))
    assert set(names) == {n for n, _ in model[0].model.named_parameters(remove_duplicate=False)}
    assert all(w.reason for w in plan.weights)
    assert plan.weight("lm_head.weight").part == "decoder"


def test_checkpoint_bytes_count_a_tied_head_once(model: tuple[VLM, Split]) -> None:
    stored = sum(f.stat().st_size for f in model[0].path.glob("*.safetensors"))
    assert 0 <= stored - plan_of(model).bytes_before < 20_000  # the difference is the file's header


def test_default_fates(model: tuple[VLM, Split]) -> None:
    plan = plan_of(model)
    linear = plan.weight("model.language_model.layers.0.self_attn.q_proj.weight")
    assert (linear.action, linear.dtype, linear.part) == ("quantize", "int4", "decoder")
    assert plan.weight("lm_head.weight").action == "quantize"
    table = plan.weight("model.language_model.embed_tokens.weight")
    assert (table.action, table.dtype, table.part) == ("keep", "float16", "embed_tokens")
    norm = plan.weight("model.language_model.norm.weight")
    assert (norm.action, norm.dtype) == ("keep", "float32")
    for weight in plan.weights:
        if weight.part in ("vision_encoder", "projector"):
            assert weight.action != "quantize"
            assert weight.dtype == "float16" or weight.action == "drop"


def test_weights_that_reach_no_feature_are_dropped_with_the_reason(model: tuple[VLM, Split]) -> None:
    # LLaVA takes the second to last layer's features, so the last layer and the norm behind it are dead.
    dropped = [w for w in plan_of(model).weights if w.action == "drop"]
    assert any("post_layernorm" in w.name for w in dropped)
    assert all(w.bytes_after == 0 and w.reason == "no image feature depends on it" for w in dropped)


def test_sizes_are_those_of_the_quantized_tensors(model: tuple[VLM, Split]) -> None:
    for symmetric in (True, False):
        scheme = QuantScheme(symmetric=symmetric, group_size=64)
        plan = plan_of(model, scheme=scheme)
        name = "model.language_model.layers.1.mlp.down_proj.weight"
        made = quantize_rtn(model[0].parameters_by_name()[name], scheme, name)
        expected = made.codes.numel() // 2 + 4 * made.scale.numel()
        if made.zero_point is not None:
            expected += made.zero_point.numel() // 2
        assert plan.weight(name).bytes_after == expected


def test_keep_names_its_pattern(model: tuple[VLM, Split]) -> None:
    plan = plan_of(model, keep=("*.layers.0.mlp.*",))
    kept = plan.weight("model.language_model.layers.0.mlp.up_proj.weight")
    assert (kept.action, kept.reason, kept.dtype) == ("keep", "--keep *.layers.0.mlp.*", "float32")
    assert plan.weight("model.language_model.layers.1.mlp.up_proj.weight").action == "quantize"


def test_a_keep_pattern_that_matches_nothing_is_a_typo(model: tuple[VLM, Split]) -> None:
    with pytest.raises(BadInputError, match=r"--keep '\*attn_proj\*' matches no weight"):
        plan_of(model, keep=("*attn_proj*",))


def test_lm_head_fp16(model: tuple[VLM, Split]) -> None:
    head = plan_of(model, lm_head="fp16").weight("lm_head.weight")
    assert (head.action, head.dtype, head.reason) == ("keep", "float16", "--lm-head fp16")


def test_quant_none_keeps_the_decoder_dtype(model: tuple[VLM, Split]) -> None:
    plan = plan_of(model, scheme=None, decoder_dtype="fp16")
    assert not [w for w in plan.weights if w.action == "quantize"]
    assert plan.weight("model.language_model.layers.0.mlp.up_proj.weight").dtype == "float16"


def test_overrides_take_the_first_match(model: tuple[VLM, Split]) -> None:
    eight = QuantScheme(bits=8)
    scheme = QuantScheme(overrides={"lm_head": eight, "*.down_proj": QuantScheme(group_size=16)})
    plan = plan_of(model, scheme=scheme)
    assert plan.weight("lm_head.weight").scheme == eight
    assert plan.weight("model.language_model.layers.0.mlp.down_proj.weight").scheme == QuantScheme(group_size=16)
    assert plan.weight("model.language_model.layers.0.mlp.up_proj.weight").scheme == QuantScheme()


def test_a_group_size_that_does_not_divide_names_weight_and_choices(model: tuple[VLM, Split]) -> None:
    with pytest.raises(BadInputError, match=r"q_proj\.weight has 128 input.*group size 256.*16 or 32 or 64 or 128"):
        plan_of(model, scheme=QuantScheme(group_size=256))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OnnxOptions(scheme=QuantScheme(bits=3)), "refuses 3-bit weights: MatMulNBits takes 2, 4 and 8 bits only"),
        (OnnxOptions(scheme=QuantScheme(overrides={"*": QuantScheme(bits=3)})), "refuses 3-bit weights"),
        (OnnxOptions(scheme=QuantScheme(group_size=-1)), "groups of 16 to 256"),
        (OnnxOptions(layout="genai"), "no layout 'genai'; it has split"),
    ],
)
def test_the_target_refuses_with_its_reason(options: OnnxOptions, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        check_options(options, CPU)


def test_groups_collapse_layers_and_lose_nothing(model: tuple[VLM, Split]) -> None:
    plan = plan_of(model)
    groups = plan.groups()
    assert sorted(w.name for g in groups for w in g.weights) == sorted(w.name for w in plan.weights)
    patterns = {g.pattern: len(g.weights) for g in groups}
    assert patterns["model.language_model.layers.*.self_attn.q_proj.weight"] == 2
    assert patterns["lm_head.weight"] == 1


def test_the_plan_is_json(model: tuple[VLM, Split]) -> None:
    import json

    plan = plan_of(model)
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["bytes_after"] == plan.bytes_after == sum(w["bytes_after"] for w in data["weights"])
    assert set(data["weights"][0]) == {f.name for f in dataclasses.fields(plan.weights[0])}


def test_a_weight_without_a_part_is_refused(model: tuple[VLM, Split], tmp_path: Path) -> None:
    import torch

    from vlmexport.errors import UnsupportedModelError

    vlm, split = model
    vlm.model.register_parameter("stray", torch.nn.Parameter(torch.ones(3)))
    try:
        with pytest.raises(UnsupportedModelError, match=r"weights that belong to no part, .*: stray$"):
            plan_export(vlm, split, CPU, OnnxOptions())
    finally:
        del vlm.model.stray
