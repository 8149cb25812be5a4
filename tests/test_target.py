import tomllib
from importlib import resources

import pytest

from vlmexport.errors import BadInputError
from vlmexport.target import load_target, onnx_target_names, parse_target, target_names


def raw(name: str = "cpu") -> dict[str, object]:
    return tomllib.loads((resources.files("vlmexport.targets") / f"{name}.toml").read_text())


def test_every_profile_that_ships_parses_and_is_named_by_its_file() -> None:
    assert {"cpu", "cuda"} <= set(target_names())
    for name in target_names():
        assert load_target(name).name == name


def test_a_gpu_profile_computes_in_float16_and_a_cpu_profile_does_not() -> None:
    cpu, cuda = load_target("cpu").onnx, load_target("cuda").onnx
    assert (cpu.decoder_dtype, cpu.encoder_arithmetic, cpu.accuracy_level) == ("fp32", "fp32", 4)
    assert (cuda.decoder_dtype, cuda.encoder_arithmetic) == ("fp16", "fp16")


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(BadInputError, match=r"target 'gpu' is unknown; choose one of cpu, cuda"):
        load_target("gpu")


@pytest.mark.parametrize(("table", "key"), [(None, "colour"), ("onnx", "opsett"), ("parity", "top5")])
def test_unknown_keys_are_refused(table: str | None, key: str) -> None:
    data = raw()
    (data if table is None else data[table])[key] = 1  # type: ignore[index]
    with pytest.raises(BadInputError, match=f"unknown keys \\['{key}'\\]"):
        parse_target(data, "cpu")


@pytest.mark.parametrize(
    ("table", "reasons", "message"),
    [
        ("refused_algorithms", {"fp9": "no kernel"}, "refused_algorithms: fp9 is no algorithm"),
        ("refused_algorithms", {"fp8": ""}, "fp8 is refused without a reason"),
        ("refused_algorithms", {"fp8": True}, "fp8 is refused without a reason"),
        ("refused", {"3": ""}, "3 is refused without a reason"),
    ],
)
def test_refusals_name_what_exists_and_say_why(table: str, reasons: dict[str, object], message: str) -> None:
    data = raw()
    data["quantization"][table] = reasons  # type: ignore[index]
    with pytest.raises(BadInputError, match=message):
        parse_target(data, "cpu")


def test_missing_keys_and_foreign_versions_are_refused() -> None:
    data = raw()
    del data["parity"]["vision_rel"]  # type: ignore[attr-defined]
    with pytest.raises(BadInputError, match=r"missing keys \['vision_rel'\]"):
        parse_target(data, "cpu")
    with pytest.raises(BadInputError, match="version must be 1"):
        parse_target({**raw(), "version": 2}, "cpu")


def test_a_target_without_onnx_is_no_choice_for_onnx_graphs() -> None:
    llamacpp = load_target("llamacpp")
    assert "llamacpp" in target_names()
    assert "llamacpp" not in onnx_target_names()
    assert {"cpu", "cuda"} <= set(onnx_target_names())
    with pytest.raises(BadInputError, match=r"target llamacpp takes no ONNX graphs; choose one of cpu, cuda"):
        _ = llamacpp.onnx
    with pytest.raises(BadInputError, match="target llamacpp has no limits for ONNX graphs"):
        _ = llamacpp.parity
    with pytest.raises(BadInputError, match="target cpu has no limits for GGUF files"):
        _ = load_target("cpu").gguf_parity
    assert llamacpp.gguf_parity.weights["Q4_K"] == (0.12, 0.20)


def test_limits_are_needed_for_every_tensor_type() -> None:
    data = raw("llamacpp")
    del data["parity"]["weights"]["Q4_K"]  # type: ignore[index]
    with pytest.raises(BadInputError, match=r"parity.weights: missing types \['Q4_K'\], unknown types \[\]"):
        parse_target(data, "llamacpp")
    data = raw("llamacpp")
    data["parity"]["weights_importance"]["Q4_K"] = 0.1  # type: ignore[index]
    with pytest.raises(BadInputError, match="Q4_K must be two numbers, of a tensor and of its worst block"):
        parse_target(data, "llamacpp")
