"""What `vlmexport trt` decides before any work: weights, engines, sizes, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.tiny import make_tiny
from vlmexport import demo
from vlmexport.engines import TrtLimits
from vlmexport.errors import BadInputError, NotPossibleHereError, UnsupportedModelError
from vlmexport.gpu import load_gpu
from vlmexport.kept_codes import fitting_group
from vlmexport.model.load import VLM, load_vlm
from vlmexport.model.pictures import EachPicture
from vlmexport.split.capture import split_model
from vlmexport.split.parts import Split
from vlmexport.trt_options import TrtOptions, trt_onnx_options, trt_scheme
from vlmexport.trt_plan import check_trt_options, decide_engines, plan_trt
from vlmexport.trt_shapes import images_of_a_picture, vision_axes

RTX = "1.7.1.116"


@pytest.fixture(scope="module")
def model() -> tuple[VLM, Split]:
    vlm = load_vlm(str(demo.model_dir()))
    return vlm, split_model(vlm)


def options(quant: str = "int4", gpu: str = "a100", **more: object) -> TrtOptions:
    names = {field.name for field in dataclasses.fields(TrtOptions)}
    own = {key: value for key, value in more.items() if key in names}
    onnx = {key: value for key, value in more.items() if key not in names}
    return TrtOptions(trt_onnx_options(trt_scheme(quant), **onnx), gpu, **own)  # type: ignore[arg-type]


def test_precisions_and_algorithms_become_schemes() -> None:
    int4, int8 = trt_scheme("int4"), trt_scheme("int8")
    assert int4 is not None and (int4.algorithm, int4.bits, int4.group_size, int4.symmetric) == (
        "awq+gptq",
        4,
        128,
        True,
    )
    assert int8 is not None and (int8.algorithm, int8.bits, int8.group_size) == ("rtn", 8, -1)
    assert trt_scheme("fp16") is None
    gptq = trt_scheme("gptq", bits=8)
    assert gptq is not None and gptq.group_size == -1


@pytest.mark.parametrize(
    ("quant", "more", "message"),
    [
        ("fp16", {"bits": 4}, "have no effect with --quant fp16"),
        ("int8", {"bits": 4}, "--bits has no effect with --quant int8"),
        ("int3", {}, "'int3' is unknown; choose one of fp16, int4"),
    ],
)
def test_what_has_no_effect_is_refused(quant: str, more: dict[str, int], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        trt_scheme(quant, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (options(gpu="a1000"), "a100"),
        (options(gpu="t4"), "takes no int4 weights"),
        (options("hqq"), "takes no zero points"),
        (options("nf4"), "NF4"),
        (options(max_batch=0), "--max-batch is 0; it must be 1 or more"),
        (options(max_seq=1), "--max-seq is 1; it must be 2 or more"),
        (options(max_images=0), "--max-images is 0; it must be 1 or more"),
        (options(max_prompt=0), "--max-prompt is 0; it must be 1 or more"),
        (options(engines=True, backend="script"), "exclude each other"),
        (options(portable=True, backend="script"), "--portable has no effect"),
        (options(portable=True, engines=False), "--portable has no effect"),
        (options(portable=True, backend="trt"), "--portable needs TensorRT for RTX"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(wanted: TrtOptions, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        check_trt_options(wanted, RTX)


def test_groups_that_the_parser_refuses_are_refused() -> None:
    scheme = trt_scheme("rtn", group_size=16)
    with pytest.raises(BadInputError, match="group size is 16; 4-bit weights of target tensorrt take 128 or 64 or 32"):
        check_trt_options(TrtOptions(trt_onnx_options(scheme), "a100"), RTX)
    scheme = trt_scheme("rtn", bits=8, group_size=32)
    with pytest.raises(BadInputError, match=r"group size is 32; 8-bit weights of target tensorrt take -1 \(one scale"):
        check_trt_options(TrtOptions(trt_onnx_options(scheme), "a100"), RTX)


def test_who_builds_engines() -> None:
    a100, h100 = load_gpu("a100"), load_gpu("h100")
    assert decide_engines(options(), a100, RTX).builder == "rtx"
    assert decide_engines(options(portable=True), a100, RTX).builder == "rtx"
    for name in ("t4", "h100", "agx-orin-64"):
        refused = decide_engines(options(portable=True), load_gpu(name), RTX)
        assert refused.builder == "" and "a portable engine" in refused.reason
    nobody = decide_engines(options(), h100, RTX)
    assert nobody.builder == "" and "no target for NVIDIA H100" in nobody.reason
    missing = decide_engines(options(), a100, None)
    assert missing.builder == "" and "pip install 'vlmexport[rtx]'" in missing.reason
    assert decide_engines(options(engines=False), a100, RTX).reason == "--no-engines was given"
    assert decide_engines(options(backend="script"), a100, RTX).reason == "--backend script was given"
    assert "TensorRT" in decide_engines(options(backend="trt"), a100, RTX).reason


@pytest.mark.parametrize(
    ("wanted", "version", "message"),
    [
        (options(gpu="h100", engines=True), RTX, "engine not built: .* no target for NVIDIA H100"),
        (options(gpu="h100", engines=True, portable=True), RTX, "engine not built: a portable engine"),
        (options(gpu="h200", backend="rtx"), RTX, "engine not built: .* no target for NVIDIA H200"),
        (options(engines=True), None, "engine not built: .*pip install 'vlmexport\\[rtx\\]'"),
        (options(backend="rtx"), None, "pip install 'vlmexport\\[rtx\\]'"),
        (options(backend="trt", engines=True), RTX, "engine not built: "),
    ],
)
def test_engines_that_were_asked_for_and_cannot_be_built_end_it(
    wanted: TrtOptions, version: str | None, message: str
) -> None:
    with pytest.raises(NotPossibleHereError, match=message):
        check_trt_options(wanted, version)


def test_the_plan_of_the_bundled_model(model: tuple[VLM, Split]) -> None:
    plan = plan_trt(*model, options(max_seq=512, max_batch=2), RTX)
    assert plan.gpu.name == "a100-80"
    assert plan.limits == TrtLimits(2, 512, 6, 512)
    assert {scheme.group_size for scheme in plan.export.schemes.values()} == {128}
    assert plan.prediction.fits and plan.engines.builder == "rtx"
    assert plan.vision_axes["num_images"] == (1, 6, 6)
    data = plan.to_dict()
    assert data["gpu"]["name"] == "a100-80" and data["limits"]["max_seq"] == 512


def test_fewer_images_than_a_picture_has_are_noted(model: tuple[VLM, Split]) -> None:
    (note,) = plan_trt(*model, options(max_seq=64, max_images=2), RTX).notes
    assert note.startswith("--max-images 2 is fewer than the 6 images")
    assert plan_trt(*model, options(max_seq=64, max_images=6), RTX).notes == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": "image_blocks", "extras": ("block_ids",)}, "its decoder takes block_ids beside embeddings"),
        ({"extras": ("position_ids", "deepstack_embeds")}, "takes position_ids, deepstack_embeds beside embeddings"),
        ({"pictures": EachPicture(1)}, "takes one picture of any size at a time"),
    ],
)
def test_models_that_engines_are_not_made_for_are_refused(
    change: dict[str, object], words: str, model: tuple[VLM, Split]
) -> None:
    vlm, split = model
    other = dataclasses.replace(split, merge=dataclasses.replace(split.merge, **change))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=words):
        plan_trt(vlm, other, options(max_seq=64), RTX)


def test_a_cache_longer_than_the_positions_is_refused(model: tuple[VLM, Split]) -> None:
    positions = model[0].model.config.get_text_config().max_position_embeddings
    with pytest.raises(BadInputError, match=f"--max-seq is {positions + 1}; idefics3 has {positions} positions"):
        plan_trt(*model, options(max_seq=positions + 1), RTX)
    assert plan_trt(*model, options(), RTX).limits.max_seq == min(4096, positions)


def test_a_cache_that_does_not_fit_names_the_largest_that_does(model: tuple[VLM, Split]) -> None:
    with pytest.raises(BadInputError, match=r"rtx-4090 has 24.* GB .*the largest that fits: batch \d+ at 1024 tokens"):
        plan_trt(*model, options(gpu="rtx-4090", max_batch=10**6, max_seq=1024), RTX)


def test_the_block_gives_way_to_the_models_widths_unless_it_was_named(tmp_path: Path) -> None:
    folder = make_tiny("llava", tmp_path / "m", intermediate=288)
    vlm = load_vlm(str(folder))
    split = split_model(vlm)
    plan = plan_trt(vlm, split, options("rtn", max_seq=256), RTX)
    assert {scheme.group_size for scheme in plan.export.schemes.values()} == {32}
    with pytest.raises(BadInputError, match="not a multiple of group size 128"):
        plan_trt(vlm, split, options("rtn", max_seq=256, group_named=True), RTX)


def test_groups_are_the_largest_that_divide() -> None:
    sizes = (128, 64, 32)
    assert [fitting_group({n}, sizes, "w") for n in (256, 192, 96)] == [128, 64, 32]
    assert fitting_group({256, 96}, sizes, "w") == 32
    assert fitting_group({40}, (32, -1), "w") == -1
    with pytest.raises(BadInputError, match="w has 40 input features, not a multiple of 32"):
        fitting_group({256, 40}, sizes, "w")


def test_sizes_of_the_vision_side_grow_with_the_limit(model: tuple[VLM, Split]) -> None:
    vlm, split = model
    assert images_of_a_picture(vlm, split) == 6
    assert vision_axes(split, TrtLimits(1, 64, 12))["num_images"] == (1, 6, 12)
    assert vision_axes(split, TrtLimits(1, 64, 2))["num_images"] == (1, 2, 2)
