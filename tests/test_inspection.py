"""What `inspect` and `plan` tell of models whose layers keep states beside keys and values."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.zoo import registry
from tests.zoo.proof import FLOATS
from vlmexport.cli.inspect import print_report
from vlmexport.cli.plan import print_plan
from vlmexport.inspection import InspectReport, Recipe, cache_report
from vlmexport.model.kv import KVGeometry, LayerKV, State
from vlmexport.plan import plan_export
from vlmexport.split.capture import split_model
from vlmexport.target import load_target

MIXED = KVGeometry(3, 2, 4, (None, LayerKV(2, 4), None), (State(0, "conv", (8, 3)), State(2, "conv", (8, 3))))


def test_only_layers_that_keep_keys_and_values_count_and_states_are_told_apart() -> None:
    report = cache_report(MIXED)
    assert (report.layers, report.keeping_layers, report.uniform) == (3, 1, False)
    assert report.bytes_per_token == 2 * 2 * 4 * 2
    assert report.state_bytes == 2 * 8 * 3 * 2
    plain = cache_report(KVGeometry(3, 2, 4))
    assert (plain.keeping_layers, plain.uniform, plain.state_bytes) == (3, True, 0)
    assert plain.bytes_per_token == 3 * report.bytes_per_token


def test_inspect_prints_the_states_and_no_int8_cache_where_layers_differ() -> None:
    def told(kv: KVGeometry) -> str:
        recipe = Recipe(8, 32, True, "vlmexport onnx", "small")
        report = InspectReport(
            "m",
            "M",
            "m",
            "float32",
            1,
            (),
            False,
            None,
            None,
            4,
            {},
            "no pictures",
            cache_report(kv),
            (),
            recipe,
            split_notes=("videos are left out",),
        )
        console = Console(record=True, width=200, file=io.StringIO())
        print_report(report, console)
        return console.export_text()

    mixed = told(MIXED)
    assert "videos are left out" in mixed
    assert "KV cache (FP16): 1 of 3 layers x 2 heads x 4: 32 B per token" in mixed
    assert "states (FP16): 96 B for each sequence, however long it is" in mixed
    assert "--kv-cache int8" not in mixed
    plain = told(KVGeometry(3, 2, 4))
    assert "KV cache (FP16): 3 layers x 2 heads x 4: 96 B per token" in plain
    assert "KV cache (--kv-cache int8): 48 B per token" in plain and "states" not in plain


@pytest.mark.slow
def test_a_plan_counts_and_prints_the_states(tmp_path: Path) -> None:
    vlm, examples = registry.make("lfm2_vl", tmp_path / "model")
    split = split_model(vlm, examples)
    plan = plan_export(vlm, split, load_target("cpu"), FLOATS)
    assert plan.state_bytes == 2 * 128 * 3 * 4
    assert plan.to_dict()["state_bytes"] == plan.state_bytes
    console = Console(record=True, width=200, file=io.StringIO())
    print_plan(plan, console)
    assert "states: 3.07 kB for each sequence, however long it is" in console.export_text()
