"""Through transformers: torchao's tensors mean what the codes mean, in the checkpoint's own dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lower.checkpoint.conftest import Write
from vlmexport.model.load import load_vlm
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize.weights import quantize_data_free

pytest.importorskip("torchao")
WEIGHT = "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("quant", ["torchao:int4wo", "torchao:int8da-int8w"])
def test_transformers_loads_the_codes(write: Write, source: Path, quant: str) -> None:
    from transformers import AutoModelForImageTextToText

    load: Any = AutoModelForImageTextToText.from_pretrained
    loaded = load(write("torchao", quant)).get_parameter(WEIGHT)
    assert loaded.dtype == torch.bfloat16
    weight = dict(load_vlm(str(source)).model.named_parameters())[WEIGHT]
    expected = quantize_data_free(weight, make_scheme(quant))
    assert torch.equal(loaded.qdata, (expected.codes.to(torch.int16) - (1 << (expected.bits - 1))).to(torch.int8))
    assert torch.equal(loaded.scale, expected.scale)
    assert torch.equal(loaded.dequantize(), expected.dequantize().bfloat16())
