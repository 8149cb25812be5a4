"""bitsandbytes NF4 checkpoints, packed by that library itself: codes, meaning, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from tests.model.importers.encoders import Tensors, is_decoder_linear, rewrite
from tests.model.test_load import edit_config, edit_weights
from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.load import load_vlm

V_PROJ = "model.text_model.layers.0.self_attn.v_proj.weight"
STATE = f"{V_PROJ}.quant_state.bitsandbytes__nf4"


class Library:
    """An `Encode` that has bitsandbytes quantize, and keeps what it dequantizes to."""

    def __init__(self, nested: bool, block: int = 64) -> None:
        self.meaning: dict[str, torch.Tensor] = {}
        self._nested, self._block = nested, block

    def __call__(self, name: str, tensor: torch.Tensor) -> Tensors | None:
        if not is_decoder_linear(name):
            return None
        packed, state = bnb.quantize_4bit(
            tensor.float(), blocksize=self._block, compress_statistics=self._nested, quant_type="nf4"
        )
        self.meaning[name] = bnb.dequantize_4bit(packed, state).float()
        parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        return {"weight": packed, **parts}


def make(source: Path, folder: Path, *, nested: bool = False, block: int = 64) -> tuple[Path, Library]:
    library = Library(nested, block)
    config: dict[str, Any] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8",
    }  # fmt: skip
    return rewrite(source, folder, library, config), library


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_the_meaning_is_the_librarys_to_the_last_bit(
    tiny_idefics3: Path, tmp_path: Path, nested: bool, block: int
) -> None:
    folder, library = make(tiny_idefics3, tmp_path / "q", nested=nested, block=block)
    vlm = load_vlm(str(folder))
    assert vlm.quantized is not None
    assert set(vlm.quantized.codes) == set(library.meaning)
    for name, meaning in library.meaning.items():
        assert torch.equal(vlm.quantized.codes[name].dequantize(), meaning), name
        assert torch.equal(vlm.parameters_by_name()[name], meaning), name
    assert vlm.quantized.summary == f"bitsandbytes nf4 g{block}"


@pytest.fixture
def nf4(tiny_idefics3: Path, tmp_path: Path) -> Path:
    return make(tiny_idefics3, tmp_path / "nf4")[0]


@pytest.mark.parametrize(
    ("config", "kind"),
    [({"load_in_8bit": True}, "int8"), ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4")],
)
def test_other_kinds_are_refused(nf4: Path, config: dict[str, Any], kind: str) -> None:
    edit_config(nf4, quantization_config={"quant_method": "bitsandbytes", **config})
    with pytest.raises(UnsupportedModelError, match=f"checkpoint is {kind}; only nf4 is read"):
        load_vlm(str(nf4))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (V_PROJ, torch.zeros(100, 1, dtype=torch.uint8), r"v_proj\.weight is 100, .* say 4096"),
        (f"{V_PROJ}.absmax", torch.ones(7), r"absmax is 7, .* say 128"),
        (f"{V_PROJ}.absmax", torch.ones(128, dtype=torch.float16), "absmax is float16; the format says float32"),
        (f"{V_PROJ}.quant_map", torch.ones(15), r"quant_map is 15, .* say 16"),
        (STATE, torch.tensor(list(b"{]"), dtype=torch.uint8), "bitsandbytes__nf4 holds no shape and block size"),
        (STATE, torch.tensor(list(b'{"shape": [8], "blocksize": 64}'), dtype=torch.uint8), r"says shape \(8,\)"),
        (
            STATE,
            torch.tensor(list(b'{"shape": [64, 128], "blocksize": 512}'), dtype=torch.uint8),
            "blocks of 512 codes run over the ends of its rows of 128",
        ),
        (
            STATE,
            torch.tensor(list(b'{"shape": [64, 128], "blocksize": 64, "nested_blocksize": 0}'), dtype=torch.uint8),
            "nested_blocksize 0; no codes are stored so",
        ),
        (STATE, torch.tensor(list(b'{"shape": [9, 7], "blocksize": 7}'), dtype=torch.uint8), r"says shape \(9, 7\)"),
    ],
)
def test_corrupted_tensors_are_named(nf4: Path, name: str, value: torch.Tensor, message: str) -> None:
    edit_weights(nf4, lambda t: t.update({name: value}))
    with pytest.raises(BadInputError, match=message) as caught:
        load_vlm(str(nf4))
    assert "v_proj" in str(caught.value)


def test_a_missing_scale_is_named(nf4: Path) -> None:
    edit_weights(nf4, lambda t: t.__delitem__(f"{V_PROJ}.absmax"))
    with pytest.raises(BadInputError, match=r"v_proj\.weight\.absmax is missing"):
        load_vlm(str(nf4))


def test_a_state_that_names_no_numbers_is_refused(nf4: Path) -> None:
    state = torch.tensor(list(json.dumps({"shape": ["a", 2], "blocksize": 64}).encode()), dtype=torch.uint8)
    edit_weights(nf4, lambda t: t.update({STATE: state}))
    with pytest.raises(BadInputError, match="holds no shape and block size"):
        load_vlm(str(nf4))
