"""The loop as a whole: functions preserved, order of work, what is touched, resumption and memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.calibrate.decoders import logits, make_batches, make_decoder, part_of, schemes_of
from vlmexport.calibrate import layer as layer_module
from vlmexport.calibrate import loop as loop_module
from vlmexport.calibrate.capture import Batch
from vlmexport.calibrate.loop import LayerLoop, calibrate_decoder
from vlmexport.calibrate.recipe import CalibrationOptions
from vlmexport.calibrate.store import StepStore
from vlmexport.errors import BadInputError
from vlmexport.model.load import load_vlm
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.progress import SilentProgress, SilentStage
from vlmexport.quantize.calibrated import quantize_group
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.capture import split_model
from vlmexport.split.names import weight_names
from vlmexport.split.parts import Role
from vlmexport.target import load_target

DEFAULT = QuantScheme(algorithm="awq+gptq")
AWQ = QuantScheme(algorithm="awq")
GPTQ = QuantScheme(algorithm="gptq")
FIRST = "model.language_model.layers.0."


def run_loop(
    model: Any, folder: Path, schemes: Mapping[str, QuantScheme], batches: Sequence[Batch] | None = None
) -> tuple[StepStore, int]:
    store = StepStore(folder, "test")
    return store, LayerLoop(model, part_of(model), schemes, batches or make_batches(), store).run(SilentProgress())


def with_weights(model: Any, values: Mapping[str, torch.Tensor]) -> Any:
    """A copy of `model` with some parameters replaced, a tied head untied."""
    changed = copy.deepcopy(model)
    parameters = dict(changed.named_parameters())
    for name, value in values.items():
        if name in parameters:
            parameters[name].data = value
    return changed


@pytest.mark.parametrize(
    "variant",
    [
        "grouped",
        "biased",
        "offset_norms",
        "many_norms",
        "head_norms",
        "fused",
        "router_and_experts",
        "parallel",
        "tied",
    ],
)
def test_folded_floats_are_the_same_function(variant: str, tmp_path: Path) -> None:
    model = make_decoder(variant)
    schemes = schemes_of(model, AWQ)
    store, steps = run_loop(model, tmp_path / "work", schemes)
    folds = store.folds(steps)
    assert folds
    weights = DecoderWeights(dict(model.named_parameters()), schemes, store.codes(steps), folds)
    folded = with_weights(model, {name: weights.tensor(name) for name in folds})
    for batch in make_batches(seed=1):
        want, got = logits(model, batch), logits(folded, batch)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert not [name for name in folds if "language_model.layers." not in name]


def test_codes_stand_for_the_folded_weights(tmp_path: Path) -> None:
    model = make_decoder("grouped")
    schemes = schemes_of(model, QuantScheme(bits=8, algorithm="awq+gptq"))
    store, steps = run_loop(model, tmp_path / "work", schemes)
    weights = DecoderWeights(dict(model.named_parameters()), schemes, store.codes(steps), store.folds(steps))
    assert set(store.codes(steps)) == set(schemes)
    for name in schemes:
        want = weights.tensor(name)
        # An error that was passed on may move a weight by more than half a step, but not by many.
        assert (weights.quantized(name).dequantize() - want).abs().max() <= 0.05 * want.abs().max()


def test_a_layer_sees_what_the_quantized_layers_before_it_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = make_decoder("grouped"), make_batches()
    seen: dict[str, torch.Tensor] = {}
    order: list[str] = []

    def watched(weights: Any, statistics: Any, schemes: Any, names: Any) -> Any:
        seen[f"{len(order)}"] = statistics.moment.clone()
        order.extend(names)
        return quantize_group(weights, statistics, schemes, names)

    monkeypatch.setattr(layer_module, "quantize_group", watched)
    store, steps = run_loop(model, tmp_path / "work", schemes_of(model, GPTQ), batches)
    codes = store.codes(steps)
    layer0 = {n: codes[n].dequantize() for n in codes if n.startswith(FIRST)}
    quantized = with_weights(model, layer0)

    def moment(decoder: Any) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        linear = decoder.layers[1].self_attn.q_proj
        handle = linear.register_forward_pre_hook(lambda _m, args: rows.append(args[0]))
        for batch in batches:
            with torch.no_grad():
                decoder(**batch.kwargs, use_cache=False)
        handle.remove()
        x = torch.cat([r[b.valid] for r, b in zip(rows, batches, strict=True)])
        return x.t() @ x

    got = seen[str(order.index("model.language_model.layers.1.self_attn.q_proj.weight"))]
    torch.testing.assert_close(got, moment(quantized.get_decoder()), rtol=1e-4, atol=1e-3)
    assert (got - moment(model.get_decoder())).abs().max() > 0.1


def test_data_free_and_kept_weights_take_part(tmp_path: Path) -> None:
    model = make_decoder("grouped")
    schemes = {**schemes_of(model, AWQ), f"{FIRST}self_attn.k_proj.weight": QuantScheme(bits=8, algorithm="rtn")}
    kept = f"{FIRST}mlp.gate_proj.weight"
    del schemes[kept]
    store, steps = run_loop(model, tmp_path / "work", schemes)
    codes, folds = store.codes(steps), store.folds(steps)
    assert codes[f"{FIRST}self_attn.k_proj.weight"].bits == 8
    assert kept not in codes
    assert torch.equal(folds[kept].columns, folds[f"{FIRST}mlp.up_proj.weight"].columns)
    weights = DecoderWeights(dict(model.named_parameters()), schemes, codes, folds)
    assert kept in weights.folded()
    assert f"{FIRST}post_attention_layernorm.weight" in weights.folded()


def test_without_smoothing_nothing_is_folded(tmp_path: Path) -> None:
    model = make_decoder("grouped")
    store, steps = run_loop(model, tmp_path / "work", schemes_of(model, GPTQ))
    assert not store.folds(steps)


def test_an_expert_without_tokens_falls_back_and_says_so(tmp_path: Path) -> None:
    model = make_decoder("experts")
    for block in model.get_decoder().layers:
        forward = block.mlp.gate.forward
        block.mlp.gate.forward = lambda x, forward=forward: (lambda a, b, c: (a, b, c.clamp_max(2)))(*forward(x))
    store, steps = run_loop(model, tmp_path / "work", schemes_of(model, DEFAULT))
    rows = store.report(0)["weights"]
    assert rows[f"{FIRST}mlp.experts.down_proj.3"]["fallback"] == "no calibration token reached it"
    assert rows[f"{FIRST}mlp.experts.down_proj.1"]["fallback"] == ""
    assert store.codes(steps)[f"{FIRST}mlp.experts.down_proj.3"].shape == (64, 64)


def test_nan_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = make_decoder("grouped")
    model.get_decoder().layers[1].self_attn.o_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(BadInputError, match=r"layers\.1\.self_attn\.o_proj"):
        run_loop(model, tmp_path / "work", schemes_of(model, DEFAULT))


class Interrupted(SilentProgress):
    """Interrupts at the start of a layer, as Ctrl-C does."""

    def __init__(self, layer: str) -> None:
        self.layer, self.started = layer, []

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Any:
        outer = self

        class Stage(SilentStage):
            def advance(self, n: int = 1, description: str | None = None) -> None:
                if n == 0 and description is not None:
                    outer.started.append(description)
                if description == outer.layer:
                    raise KeyboardInterrupt

        yield Stage()


@pytest.mark.parametrize("variant", ["grouped", "experts"])
def test_an_interrupted_run_goes_on_with_the_same_bytes(variant: str, tmp_path: Path) -> None:
    model, batches = make_decoder(variant, torch.bfloat16), make_batches()
    schemes = schemes_of(model, DEFAULT)
    _, steps = run_loop(model, tmp_path / "whole", schemes, batches)
    store = StepStore(tmp_path / "parts", "test")
    loop = LayerLoop(model, part_of(model), schemes, batches, store)
    with pytest.raises(KeyboardInterrupt):
        loop.run(Interrupted("layer 1"))
    assert store.finished() == 1
    resumed = Interrupted("never")
    again = StepStore(tmp_path / "parts", "test")
    assert LayerLoop(model, part_of(model), schemes, batches, again).run(resumed) == steps
    assert resumed.started == ["layer 1"]
    for step in range(steps):
        name = f"step-{step:04d}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_resumed_run_moves_scales_where_the_first_layer_of_the_kind_proved_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another layer may show other sites: experts that no token reached."""
    model, batches = make_decoder("grouped"), make_batches()
    schemes = schemes_of(model, DEFAULT)
    store = StepStore(tmp_path / "work", "test")
    with pytest.raises(KeyboardInterrupt):
        LayerLoop(model, part_of(model), schemes, batches, store).run(Interrupted("layer 1"))
    monkeypatch.setattr(loop_module, "find_folds", lambda *_: pytest.fail("looked for sites again"))
    again = StepStore(tmp_path / "work", "test")
    LayerLoop(model, part_of(model), schemes, batches, again).run(SilentProgress())
    assert any(row["done"] for row in again.report(1)["folds"])


