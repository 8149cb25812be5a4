"""The plan decides the fate of every parameter exactly once, and refuses what the target cannot take."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.lower.onnx.products import emitted_product
from tests.tiny import make_tiny
from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.model.load import VLM, load_vlm
from vlmexport.plan import ExportPlan, OnnxOptions, check_options, plan_export
from vlmexport.quantize.rtn import quantize_rtn
from vlmexport.quantize.scheme import QuantScheme, make_scheme
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


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        (make_scheme("nf4"), "nf4"),
        (make_scheme("nf4:nested", group_size=128), "nf4"),
        (make_scheme("rtn", bits=2, group_size=-1), "int2"),
        (make_scheme("rtn", bits=8, group_size=-1, symmetric=False), "int8"),
        (make_scheme("torchao:int4wo"), "int4"),
        (make_scheme("torchao:int8wo"), "int8"),
    ],
    ids=lambda value: f"{value.algorithm}-{value.bits}" if isinstance(value, QuantScheme) else value,
)
@pytest.mark.parametrize("decoder_dtype", ["fp32", "fp16"])
def test_sizes_are_those_of_the_graphs_initializers(
    model: tuple[VLM, Split], scheme: QuantScheme, dtype: str, decoder_dtype: str
) -> None:
    plan = plan_of(model, scheme=scheme, decoder_dtype=decoder_dtype)
    names = [f"model.language_model.layers.1.mlp.{n}_proj.weight" for n in ("up", "gate")]
    tensors = {n: model[0].parameters_by_name()[n] for n in names}
    kind = {"fp32": torch.float32, "fp16": torch.float16}[decoder_dtype]
    graph, _ = emitted_product(tensors, scheme, kind, 0, {})
    stored = sum(v.const_value.nbytes for v in graph.graph.initializers.values() if v.const_value is not None)
    assert sum(plan.weight(n).bytes_after for n in names) == stored
    assert {plan.weight(n).dtype for n in names} == {dtype}


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


def test_the_choices_of_group_size_are_the_methods(model: tuple[VLM, Split]) -> None:
    with pytest.raises(BadInputError, match=r"group size 256; choose --group-size 64 or 128$"):
        plan_of(model, scheme=make_scheme("nf4", group_size=256))


@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["fp8", "smoothquant", "torchao:int8da-int8w"])
def test_methods_that_the_runtime_cannot_hold_are_refused_with_the_reason(name: str, target: str) -> None:
    options = OnnxOptions(target=target, scheme=make_scheme(name))
    with pytest.raises(BadInputError, match=f"target {target} refuses {name}: .*; choose .*"):
        check_options(options, load_target(target))
    inside = OnnxOptions(target=target, scheme=QuantScheme(overrides={"lm_head": make_scheme(name)}))
    with pytest.raises(BadInputError, match=f"target {target} refuses {name}: "):
        check_options(inside, load_target(target))


def test_a_method_whose_package_is_missing_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(NotPossibleHereError, match=r"run `pip install vlmexport\[torchao\]`"):
        check_options(OnnxOptions(scheme=make_scheme("torchao:int4wo")), CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (OnnxOptions(scheme=QuantScheme(bits=3)), "refuses 3-bit weights: MatMulNBits takes 2, 4 and 8 bits only"),
        (OnnxOptions(scheme=QuantScheme(overrides={"*": QuantScheme(bits=3)})), "refuses 3-bit weights"),
        (OnnxOptions(layout="flat"), "no layout 'flat'; it has split, transformersjs, genai"),
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
    from vlmexport.errors import UnsupportedModelError

    vlm, split = model
    vlm.model.register_parameter("stray", torch.nn.Parameter(torch.ones(3)))
    try:
        with pytest.raises(UnsupportedModelError, match=r"weights that belong to no part, .*: stray$"):
            plan_export(vlm, split, CPU, OnnxOptions())
    finally:
        del vlm.model.stray


def test_the_cache_is_counted_per_token(model: tuple[VLM, Split]) -> None:
    kv = model[0].facts.kv
    values = 2 * kv.layers * kv.heads * kv.head_dim
    assert plan_of(model).kv_bytes_per_token == 4 * values
    assert plan_of(model, decoder_dtype="fp16").kv_bytes_per_token == 2 * values
    assert plan_of(model, kv_cache="int8").kv_bytes_per_token == values


def test_an_int8_cache_is_refused_with_the_reason() -> None:
    with pytest.raises(BadInputError, match="--kv-cache int8 needs --attention gqa: the standard operator has no"):
        check_options(OnnxOptions(kv_cache="int8", attention="standard"), CPU)
    with pytest.raises(BadInputError, match=r"target cuda has no int8 KV cache .* choose --kv-cache same"):
        check_options(OnnxOptions(target="cuda", kv_cache="int8"), load_target("cuda"))
