"""GPTQ and AWQ words against decoders written here, one element at a time, from the formats' descriptions."""

from pathlib import Path

import pytest
import torch

from tests.lower.checkpoint.conftest import Write, quantization_config, tensors
from vlmexport.checkpoint_plan import CheckpointOptions, CheckpointPlan
from vlmexport.errors import BadInputError
from vlmexport.lower.checkpoint.gptq import V1, Gptq
from vlmexport.lower.checkpoint.layout import Subject
from vlmexport.lower.checkpoint.names import Names
from vlmexport.model.load import load_vlm
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.quantize.weights import DecoderWeights, quantize_data_free

MODULE, WEIGHT = (
    "language_model.model.layers.0.self_attn.k_proj",
    "model.language_model.layers.0.self_attn.k_proj.weight",
)


def expected(source: Path, scheme: QuantScheme) -> QuantizedTensor:
    return quantize_data_free(dict(load_vlm(str(source)).model.named_parameters())[WEIGHT], scheme)


def bits_at(words: list[int], start: int, width: int) -> int:
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return (number >> start) & ((1 << width) - 1)


def dequantize_gptq(stored: dict[str, torch.Tensor], bits: int, offset: int) -> torch.Tensor:
    qweight, qzeros, scales = (stored[f"{MODULE}.{name}"] for name in ("qweight", "qzeros", "scales"))
    groups = stored[f"{MODULE}.g_idx"].tolist()
    out = torch.empty(scales.shape[1], len(groups))
    zeros = [[bits_at(row.tolist(), n * bits, bits) + offset for n in range(out.shape[0])] for row in qzeros]
    for n in range(out.shape[0]):
        column = qweight[:, n].tolist()
        for k, group in enumerate(groups):
            out[n, k] = (bits_at(column, k * bits, bits) - zeros[group][n]) * scales[group, n].float()
    return out


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (3, False), (2, True)])
def test_gptq_decodes_element_by_element(write: Write, source: Path, bits: int, symmetric: bool) -> None:
    folder = write("gptq", bits=bits, symmetric=symmetric, group_size=64)
    config = quantization_config(folder)
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (bits, 64, symmetric, False)
    found = dequantize_gptq(tensors(folder), bits, offset=1 if symmetric else 0)
    assert torch.equal(found, expected(source, make_scheme("rtn", bits, 64, symmetric)).dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_decodes_element_by_element(write: Write, source: Path, symmetric: bool) -> None:
    stored = tensors(write("awq", symmetric=symmetric))
    qweight, qzeros, scales = (stored[f"{MODULE}.{name}"] for name in ("qweight", "qzeros", "scales"))
    nibble_of = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # of output n mod 8 in its word
    out = torch.empty(scales.shape[1], qweight.shape[0])
    for n in range(out.shape[0]):
        shift = 4 * nibble_of[n % 8]
        for k in range(out.shape[1]):
            zero = (int(qzeros[k // 32, n // 8]) >> shift) & 15
            out[n, k] = (((int(qweight[k, n // 8]) >> shift) & 15) - zero) * scales[k // 32, n].float()
    assert torch.equal(out, expected(source, make_scheme("rtn", symmetric=symmetric)).dequantize())


def test_version_1_refuses_a_zero_point_of_zero() -> None:
    options = CheckpointOptions("gptq", make_scheme("rtn", symmetric=False))
    plan = CheckpointPlan("Any", options, (), ())
    layout = Gptq(Subject(plan, DecoderWeights({}), Names({}, ()), "float32"), V1)
    codes, one = torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1, dtype=torch.uint8)
    tensor = QuantizedTensor(codes, torch.ones(8, 1).half(), one, 4, 32)
    assert layout.pack("w", tensor, options.scheme)["qzeros"].tolist() == [[0]]
    zero = QuantizedTensor(codes, torch.ones(8, 1).half(), one - 1, 4, 32)
    with pytest.raises(BadInputError, match="zero point of 0"):
        layout.pack("w", zero, options.scheme)


def test_rows_that_do_not_fill_words_are_refused() -> None:
    options = CheckpointOptions("gptq", make_scheme("rtn"))
    layout = Gptq(Subject(CheckpointPlan("Any", options, (), ()), DecoderWeights({}), Names({}, ()), "float32"), V1)
    tensor = QuantizedTensor(torch.zeros(6, 32, dtype=torch.uint8), torch.ones(6, 1).half(), None, 4, 32)
    with pytest.raises(BadInputError, match=r"6 output features.*--keep 'w'"):
        layout.pack("w", tensor, options.scheme)