def test_one_layer_at_a_time_is_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_decoder("grouped", torch.bfloat16)
    decoder = model.get_decoder()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    largest = max(sum(p.numel() for p in block.parameters()) for block in decoder.layers)
    wide: list[int] = []

    def counted(*args: Any) -> Any:
        wide.append(sum(p.numel() for p in model.parameters() if p.dtype == torch.float32))
        return quantize_group(*args)

    monkeypatch.setattr(layer_module, "quantize_group", counted)
    run_loop(model, tmp_path / "work", schemes_of(model, DEFAULT))
    assert len(wide) > 4
    assert set(wide) == {largest}
    assert all(before[n][0] == id(p) and torch.equal(before[n][1], p) for n, p in model.named_parameters())


def rename(module: Any, old: str, new: str) -> None:
    """Register the child `old` under `new`; code that reads `old` still finds it."""
    child = module._modules.pop(old)
    module._modules[new] = child
    kind = type(module)
    module.__class__ = type(kind.__name__, (kind,), {old: property(lambda self: self._modules[new])})


def test_modules_of_other_names_change_nothing(tiny_llava: Path, tmp_path: Path) -> None:
    """The vision tower gets the decoder's names and the decoder the vision tower's."""
    results = []
    for swap in (False, True):
        vlm = load_vlm(str(tiny_llava))
        inner: Any = vlm.model.base_model
        if swap:
            rename(inner, "vision_tower", "text_model")
            rename(inner, "language_model", "vision_model_")
            for block in inner.get_submodule("vision_model_").layers:
                rename(block, "self_attn", "norm_of_vision")
                rename(block.norm_of_vision, "q_proj", "patch_embedding")
            rename(inner.vision_model_, "layers", "towers")
        vision = {n: p.clone() for n, p in inner.vision_tower.named_parameters()}
        split = split_model(vlm)
        plan = plan_export(vlm, split, load_target("cpu"), OnnxOptions(scheme=DEFAULT))
        made = calibrate_decoder(
            vlm, split, plan.schemes, CalibrationOptions(samples=4), tmp_path / str(swap), SilentProgress()
        )
        mine = set(weight_names(vlm.model, split.parts[Role.DECODER].module))
        assert set(made.quantized) == set(plan.schemes)
        assert set(made.quantized) | set(made.folds) <= mine
        assert len(made.quantized) == 2 * 7 + 1
        assert all(torch.equal(vision[n], p) for n, p in inner.vision_tower.named_parameters())
        results.append([made.quantized[name].digest() for name in made.quantized])
    assert sorted(results[0]) == sorted(results[1])


