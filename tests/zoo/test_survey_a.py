"""What `tests/zoo/survey_a.py` needed: a scale of logits, and encoders that read the numbers of picture sizes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.tape import Tape

from tests.zoo.survey_a import ENTRIES
from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx.logit_mask import scale_logits
from vlmexport.model.load import load_vlm
from vlmexport.split.capture import split_model
from vlmexport.split.logits import LogitScale, find_logit_scale


def _config(**values: Any) -> Any:
    return SimpleNamespace(to_dict=lambda: values)


def _logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, 4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_that_the_config_holds_is_exact(dtype: torch.dtype) -> None:
    raw = _logits(dtype)
    assert find_logit_scale(_config(logits_scaling=6.0, layers=3), raw, raw / 6.0) == LogitScale(6.0, divides=True)
    assert find_logit_scale(_config(logit_scale=0.3, name="x"), raw, raw * 0.3) == LogitScale(0.3)


def test_a_scale_that_no_config_holds_is_measured() -> None:
    raw = _logits()
    found = find_logit_scale(_config(layers=3), raw, raw * 0.7)
    assert found is not None
    assert found.factor == pytest.approx(0.7, rel=1e-6)
    assert torch.allclose(found.apply(raw), raw * 0.7)


def test_logits_that_are_no_multiple_have_no_scale() -> None:
    raw = _logits()
    assert find_logit_scale(_config(), raw, raw) is None
    assert find_logit_scale(_config(), raw, raw + 1) is None
    assert find_logit_scale(_config(), raw, -raw) is None
    assert find_logit_scale(_config(), raw, raw[:, 1:]) is None


def test_hidden_tokens_do_not_change_the_scale() -> None:
    raw, lowest = _logits(), torch.finfo(torch.float32).min
    raw[..., 7] = lowest
    wanted = raw / 4
    wanted[..., 7] = lowest
    assert find_logit_scale(_config(logits_scaling=4.0), raw, wanted) == LogitScale(4.0, divides=True)


@pytest.mark.parametrize("scale", [LogitScale(6.0, divides=True), LogitScale(0.3), None])
def test_the_graph_scales_as_pytorch_does(scale: LogitScale | None) -> None:
    tape = Tape()
    given = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 4, 50]))
    made = tape.op("Identity", [given])
    made.name, made.type, made.shape = "logits", given.type, given.shape
    graph = ir.Graph([given], [made], nodes=tape.nodes, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    scale_logits(model, scale)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    raw = _logits()
    (found,) = session.run(["logits"], {"x": raw.numpy()})
    np.testing.assert_array_equal(found, raw.numpy() if scale is None else scale.apply(raw).numpy())


_ALSO = "only families whose image features replace token embeddings, or are added to those of early layers"
_SPARSE = "beside keys and values, for attention to some of the tokens; such sparse attention is not supported yet$"
REFUSED = {
    "deepseek_ocr2": "no module computes the image features that get_image_features returns",
    "dots3_note": rf"layer 0 \(indexed_attention\) of the decoder keeps indexer_keys {_SPARSE}",
    "ernie4_5_vl_moe": f"the decoder also takes moe_mm_token_type_ids; {_ALSO}",
    "granite4_vision": f"the decoder also takes deepstack_features, vision_mask; {_ALSO}",
    "hunyuan_vl": r"4 positions for each token; only 3 \(time, height, width\) are supported yet$",
    "minicpmv4_7": "three positions for each token, but its inputs have no image_grid_thw$",
    "qwen4_exp": rf"layer 1 \(indexed_attention\) of the decoder keeps indexer_keys, indexer_position_ids {_SPARSE}",
    "unlimited_ocr": rf"layer 0 \(reference_sliding_attention\) .* keeps prefill_keys, prefill_values {_SPARSE}",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_what_is_missing_is_said_in_one_line(family: str, tmp_path: Path) -> None:
    vlm = load_vlm(str(ENTRIES[family].make(tmp_path)))
    examples = ENTRIES[family].examples(vlm)
    with pytest.raises(UnsupportedModelError, match=f"^{family}: {REFUSED[family]}") as refusal:
        split_model(vlm, examples)
    assert "\n" not in str(refusal.value)
