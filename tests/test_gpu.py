"""GPU profiles: every file parses, wrong ones are refused for what is wrong, names are found as people write them."""

import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from vlmexport.errors import BadInputError
from vlmexport.gpu import RTX_NAMES, all_gpus, gpu_names, gpus_by_name, load_gpu, parse_gpu

ASKED_FOR = {
    *("t4", "a10", "a30", "a100-40", "a100-80", "l4", "l40s", "rtx-3090", "rtx-4090", "rtx-5090", "h100", "h200"),
    *("b200", "gb10", "agx-orin-64", "agx-orin-32", "thor"),
}


def raw(name: str = "a100-80") -> dict[str, Any]:
    return tomllib.loads((resources.files("vlmexport.targets") / "trt" / f"{name}.toml").read_text())


def test_every_gpu_that_was_asked_for_ships_and_says_where_its_numbers_are_from() -> None:
    assert set(gpu_names()) == ASKED_FOR
    for gpu in all_gpus():
        assert load_gpu(gpu.name) is gpu
        assert "NVIDIA" in gpu.source
        assert f"{gpu.memory // 10**9} GB" in gpu.title or gpu.name == "gb10"
        assert {*gpu.weights, *gpu.refused} == {"fp16", "int8", "int4"}


def test_numbers_are_in_bytes_and_operations() -> None:
    gpu = load_gpu("a100-80")
    assert (gpu.memory, gpu.bandwidth, gpu.fp16_flops) == (80 * 10**9, 2039e9, 312e12)
    assert isinstance(gpu.memory, int)
    assert (gpu.compute_capability, gpu.rtx, gpu.shared_memory) == ("8.0", "SM80", False)


def test_rtx_builds_for_its_own_architectures_only() -> None:
    built = {gpu.name: gpu.rtx for gpu in all_gpus() if gpu.rtx}
    assert set(built.values()) == set(RTX_NAMES)
    assert not built.keys() & {"h100", "h200", "b200", "agx-orin-64", "agx-orin-32", "thor"}


def test_boards_that_share_their_memory_say_so() -> None:
    assert {gpu.name for gpu in all_gpus() if gpu.shared_memory} == {"gb10", "agx-orin-64", "agx-orin-32", "thor"}


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("a100", "a100-80"),
        ("A100-40", "a100-40"),
        ("A100 80GB", "a100-80"),
        ("RTX_4090", "rtx-4090"),
        (" rtx 4090 ", "rtx-4090"),
        ("4090", "rtx-4090"),
        ("DGX Spark", "gb10"),
        ("orin", "agx-orin-64"),
        ("Jetson-Thor", "thor"),
    ],
)
def test_names_are_found_as_people_write_them(written: str, name: str) -> None:
    assert load_gpu(written).name == name


def test_both_a100_titles_say_which_is_meant_by_a100() -> None:
    assert "80" in load_gpu("a100").title
    assert "a100 alone means this one" in load_gpu("a100-80").note
    assert "a100 alone means the one with 80 GB" in load_gpu("a100-40").note


@pytest.mark.parametrize(
    ("written", "closest"),
    [("a1000", "a100-80, a100-40, a10"), ("rtx4080", "rtx-4090, rtx-5090, rtx-3090"), ("h20", "h200")],
)
def test_an_unknown_gpu_gets_the_closest_names_and_the_list(written: str, closest: str) -> None:
    everything = re.escape(f"choose one of {', '.join(gpu_names())}")
    with pytest.raises(BadInputError, match=f"GPU '{written}' is unknown; closest: {closest}; {everything}"):
        load_gpu(written)


def test_a_name_like_none_gets_the_list_alone() -> None:
    with pytest.raises(BadInputError, match="GPU 'gaudi' is unknown; choose one of t4, "):
        load_gpu("gaudi")


