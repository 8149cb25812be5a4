"""NF4 against bitsandbytes itself: the same integers, not nearly the same."""

import logging

import pytest
import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize import nf4
from vlmexport.quantize.nf4 import NF4_LEVELS, dynamic_codebook, nest_absmax, quantize_nf4, quantize_nf4_nested
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize.tensor import QuantizedTensor

logging.disable(logging.WARNING)  # bitsandbytes says at import which kernels it did not find
functional = pytest.importorskip("bitsandbytes.functional")
logging.disable(logging.NOTSET)

SHAPES = [(1, 256), (24, 512), (7, 768), (130, 1280)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values with outliers, a block of zeros, and values exactly between two levels."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) * 0.02
    made[:, 3] *= 40
    made[0, :64] = 0
    levels = torch.tensor(NF4_LEVELS)
    made[-1, -64:-49] = (levels[:-1] + levels[1:]) / 2
    made[-1, -1] = -1
    return made.to(dtype)


def unpacked(packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """bitsandbytes' bytes as codes: the high nibble is first."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [64, 128, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_scales_and_values_are_bitsandbytes(shape: tuple[int, int], group_size: int, dtype: torch.dtype) -> None:
    w = weight(shape, dtype)
    packed, state = functional.quantize_4bit(w, blocksize=group_size, quant_type="nf4")
    q = quantize_nf4(w, make_scheme("nf4", group_size=group_size))
    assert torch.equal(q.codes, unpacked(packed, shape))
    assert torch.equal(q.scale.reshape(-1), state.absmax)
    assert q.codebook is not None
    assert torch.equal(q.codebook, state.code)
    assert torch.equal(q.dequantize().to(dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [64, 128, 256])
@pytest.mark.parametrize("shape", SHAPES)
def test_nested_scales_are_bitsandbytes(shape: tuple[int, int], group_size: int, dtype: torch.dtype) -> None:
    w = weight(shape, dtype)
    packed, state = functional.quantize_4bit(w, blocksize=group_size, quant_type="nf4", compress_statistics=True)
    scheme = make_scheme("nf4:nested", group_size=group_size)
    q = quantize_nf4_nested(w, scheme)
    nested = nest_absmax(quantize_nf4(w, scheme).scale)
    assert torch.equal(q.codes, unpacked(packed, shape))
    assert torch.equal(nested.codes.reshape(-1), state.absmax)
    assert torch.equal(nested.absmax, state.state2.absmax)
    assert torch.equal(nested.offset, state.offset)
    assert torch.equal(nested.codebook, state.state2.code)
    dequantized = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(q.scale.reshape(-1), dequantized)
    assert torch.equal(nested.dequantize(), q.scale)
    assert torch.equal(q.dequantize().to(dtype), functional.dequantize_4bit(packed, state))


def test_every_value_of_the_table_gets_bitsandbytes_level() -> None:
    grid = (torch.arange(65536, dtype=torch.float64) / 65535 * 2 - 1).float()
    near = torch.cat([grid, grid * (1 + 2e-6), grid * 1e-3, dynamic_codebook()])
    blocks = torch.nn.functional.pad(near, (0, -near.numel() % 255)).reshape(-1, 255)
    absmax = torch.cat([blocks, torch.full((len(blocks), 1), 1.7)], dim=1)
    codes, state = functional.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    nested = nest_absmax(absmax)
    assert torch.equal(nested.codes, codes)
    assert torch.equal(nested.absmax, state.absmax)


def test_the_dynamic_type_is_bitsandbytes() -> None:
    assert torch.equal(dynamic_codebook(), functional.create_dynamic_map())


def test_equal_scales_nest_to_themselves() -> None:
    same = torch.full((4, 4), 0.25)
    nested = nest_absmax(same)
    assert torch.equal(nested.dequantize(), same)
    codes, _ = functional.quantize_blockwise(torch.zeros(4, 4), blocksize=256)
    assert torch.equal(nested.codes, codes)


def test_levels_quantize_to_themselves() -> None:
    w = torch.tensor(NF4_LEVELS).repeat(3, 4)
    assert torch.equal(quantize_nf4(w, make_scheme("nf4")).dequantize(), w)


def test_chunks_do_not_change_the_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weight((24, 512))
    whole = quantize_nf4(w, make_scheme("nf4"))
    monkeypatch.setattr(nf4, "_CHUNK_ELEMENTS", 512 * 5)
    assert quantize_nf4(w, make_scheme("nf4")).digest() == whole.digest()


def test_rows_keep_their_levels() -> None:
    q = quantize_nf4(weight((24, 512)), make_scheme("nf4"))
    part: QuantizedTensor = q.rows(3, 9)
    assert torch.equal(part.dequantize(), q.dequantize()[3:9])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    w = weight((24, 512))
    w[3, 5] = bad
    with pytest.raises(BadInputError, match=r"layers\.0\.up\.weight: the weight holds NaN or infinity"):
        quantize_nf4(w, make_scheme("nf4"), "layers.0.up.weight")


def test_a_group_size_that_does_not_divide_is_refused_with_what_to_do() -> None:
    with pytest.raises(BadInputError, match=r"up: 96 input features .* group size 64; choose a --group-size of 64"):
        quantize_nf4(torch.ones(4, 96), make_scheme("nf4"), "up")


def test_other_sizes_and_asymmetry_are_refused() -> None:
    with pytest.raises(BadInputError, match="group size is 32; nf4 takes 64, 128, 256"):
        make_scheme("nf4", group_size=32)
    with pytest.raises(BadInputError, match="nf4 is always symmetric"):
        make_scheme("nf4", symmetric=False)
