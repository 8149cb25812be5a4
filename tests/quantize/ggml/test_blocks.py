"""Values to blocks and back; the bytes themselves are in test_references.py."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from vlmexport.errors import BadInputError, NotPossibleHereError
from vlmexport.quantize.ggml import blocks
from vlmexport.quantize.ggml.blocks import dequantize_rows, quantize_rows
from vlmexport.quantize.ggml.types import GGML_TYPES

# These build code books when first used, which takes seconds each; test_references.py has them.
SLOW_TO_START = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
QUICK = [name for name in GGML_TYPES if name not in SLOW_TO_START]
NUMPY = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.fixture
def values() -> NDArray[np.float32]:
    return np.random.RandomState(0).standard_normal((6, 512)).astype(np.float32)


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "library_path", lambda: None)


@pytest.mark.parametrize("name", QUICK)
def test_blocks_read_back_are_near_the_values(name: str, values: NDArray[np.float32]) -> None:
    made = quantize_rows(values, name)
    kind = GGML_TYPES[name]
    error = np.abs(dequantize_rows(made, name) - values).mean()

    assert made.shape == (6, 512 // kind.block * kind.bytes)
    bits = {"F32": 23, "F16": 10, "BF16": 7}.get(name, kind.bits_per_weight)
    assert error <= 4 * 2.0**-bits


@pytest.mark.parametrize("name", QUICK)
def test_dequantized_blocks_are_what_gguf_reads(name: str, values: NDArray[np.float32]) -> None:
    made = quantize_rows(values, name)

    assert np.array_equal(dequantize_rows(made, name), gguf.dequantize(made, gguf.GGMLQuantizationType[name]))


@pytest.mark.parametrize("name", SLOW_TO_START)
def test_random_blocks_of_the_small_types_are_what_gguf_reads(name: str) -> None:
    made = np.random.RandomState(1).randint(0, 256, (4, 2 * GGML_TYPES[name].bytes)).astype(np.uint8)

    ours = dequantize_rows(made, name)
    with np.errstate(invalid="ignore"):
        theirs = gguf.dequantize(made, gguf.GGMLQuantizationType[name])
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("name", NUMPY)
def test_bytes_are_the_converters(name: str, values: NDArray[np.float32]) -> None:
    values[0, :8] = [0.0, -0.0, 1e-8, -6e-8, 1e-39, 65504, 1.00048828125, 1.00390625]
    theirs = gguf.quantize(values, gguf.GGMLQuantizationType[name])

    assert np.array_equal(quantize_rows(values, name), np.ascontiguousarray(theirs).view(np.uint8))


@pytest.mark.parametrize("name", ["BF16", "Q8_0", "Q4_K", "IQ4_XS"])
def test_bytes_do_not_depend_on_threads_chunks_or_layout(
    name: str, values: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    importance = np.linspace(0.1, 2, 512, dtype=np.float32)
    one = quantize_rows(values, name, importance, threads=1)
    monkeypatch.setattr(blocks, "_CHUNK", 512)
    many = quantize_rows(np.asfortranarray(values), name, importance, threads=4)
    slices = [quantize_rows(values[i : i + 2], name, importance) for i in range(0, 6, 2)]

    assert np.array_equal(one, many)
    assert np.array_equal(one, np.concatenate(slices))


def test_float16_values_are_taken_as_they_are(values: NDArray[np.float32]) -> None:
    half = values.astype(np.float16)

    assert np.array_equal(quantize_rows(half, "Q4_K"), quantize_rows(half.astype(np.float32), "Q4_K"))


@pytest.mark.parametrize("name", ["Q4_K", "Q4_0", "IQ4_XS"])
def test_importance_changes_the_bytes(name: str, values: NDArray[np.float32]) -> None:
    importance = np.ones(512, np.float32)
    importance[::7] = 100

    assert not np.array_equal(quantize_rows(values, name, importance), quantize_rows(values, name))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "F16", "Q4_K"])
def test_values_that_are_not_finite_are_refused_by_name(bad: float, name: str, values: NDArray[np.float32]) -> None:
    values[3, 100] = bad

    with pytest.raises(BadInputError, match=r"blk\.1\.attn_q\.weight has values that are NaN or infinite"):
        quantize_rows(values, name, name="blk.1.attn_q.weight")


def test_values_whose_sum_overflows_are_no_damage() -> None:
    values = np.full((1, 512), 3e38, np.float32)

    assert np.array_equal(dequantize_rows(quantize_rows(values, "F32"), "F32"), values)


@pytest.mark.parametrize(
    ("name", "words"), [("F16", "beyond 65504"), ("Q4_0", "half-precision scales"), ("Q4_K", "half")]
)
def test_values_too_large_for_half_precision_are_refused(name: str, words: str, values: NDArray[np.float32]) -> None:
    values[1] *= 1e8

    with pytest.raises(BadInputError, match=words):
        quantize_rows(values, name)


def test_rows_of_no_whole_blocks_are_refused() -> None:
    with pytest.raises(
        BadInputError, match=r"shape \[2, 576\]: rows of 576 values are no whole blocks of 256 \(Q4_K\)"
    ):
        quantize_rows(np.zeros((2, 576), np.float32), "Q4_K")
    with pytest.raises(BadInputError, match=r"\[2, 100\] bytes are no rows of Q4_K blocks of 144 bytes"):
        dequantize_rows(np.zeros((2, 100), np.uint8), "Q4_K")
    with pytest.raises(TypeError, match="float64"):
        quantize_rows(np.zeros((2, 512)), "Q4_K")


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS", "IQ1_S"])
def test_a_type_that_needs_importance_is_refused_without(name: str, values: NDArray[np.float32]) -> None:
    with pytest.raises(BadInputError, match=f"{name} needs the importance of its columns"):
        quantize_rows(values, name)


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (np.ones(256, np.float32), r"importance of shape \[256\] does not fit rows of 512"),
        (np.full(512, -1, np.float32), "negative or not finite"),
        (np.full(512, np.nan, np.float32), "negative or not finite"),
        (np.zeros(512, np.float32), "zero everywhere, so every value would be lost"),
    ],
)
def test_an_importance_that_does_not_fit_is_refused(
    importance: NDArray[np.float32], words: str, values: NDArray[np.float32]
) -> None:
    with pytest.raises(BadInputError, match=words):
        quantize_rows(values, "Q4_K", importance)


@pytest.mark.usefixtures("no_wheel")
@pytest.mark.parametrize("name", NUMPY)
def test_without_the_wheel_gguf_makes_what_it_can(
    name: str, values: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = quantize_rows(values, name)
    read = dequantize_rows(made, name)
    monkeypatch.undo()

    assert np.array_equal(made, quantize_rows(values, name))
    assert np.array_equal(read, dequantize_rows(made, name))


@pytest.mark.usefixtures("no_wheel")
def test_without_the_wheel_the_rest_is_refused_with_what_is_possible(values: NDArray[np.float32]) -> None:
    possible = r"pip install 'vlmexport\[gguf\]'; without them F32, F16, BF16, Q4_0, .*Q8_0 are possible"
    with pytest.raises(NotPossibleHereError, match=f"^Q4_K needs ggml's quantizers: {possible}"):
        quantize_rows(values, "Q4_K")
    with pytest.raises(NotPossibleHereError, match=r"^Q4_0 with an importance matrix needs ggml's quantizers"):
        quantize_rows(values, "Q4_0", np.ones(512, np.float32))
    assert dequantize_rows(np.zeros((1, 144), np.uint8), "Q4_K").shape == (1, 256)