def test_the_report_says_what_was_calibrated_on(tiny_idefics3: Path, tmp_path: Path) -> None:
    vlm = load_vlm(str(tiny_idefics3))
    split = split_model(vlm)
    plan = plan_export(vlm, split, load_target("cpu"), OnnxOptions(scheme=DEFAULT))
    options = CalibrationOptions(samples=4, seed=3)
    made = calibrate_decoder(vlm, split, plan.schemes, options, tmp_path / "work", SilentProgress())
    assert (made.report["samples"], made.report["seed"]) == (4, 3)
    assert made.report["recipe"]["name"] == "synthetic"
    assert 0 < made.report["image_share"] < 1
    assert made.report["image_share"] + made.report["text_share"] == 1
    assert [row["layer"] for row in made.report["layers"]][-1] == "after the layers"
    assert any("fell back" in line for line in made.report["warnings"]) == any(
        w["fallback"] for row in made.report["layers"] for w in row["weights"].values()
    )
    other = calibrate_decoder(
        vlm, split, plan.schemes, CalibrationOptions(samples=5, seed=3), tmp_path / "work", SilentProgress()
    )
    assert other.report["samples"] == 5
    assert other.quantized["lm_head.weight"].digest() != ""


def test_samples_without_images_need_the_flag_and_warn(tiny_llava: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"image": [], "question": "how many shapes are there?", "answers": ["three shapes"]}\n')
    vlm = load_vlm(str(tiny_llava))
    split = split_model(vlm)
    plan = plan_export(vlm, split, load_target("cpu"), OnnxOptions(scheme=GPTQ))
    options = CalibrationOptions(source=str(file))
    with pytest.raises(BadInputError, match=r"no image in 1 samples.*--text-only-calibration"):
        calibrate_decoder(vlm, split, plan.schemes, options, tmp_path / "work", SilentProgress())
    asked = CalibrationOptions(source=str(file), text_only=True)
    made = calibrate_decoder(vlm, split, plan.schemes, asked, tmp_path / "work", SilentProgress())
    assert made.report["image_share"] == 0
    assert any("text only" in line for line in made.report["warnings"])
