"""The importance matrix: measured as plain hooks would, carried to GGUF's names, checked against a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibrate.decoders import make_batches, make_decoder, part_of, schemes_of
from vlmexport.calibrate.capture import Batch
from vlmexport.calibrate.imatrix import after_folds, check_imatrix, coverage, importance_matrix, quantized_layers
from vlmexport.calibrate.layer import leave_float
from vlmexport.calibrate.loop import LayerLoop
from vlmexport.calibrate.store import StepStore
from vlmexport.errors import BadInputError
from vlmexport.gguf_options import GgufOptions, GgufPlan, GgufTensor
from vlmexport.model.family import Transform
from vlmexport.progress import SilentProgress
from vlmexport.quantize.fold import Fold
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.imatrix import ColumnPower, ImportanceMatrix
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.statistics import InputPower, InputStatistics
from vlmexport.split.experts import eager_experts

AWQ = QuantScheme(algorithm="awq", symmetric=False)


def run_loop(model: Any, folder: Path, schemes: Mapping[str, QuantScheme], finish: Any) -> tuple[StepStore, int]:
    store = StepStore(folder, "test")
    return store, LayerLoop(model, part_of(model), schemes, make_batches(), store, finish).run(SilentProgress())


def hooked(model: Any, names: Iterable[str], batches: Sequence[Batch]) -> dict[str, InputPower]:
    """What linear layers read in one run of the whole decoder, by hooks."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    valid: list[torch.Tensor] = []
    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _m, args, name=name: rows[name].append(args[0].reshape(-1, args[0].shape[-1])[valid[-1].flatten()])
        )
        for name in rows
    ]
    for batch in batches:
        valid.append(batch.valid)
        with torch.no_grad():
            model.get_decoder()(**batch.kwargs, use_cache=False)
    for handle in handles:
        handle.remove()
    together = {name: torch.cat(found) for name, found in rows.items()}
    return {name: InputPower(x.double().square().sum(0), len(x)) for name, x in together.items()}


