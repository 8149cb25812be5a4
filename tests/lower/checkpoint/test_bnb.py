"""Against bitsandbytes: its own QuantState dequantizes our tensors to what the codes mean."""

from pathlib import Path

import pytest
import torch

from tests.lower.checkpoint.conftest import Write, tensors
from vlmexport.model.load import load_vlm
from vlmexport.quantize.scheme import make_scheme
from vlmexport.quantize.weights import quantize_data_free

functional = pytest.importorskip("bitsandbytes.functional")
MODULE, WEIGHT = "language_model.model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("quant", ["nf4", "nf4:nested"])
def test_its_state_dequantizes_to_the_codes(write: Write, source: Path, quant: str) -> None:
    stored = tensors(write("bnb-nf4", quant))
    parts = {k.removeprefix(MODULE + ".weight."): t for k, t in stored.items() if k.startswith(MODULE + ".weight.")}
    state = functional.QuantState.from_dict(parts, torch.device("cpu"))
    assert state.dtype == torch.bfloat16
    assert state.nested == (quant == "nf4:nested")
    state.dtype = torch.float32
    found = functional.dequantize_4bit(stored[f"{MODULE}.weight"], state)
    weight = dict(load_vlm(str(source)).model.named_parameters())[WEIGHT]
    assert torch.equal(found, quantize_data_free(weight, make_scheme(quant)).dequantize())


def test_the_bytes_are_those_of_its_own_quantizer(write: Write, source: Path) -> None:
    stored = tensors(write("bnb-nf4", "nf4"))
    weight = dict(load_vlm(str(source)).model.named_parameters())[WEIGHT].detach()
    packed, state = functional.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")
    assert torch.equal(stored[f"{MODULE}.weight"], packed)
    assert torch.equal(stored[f"{MODULE}.weight.absmax"], state.absmax)
