"""Predictions: sizes of real models against sums made by hand, the words, and what fits."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.lower.tensorrt.graphs import DecoderShape, decoder_graph
from tests.tiny import make_tiny
from vlmexport.engines import TrtLimits
from vlmexport.errors import BadInputError
from vlmexport.gpu import all_gpus, load_gpu
from vlmexport.model.load import load_vlm
from vlmexport.plan import OnnxOptions, plan_export
from vlmexport.split.capture import split_model
from vlmexport.target import load_target
from vlmexport.trt_prediction import (
    ModelSizes,
    available_bytes,
    check_fits,
    decode_floor,
    largest_fit,
    patches_per_image,
    predict,
    workspace_bytes,
)

# By hand, from the models' configs: matrices and tables only (no norms, no biases). Decoder layers have q, k, v, o and
# a gated MLP; INT4 has 4 bits a weight and a float16 scale for 128.
SMOLVLM_256M_FP16 = ModelSizes(
    vision=172_621_824,  # 2 x (12 x (4 x 768 x 768 + 2 x 768 x 3072) + 768 x 768 patches + 1024 x 768 positions)
    projector=14_155_776,  # 2 x 12288 x 576
    embedding=56_770_560,  # 2 x 49280 x 576
    decoder=269_107_200,  # 2 x (106168320 + 28385280)
    decoder_parameters=106_168_320,  # 30 x (2 x 576 x 576 + 2 x 576 x 192 + 3 x 576 x 1536)
    head_parameters=28_385_280,  # 49280 x 576
    vision_parameters=84_934_656,  # 12 x (4 x 768 x 768 + 2 x 768 x 3072)
    hidden=576,
    intermediate=1536,
    vocab=49280,
    layers=30,
    vision_width=3072,
    patches=1024,
    kv_bytes_per_token=23_040,  # 2 x 30 layers x 3 heads x 64 x 2
)
SMOLVLM_2B_INT4 = ModelSizes(
    vision=825_175_296,
    projector=42_467_328,  # 2 x 10368 x 2048
    embedding=201_338_880,  # 2 x 49155 x 2048
    decoder=882_379_872,  # 1711282176 / 2 + 1711282176 / 128 x 2
    decoder_parameters=1_610_612_736,  # 24 x (4 x 2048 x 2048 + 3 x 2048 x 8192)
    head_parameters=100_669_440,
    vision_parameters=411_070_464,  # 27 x (4 x 1152 x 1152 + 2 x 1152 x 4304)
    hidden=2048,
    intermediate=8192,
    vocab=49155,
    layers=24,
    vision_width=4304,
    patches=729,
    kv_bytes_per_token=196_608,  # 2 x 24 x 32 x 64 x 2
)
QWEN_3B_INT4 = ModelSizes(
    vision=1_262_940_160,
    projector=0,
    embedding=622_329_856,
    decoder=1_591_062_528,
    decoder_parameters=2_774_532_096,  # 36 x (2 x 2048 x 2048 + 2 x 2048 x 256 + 3 x 2048 x 11008)
    head_parameters=311_164_928,
    vision_parameters=629_964_800,  # 32 x (4 x 1280 x 1280 + 3 x 1280 x 3420)
    hidden=2048,
    intermediate=11008,
    vocab=151936,
    layers=36,
    vision_width=3420,
    patches=4096,
    kv_bytes_per_token=36_864,  # 2 x 36 x 2 x 128 x 2
)
QWEN_7B_FP16 = dataclasses.replace(
    QWEN_3B_INT4,
    embedding=1_089_994_752,
    decoder=14_140_571_648,  # 2 x (6525288448 + 544997376)
    decoder_parameters=6_525_288_448,  # 28 x (2 x 3584 x 3584 + 2 x 3584 x 512 + 3 x 3584 x 18944)
    head_parameters=544_997_376,
    hidden=3584,
    intermediate=18944,
    vocab=152064,
    layers=28,
    kv_bytes_per_token=57_344,  # 2 x 28 x 4 x 128 x 2
)
ONE, FOUR = TrtLimits(1, 2048, 1), TrtLimits(4, 4096, 5)


@pytest.mark.parametrize(
    ("sizes", "gpu", "limits", "bytes_", "fits", "ms"),
    [
        # weights, KV cache, workspace, total; decode of one row, prefill, vision
        (
            *(SMOLVLM_256M_FP16, "t4", ONE, (512_655_360, 47_185_920, 97_442_944, 1_286_429_824), True),
            (0.9884196, 6.691110912, 2.6760950075),
        ),
        (
            *(SMOLVLM_256M_FP16, "a100", FOUR, (512_655_360, 377_487_360, 526_847_104, 2_046_135_424), True),
            (0.1782639490, 2.7877809231, 2.7875989662),
        ),
        (
            *(SMOLVLM_2B_INT4, "a100", FOUR, (1_951_361_376, 3_221_225_472, 1_373_756_032, 7_175_488_480), True),
            (0.8277049220, 42.2895540775, 9.6048194954),
        ),
        (
            *(QWEN_3B_INT4, "a100", FOUR, (3_476_332_544, 603_979_776, 2_098_564_224, 6_808_022_144), True),
            (0.8543705581, 72.8512476291, 82.7030711795),
        ),
        (
            *(QWEN_7B_FP16, "t4", ONE, (16_493_506_560, 117_440_512, 450_825_344, 17_690_918_016), False),
            (44.5563104, 411.2103304271, 79.3949483323),
        ),
        (
            *(QWEN_7B_FP16, "a100", FOUR, (16_493_506_560, 939_524_096, 3_080_047_744, 21_142_224_000), True),
            (7.0502500441, 171.3341441050, 82.7030711795),
        ),
    ],
)
def test_real_models_by_hand(
    sizes: ModelSizes, gpu: str, limits: TrtLimits, bytes_: tuple[int, ...], fits: bool, ms: tuple[float, ...]
) -> None:
    made = predict(load_gpu(gpu), sizes, limits)
    assert (made.weights, made.kv_cache, made.workspace, made.total) == bytes_
    assert made.runtime == 629_145_600
    assert made.fits is fits
    floors = (made.decode, made.prefill, made.vision)
    assert [round(f.seconds * 1e3, 10) for f in floors] == pytest.approx(list(ms), abs=1e-10)


def test_two_decoder_engines_hold_the_weights_twice() -> None:
    twice = dataclasses.replace(SMOLVLM_256M_FP16, decoder_engines=2)
    assert twice.weights == SMOLVLM_256M_FP16.weights + 269_107_200
    assert "2 x 0.269 GB decoder" in "\n".join(predict(load_gpu("t4"), twice, ONE).lines())


def test_what_is_usable() -> None:
    assert available_bytes(load_gpu("rtx-4090")) == 23_500_000_000
    assert available_bytes(load_gpu("agx-orin-32")) == 28_000_000_000
    assert all(available_bytes(gpu) < gpu.memory for gpu in all_gpus())


def test_the_formulas_carry_their_numbers() -> None:
    lines = predict(load_gpu("a100"), QWEN_3B_INT4, FOUR).lines()
    assert lines == [
        "memory on a100-80, 4 x 4096 tokens, 5 images: 6.81 GB of 79.5 GB usable, fits (predicted)",
        "  weights: 1.26 GB vision + 0 GB projector + 0.622 GB embedding + 1.59 GB decoder = 3.48 GB",
        "  KV cache, allocated whole: 4 x 4096 tokens x 36864 bytes = 0.604 GB",
        "  workspace: 4 x 4096 tokens a call x (2 x 4096 mask + 6 x (2048 + 11008) activations + 2 x 2048 "
        "embeddings) bytes + 5 x 4096 patches x 8 x 3420 bytes + logits 4 x 8 x 151936 x 4 bytes + 2 x 0.017 GB "
        "scratch = 2.1 GB",
        "  CUDA context and kernels: 0.629 GB (an allowance)",
        "  usable: 80 GB - 0.5 GB for the driver = 79.5 GB",
        "times on a100-80: floors by data-sheet rates, never measurements "
        "(NVIDIA A100 datasheet (SXM; PCIe has 1935 GB/s))",
        "  decode, 1 row with 4096 tokens each in the cache: (1.59 GB weights + 0.151 GB cache) / 2039 GB/s = "
        "0.854 ms per token (arithmetic: 0.0198 ms)",
        "  decode, 4 rows with 4096 tokens each in the cache: (1.59 GB weights + 0.604 GB cache) / 2039 GB/s = "
        "1.08 ms per step of 4 tokens (arithmetic: 0.0791 ms)",
        "  prefill of 4096 tokens: 2 x (2.77 G parameters x 4096 tokens + 311 M of the LM head) / 312 TFLOPS = "
        "72.9 ms per prompt (memory: 0.78 ms)",
        "  vision encoder, 5 images: 2 x 630 M parameters x 5 x 4096 patches / 312 TFLOPS = 82.7 ms per call "
        "(memory: 0.619 ms)",
    ]
    assert not any("[" in line for line in lines)


def test_shorter_calls_need_less_workspace_and_the_same_cache() -> None:
    gpu = load_gpu("rtx-4090")
    whole, pieces = (predict(gpu, QWEN_3B_INT4, TrtLimits(8, 16384, 1, prompt)) for prompt in (0, 2048))
    assert whole.kv_cache == pieces.kv_cache
    assert pieces.workspace < whole.workspace / 4
    assert not whole.fits and pieces.fits


def test_one_row_has_one_decode_line_and_shared_memory_is_said() -> None:
    text = "\n".join(predict(load_gpu("orin"), SMOLVLM_256M_FP16, ONE).lines())
    assert text.count("decode, ") == 1
    assert "64 GB - 8 GB for the system = 56 GB" in text
    assert ", 1 image: " in text


def test_a_large_batch_makes_arithmetic_the_floor_of_decoding() -> None:
    floor = decode_floor(load_gpu("t4"), SMOLVLM_256M_FP16, 512, 1)
    assert floor.seconds == floor.arithmetic_seconds > floor.memory_seconds
    assert (
        "135 M parameters x 512 tokens / 65 TFLOPS = 2.12 ms per step of 512 tokens (memory: 0.88 ms)" in floor.formula
    )


def test_json_has_the_same_numbers_and_says_what_they_are() -> None:
    made = predict(load_gpu("t4"), QWEN_7B_FP16, ONE)
    data = json.loads(json.dumps(made.to_dict()))
    assert data["gpu"] == "t4"
    assert data["limits"] == {"max_batch": 1, "max_seq": 2048, "max_images": 1, "max_prompt": 0}
    assert data["memory"]["total"] == 17_690_918_016
    assert data["memory"]["fits"] is False
    assert len(data["memory_formulas"]) == 5
    assert data["floors"]["note"] == "floors by data-sheet rates, never measurements"
    assert data["floors"]["decode"]["seconds"] == made.decode.seconds
    assert data["floors"]["decode"]["formula"] == made.decode.formula
    assert data["sizes"]["kv_bytes_per_token"] == 57_344


@pytest.mark.parametrize("field", ["max_batch", "max_seq", "max_images"])
def test_more_needs_more(field: str) -> None:
    gpu, needs = load_gpu("a100"), []
    for n in (1, 2, 3, 100, 1000):
        made = predict(gpu, QWEN_3B_INT4, dataclasses.replace(FOUR, **{field: n}))
        needs.append((made.total, made.decode_batch.seconds + made.prefill.seconds + made.vision.seconds))
    assert needs == sorted(set(needs))


def test_a_faster_gpu_has_lower_floors() -> None:
    h100, h200, l4 = (predict(load_gpu(name), QWEN_3B_INT4, ONE) for name in ("h100", "h200", "l4"))
    assert h200.decode.seconds < h100.decode.seconds < l4.decode.seconds
    assert h200.prefill.seconds == h100.prefill.seconds < l4.prefill.seconds


@pytest.mark.parametrize("limits", [FOUR, TrtLimits(64, 32768, 1), TrtLimits(1, 1, 1)])
@pytest.mark.parametrize("sizes", [SMOLVLM_256M_FP16, SMOLVLM_2B_INT4, QWEN_7B_FP16])
def test_the_largest_fit_fits_and_one_more_does_not(sizes: ModelSizes, limits: TrtLimits) -> None:
    gpu = load_gpu("rtx-4090")
    fit = largest_fit(gpu, sizes, limits)
    for changes, key in (
        ({"max_batch": fit.batch}, "max_batch"),
        ({"max_seq": fit.length}, "max_seq"),
        ({"max_batch": 1, "max_seq": fit.alone}, "max_seq"),
    ):
        assert not predict(gpu, sizes, dataclasses.replace(limits, **{**changes, key: changes[key] + 1})).fits
        assert changes[key] == 0 or predict(gpu, sizes, dataclasses.replace(limits, **changes)).fits


def test_what_fits_is_returned() -> None:
    made = check_fits(load_gpu("a100"), QWEN_3B_INT4, FOUR)
    assert made == predict(load_gpu("a100"), QWEN_3B_INT4, FOUR)


def test_what_does_not_fit_is_refused_with_what_does() -> None:
    gpu, limits = load_gpu("rtx-4090"), TrtLimits(64, 32768, 1)
    fit = largest_fit(gpu, QWEN_3B_INT4, limits)
    assert min(fit.batch, fit.length) > 0
    words = (
        "--max-batch 64 --max-seq 32768 (--max-prompt 32768) need 392 GB (3.48 GB weights, 77.3 GB KV cache, 311 GB "
        "workspace, 0.629 GB CUDA context), rtx-4090 has 24 GB (23.5 GB usable); "
        f"the largest that fits: batch {fit.batch} at 32768 tokens, or batch 64 at {fit.length} tokens"
    )
    with pytest.raises(BadInputError, match=f"^{re.escape(words)}$"):
        check_fits(gpu, QWEN_3B_INT4, limits)


def test_where_neither_limit_can_stay_one_row_is_offered() -> None:
    limits = TrtLimits(100_000, 1_000_000, 1)
    with pytest.raises(BadInputError, match=r"; the largest that fits: batch 1 at \d{5} tokens$"):
        check_fits(load_gpu("rtx-4090"), SMOLVLM_2B_INT4, limits)


def test_where_the_weights_alone_are_too_much_it_says_so() -> None:
    with pytest.raises(
        BadInputError, match=r"t4 has 16 GB \(15.5 GB usable\); not even a batch of 1 with 1 token fits"
    ):
        check_fits(load_gpu("t4"), QWEN_7B_FP16, ONE)


@pytest.mark.parametrize(
    ("vision", "patches"),
    [
        ({"image_size": 512, "patch_size": 16}, 1024),
        ({"image_size": 378, "patch_size": 14}, 729),
        ({"image_size": (448, 224), "patch_size": [14, 14]}, 512),
        ({"patch_size": 14}, 0),
        ({"image_size": None, "patch_size": 14}, 0),
    ],
)
def test_patches_by_the_config(vision: dict[str, object], patches: int) -> None:
    assert patches_per_image(SimpleNamespace(vision_config=SimpleNamespace(**vision))) == patches


def test_without_a_vision_config_the_patches_are_unknown() -> None:
    assert patches_per_image(SimpleNamespace()) == 0


def test_sizes_of_a_plan(tmp_path: Path) -> None:
    vlm = load_vlm(str(make_tiny("llava", tmp_path / "model", tied=True)))
    split = split_model(vlm)
    target = load_target("tensorrt")
    options = OnnxOptions("tensorrt", "tensorrt", scheme=None, attention="static", cache_length=64)
    plan = plan_export(vlm, split, target, options)
    sizes = ModelSizes.from_plan(plan, vlm, patches_per_image(vlm.config))
    # TinySpec: 2 layers, hidden 128, MLP 256, 4 heads and 2 KV heads of 32, vocabulary 448 (rows of the table), CLIP of
    # 3 layers (the last one unused), hidden 64.
    vocab = vlm.facts.vocab_size
    assert sizes.decoder_parameters == 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 256)
    assert (sizes.head_parameters, sizes.embedding) == (vocab * 128, 2 * vocab * 128)
    assert (sizes.hidden, sizes.intermediate, sizes.layers, sizes.kv_bytes_per_token) == (
        128,
        256,
        2,
        2 * 2 * 2 * 32 * 2,
    )
    assert sizes.patches == (32 // 8) ** 2
    assert sizes.weights == plan.bytes_after
    vision = [w for w in plan.weights if w.part == "vision_encoder" and w.action == "keep" and ".layers." in w.name]
    assert sizes.vision_parameters == sum(w.elements for w in vision if len(w.shape) == 2)
    assert sizes.vision_width == max(max(w.shape) for w in vision)
    two = ModelSizes.from_plan(plan, vlm, 0, two_decoders=True)
    assert (two.patches, two.weights) == (0, plan.bytes_after + sizes.decoder)


@pytest.mark.parametrize(
    ("weights", "shape", "batch"),
    [
        ("fp16", DecoderShape(512, 2, 8, 2, 64, 2048, 8000, 2048), 2),
        ("int4", DecoderShape(1024, 2, 16, 4, 64, 4096, 8000, 1024), 8),
    ],
)
def test_the_workspace_is_that_of_the_builder_and_a_little_more(weights: str, shape: DecoderShape, batch: int) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="the extra `rtx` is not installed")
    sizes = dataclasses.replace(
        SMOLVLM_256M_FP16, hidden=shape.hidden, intermediate=shape.intermediate, vocab=shape.vocab, patches=0
    )
    limits = TrtLimits(batch, shape.cache, 1)
    tokens, logits = batch * shape.cache, batch * 8 * shape.vocab * 4
    decoder = (
        workspace_bytes(sizes, limits) - tokens * shape.hidden * 2 - logits - 17_000_000
    )  # buffers, vision scratch
    said = builder_activations(trt, decoder_graph(shape, weights).SerializeToString(), limits)  # type: ignore[arg-type]
    assert said <= decoder <= 1.25 * said


def builder_activations(trt: object, model: bytes, limits: TrtLimits) -> int:
    """ "Total Activation Memory" that RTX's builder logs for a decoder and its prefill profile, in bytes."""
    found: list[int] = []

    class Log(trt.ILogger):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # type: ignore[attr-defined]

        def log(self, severity: object, message: str) -> None:
            said = re.match(r"Total Activation Memory: (\d+) bytes", message)
            found.extend([int(said[1])] if said else [])

    log = Log()
    builder = trt.Builder(log)  # type: ignore[attr-defined]
    network = builder.create_network(0)
    assert trt.OnnxParser(network, log).parse(model)  # type: ignore[attr-defined]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM80, 0)  # type: ignore[attr-defined]
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        rest = tuple(tensor.shape)[1:]
        largest = {"inputs_embeds": (limits.max_seq, *rest[1:]), "logits_positions": (8,)}.get(tensor.name, rest)
        smallest = tuple(1 if d == -1 else d for d in rest)
        profile.set_shape(tensor.name, (1, *smallest), (1, *smallest), (limits.max_batch, *largest))
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    return found[0]