@pytest.mark.parametrize("variant", ["grouped", "many_norms", "fused"])
def test_the_float_model_is_measured_without_padding(variant: str, tmp_path: Path) -> None:
    model = make_decoder(variant)
    before = {name: p.clone() for name, p in model.named_parameters()}
    store, steps = run_loop(model, tmp_path / "work", {}, leave_float)
    assert not store.codes(steps)
    assert not store.folds(steps)
    got = store.powers(steps)
    names = [n for n in schemes_of(model, AWQ) if n != "lm_head.weight"]
    assert got.keys() == set(names)
    for name, want in hooked(model, names, make_batches()).items():
        assert got[name].tokens == want.tokens
        torch.testing.assert_close(got[name].squares, want.squares, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_every_expert_is_measured_on_its_own_tokens(tmp_path: Path) -> None:
    model = make_decoder("experts")
    layer = model.get_decoder().layers[0]
    store, steps = run_loop(model, tmp_path / "work", {}, leave_float)
    got, valid, routed = store.powers(steps), [b.valid.flatten() for b in make_batches()], []
    layer.mlp.experts.register_forward_pre_hook(lambda _m, args: routed.append(torch.cat(args[:2], dim=1)))
    with eager_experts(model.get_decoder()), torch.no_grad():
        for batch in make_batches():
            model.get_decoder()(**batch.kwargs, use_cache=False)
    rows = torch.cat([r[v] for r, v in zip(routed, valid, strict=True)])
    for expert in range(4):
        x = rows[(rows[:, 64:] == expert).any(1), :64]
        power = got[f"model.language_model.layers.0.mlp.experts.gate_up_proj.{expert}"]
        assert power.tokens == len(x)
        torch.testing.assert_close(power.squares, x.double().square().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["offset_norms", "router_and_experts"])
def test_smoothing_measures_the_folded_model_and_rounds_nothing(variant: str, tmp_path: Path) -> None:
    model = make_decoder(variant)
    store, steps = run_loop(model, tmp_path / "work", schemes_of(model, AWQ), leave_float)
    folds, got = store.folds(steps), store.powers(steps)
    assert folds
    assert "lm_head.weight" not in folds
    plain, plain_steps = run_loop(model, tmp_path / "plain", {}, leave_float)
    changed = 0
    for name, power in plain.powers(plain_steps).items():
        parameter, _, expert = name.rpartition(".")
        fold = folds.get(name) or (folds[parameter].of_expert(int(expert)) if parameter in folds else Fold())
        factor = torch.ones(1) if fold.columns is None else fold.columns
        changed += fold.columns is not None
        torch.testing.assert_close(got[name].squares, power.squares / factor.double() ** 2, rtol=1e-3, atol=1e-5)
    assert changed


def test_power_is_the_diagonal_of_the_moment() -> None:
    x = torch.randn(50, 8)
    whole, cheap = InputStatistics.empty(8), InputPower.empty(8)
    for part in (x[:20], x[20:]):
        whole.add(part)
        cheap.add(part)
    torch.testing.assert_close(whole.power().squares, cheap.squares, rtol=1e-5, atol=1e-5)
    assert whole.power().tokens == cheap.tokens == 50
    scaled = InputPower.empty(8)
    scaled.add(x * torch.arange(1, 9))
    torch.testing.assert_close(cheap.scaled(torch.arange(1.0, 9)).squares, scaled.squares, rtol=1e-6, atol=0)


def tensor(name: str, shape: tuple[int, ...], kind: str = "Q4_K", **changes: Any) -> GgufTensor:
    return dataclasses.replace(GgufTensor(name, "text", shape, kind, "", source=f"m.{name}"), **changes)


def plan_of(*tensors: GgufTensor) -> GgufPlan:
    return GgufPlan("A", "llama", "p", GgufOptions(), tensors, {}, {"text": {}, "mmproj": {}})


PLAN = plan_of(
    tensor("token_embd.weight", (16, 8)),
    tensor("blk.0.attn_q.weight", (4, 8), transform=Transform("permute", (2,))),
    tensor("blk.0.attn_norm.weight", (8,), "F32"),
    tensor("blk.0.ffn_gate_exps.weight", (3, 2, 8), source="m.experts", transform=Transform("split_expert_rows")),
    tensor(
        "blk.0.ffn_up_exps.weight", (3, 2, 8), source="m.experts", transform=Transform("split_expert_rows"), output=1
    ),
    tensor("blk.1.attn_q.weight", (4, 8)),
    tensor("blk.1.ffn_gate_inp.weight", (3, 8), "F32"),
)
WEIGHTS = {
    "m.token_embd.weight": torch.zeros(16, 8),
    "m.blk.0.attn_q.weight": torch.zeros(4, 8),
    "m.experts": torch.zeros(3, 4, 8),
    "m.blk.1.attn_q.weight": torch.zeros(4, 8),
}
RISING = torch.arange(8, dtype=torch.float64)


def test_powers_take_the_names_and_the_experts_of_the_plan() -> None:
    powers = {
        "m.blk.0.attn_q.weight": InputPower(RISING, 2),
        "m.experts.0": InputPower(RISING, 4),
        "m.experts.2": InputPower(RISING, 1600),
        "m.elsewhere": InputPower(RISING, 9),
    }
    made = importance_matrix(powers, PLAN, WEIGHTS, ["words"])
    assert made.powers.keys() == {"blk.0.attn_q.weight", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"}
    assert made.entries["blk.0.attn_q.weight"].tolist() == (RISING / 2).tolist()
    experts = made.entries["blk.0.ffn_up_exps.weight"]
    assert np.array_equal(experts, made.entries["blk.0.ffn_gate_exps.weight"])
    assert experts.tolist() == [(RISING / 4).tolist(), [1.0] * 8, np.float32(RISING / 1600).tolist()]
    assert (made.chunks, made.datasets) == (3, ("words",))


def test_columns_follow_a_transform_that_moves_them_and_are_left_out_where_it_mixes_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = {
        "reversed": lambda w: (w.flip(-1),),
        "rolled": lambda w: (torch.stack([w[0], *w[1:].roll(1, -1)]),),
        "shifted": lambda w: (w + 1,),
    }
    for kind, forward in kinds.items():
        monkeypatch.setitem(values._KINDS, kind, values._Kind(forward, lambda w: w))
    made = {}
    for kind in kinds:
        plan = plan_of(tensor("blk.0.attn_q.weight", (4, 8), transform=Transform(kind)))
        found = importance_matrix({"m.blk.0.attn_q.weight": InputPower(RISING, 1)}, plan, WEIGHTS, [])
        made[kind] = found.entries
    assert made["reversed"]["blk.0.attn_q.weight"].tolist() == RISING.flip(0).tolist()
    assert not made["rolled"]
    assert not made["shifted"]


def matrix(**changes: Any) -> ImportanceMatrix:
    """One that fits `PLAN`; a change to None takes an entry out."""
    shapes: dict[str, Any] = {
        "blk.0.attn_q.weight": (1, 8),
        "blk.0.ffn_gate_exps.weight": (3, 8),
        "blk.0.ffn_up_exps.weight": (3, 8),
        "blk.1.attn_q.weight": (1, 8),
        "blk.1.ffn_gate_inp.weight": (1, 8),
    } | {name.replace("__", "."): shape for name, shape in changes.items()}
    powers = {
        name: ColumnPower(np.ones(shape, np.float32), np.ones(shape[0], np.int64))
        for name, shape in shapes.items()
        if shape is not None
    }
    return ImportanceMatrix(powers)


def test_a_matrix_of_this_model_fits() -> None:
    fitted = check_imatrix(matrix(), PLAN)
    assert fitted["blk.0.ffn_up_exps.weight"].shape == (3, 8)
    assert fitted["blk.0.attn_q.weight"].shape == (8,)
    assert coverage(fitted, PLAN).note == ""
    assert [t.name for t in quantized_layers(PLAN)] == [n for n in matrix().powers if "inp" not in n]


def test_files_of_the_older_form_have_experts_end_to_end() -> None:
    fitted = check_imatrix(matrix(blk__0__ffn_up_exps__weight=(1, 24)), PLAN)
    assert fitted["blk.0.ffn_up_exps.weight"].shape == (3, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"blk__2__attn_q__weight": (1, 8)}, r"this one has no tensor blk\.2\.attn_q\.weight"),
        ({"blk__1__attn_q__weight": (1, 16)}, r"it has 16 columns of blk\.1\.attn_q\.weight, which has 8 here"),
        ({"blk__0__ffn_up_exps__weight": (4, 8)}, r"has 4 x 8 columns of blk\.0\.ffn_up_exps\.weight, which has 3 x 8"),
        (
            {"blk__1__attn_q__weight": None, "blk__1__ffn_gate_inp__weight": None},
            r"it knows nothing of blk\.1\.attn_q\.weight",
        ),
    ],
)
def test_a_matrix_of_another_model_is_refused_by_its_first_tensor(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInputError, match=f"the importance matrix is of another model: .*{words}"):
        check_imatrix(matrix(**changes), PLAN)