def test_t4_refuses_int4_with_the_reason_and_the_choices() -> None:
    with pytest.raises(
        BadInputError, match=r"t4 takes no int4 weights: TensorRT .*sm75.*; choose --quant fp16 or int8"
    ):
        load_gpu("t4").check_weights("int4")
    load_gpu("t4").check_weights("int8")
    for gpu in all_gpus():
        if gpu.name != "t4":
            gpu.check_weights("int4")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "version must be 1"),
        ("colour", "red", r"missing keys \[\], unknown keys \['colour'\]"),
        ("memory", 80, r"unknown keys \['memory'\]"),
        ("name", "list", "'list' is no name"),
        ("name", "A100", "'A100' is no name"),
        ("name", "", "'' is no name"),
        ("name", 100, "100 is no name"),
        ("aliases", ["list"], "'list' is no name"),
        ("aliases", ["a 100"], "'a 100' is no name"),
        ("aliases", "a100", "aliases must be a list of different texts"),
        ("aliases", ["x", "x"], "aliases must be a list of different texts"),
        ("aliases", [100], "aliases must be a list of different texts"),
        ("title", "", "title must be text"),
        ("source", 3, "source must be text"),
        ("compute_capability", 8.0, "compute_capability must be text"),
        ("compute_capability", "80", "compute_capability '80' is none"),
        ("shared_memory", "no", "shared_memory must be true or false, not 'no'"),
        ("memory_gb", 0, "memory_gb must be a number from 1 to 1024, not 0"),
        ("memory_gb", 80e9, "memory_gb must be a number from 1 to 1024"),
        ("memory_gb", "80", "memory_gb must be a number"),
        ("memory_gb", True, "memory_gb must be a number"),
        ("bandwidth_gb_s", 2.039, "bandwidth_gb_s must be a number from 10 to 100000, not 2.039"),
        ("fp16_tflops", -1, "fp16_tflops must be a number from 1"),
        ("fp16_tflops", float("nan"), "fp16_tflops must be a number from 1"),
        ("rtx", "SM90", "rtx 'SM90' is none of SM75, SM80"),
        ("rtx", "SM89", r"rtx 'SM89' is not compute capability 8.0's, which is SM80"),
        ("rtx", None, "rtx None must be text"),
        ("weights", [], "weights and refused are of fp16, int8, int4; found none"),
        ("weights", ["fp16", "int8", "int4", "fp8"], r"found \['fp8'\]"),
        ("weights", ["fp16", "int8"], r"neither \['int4'\]"),
        ("refused", {"int4": "because"}, r"both \['int4'\]"),
        ("refused", [], "refused must be a table"),
    ],
)
def test_a_wrong_profile_is_refused_for_what_is_wrong(key: str, value: object, message: str) -> None:
    with pytest.raises(BadInputError, match=f"GPU profile mine: .*{message}"):
        parse_gpu({**raw(), key: value}, "mine")


@pytest.mark.parametrize("key", sorted(raw()))
def test_no_key_may_be_missing(key: str) -> None:
    data = raw()
    del data[key]
    with pytest.raises(BadInputError, match="version must be 1" if key == "version" else f"missing keys \\['{key}'\\]"):
        parse_gpu(data, "mine")


@pytest.mark.parametrize("reason", ["", None, True])
def test_a_refusal_needs_its_reason(reason: object) -> None:
    with pytest.raises(BadInputError, match="int4 is refused without a reason"):
        parse_gpu({**raw("t4"), "refused": {"int4": reason}}, "mine")


@pytest.mark.parametrize("alias", ["a100", "a100-80", "a100-40"])
def test_two_profiles_may_not_claim_one_name(alias: str) -> None:
    mine = parse_gpu({**raw("a100-40"), "name": "mine", "aliases": [alias]}, "mine")
    with pytest.raises(BadInputError, match=f"and mine both claim the name '{alias}'"):
        gpus_by_name([*all_gpus(), mine])


def test_a_profile_has_the_name_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (resources.files("vlmexport.targets") / "trt" / "t4.toml").read_text()
    (tmp_path / "t5.toml").write_text(text)
    monkeypatch.setattr("vlmexport.gpu._folder", lambda: tmp_path)
    with pytest.raises(BadInputError, match=r"GPU profile t5.toml: its name is 't4'"):
        all_gpus.__wrapped__()


def test_a_profile_may_not_name_itself_twice() -> None:
    with pytest.raises(BadInputError, match="a100-80 and a100-80 both claim"):
        gpus_by_name([parse_gpu({**raw(), "aliases": ["a100-80"]}, "mine")])