def test_what_is_not_covered_is_told_and_refused_where_it_is_needed() -> None:
    fitted = check_imatrix(matrix(blk__1__attn_q__weight=None), PLAN)
    assert coverage(fitted, PLAN).note.startswith(
        "the importance matrix covers 3 of 4 quantized tensors; the others (first: blk.1.attn_q"
    )
    layers = {t.name for t in quantized_layers(PLAN)}
    tiny = dataclasses.replace(
        PLAN, tensors=tuple(dataclasses.replace(t, type="IQ2_XXS") if t.name in layers else t for t in PLAN.tensors)
    )
    with pytest.raises(
        BadInputError, match=r"blk\.1\.attn_q\.weight is to be IQ2_XXS, which needs an importance matrix"
    ):
        coverage(fitted, tiny)
    coded = dataclasses.replace(PLAN, tensors=tuple(dataclasses.replace(t, scheme=AWQ) for t in PLAN.tensors))
    assert coverage({}, coded).missing == ()


def test_importance_follows_scales_that_moved_from_the_inputs_into_the_weights() -> None:
    factor = torch.arange(1.0, 9)
    folds = {"m.blk.0.attn_q.weight": Fold(columns=factor), "m.experts": Fold(columns=factor.expand(3, 8) * 2)}
    fitted = check_imatrix(matrix(), PLAN)
    moved = after_folds(fitted, PLAN, folds)
    assert moved["blk.0.attn_q.weight"].tolist() == (1 / factor**2).tolist()
    assert np.allclose(moved["blk.0.ffn_up_exps.weight"], (1 / (2 * factor) ** 2).expand(3, 8))
    assert np.array_equal(moved["blk.1.attn_q.weight"], fitted["blk.1.attn_q.weight"])
    assert moved["blk.0.attn_q.weight"].dtype == np.float32
