"""What rounding may do to a tensor, and what it cannot have done."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmexport.gguf_options import GgufTensor
from vlmexport.model.family import Transform
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.blocks import quantize_rows
from vlmexport.quantize.ggml.types import GGML_TYPES
from vlmexport.target import load_target
from vlmexport.verify.gguf.files import StoredTensor
from vlmexport.verify.gguf.values import check_pairing, check_values, rebuilt_weights, value_fault

LIMITS = load_target("llamacpp").gguf_parity
GRIDS = ("IQ3_XXS", "IQ3_S")
# ggml builds the tables of these for up to half a minute: tools/measure_gguf_rounding.py has them.
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S")
ROUNDED = [name for name in GGML_TYPES if name not in ("F32", "F16", "BF16", *SLOW)]


def matrix(seed=0, rows=24, columns=512):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def stored(weight, kind, importance=None):
    return StoredTensor("t", weight.shape, kind, quantize_rows(weight, kind, importance))


@pytest.mark.parametrize("kind", ROUNDED)
def test_ggml_rounding_is_within_its_limits(kind):
    weight = matrix()
    assert value_fault(stored(weight, kind), torch.from_numpy(weight), LIMITS.weights[kind]) == ""


@pytest.mark.parametrize("kind", ROUNDED)
def test_importance_is_within_its_own_limits(kind):
    weight = matrix()
    weight[:, 5] *= 20
    importance = np.exp(2 * np.random.default_rng(1).standard_normal(weight.shape[1])).astype(np.float32)
    found = stored(weight, kind, importance)
    assert value_fault(found, torch.from_numpy(weight), LIMITS.weights_importance[kind]) == ""


@pytest.mark.parametrize("kind", ROUNDED)
def test_another_matrix_is_red(kind):
    found = stored(matrix(), kind)
    assert "relative RMS error" in value_fault(found, torch.from_numpy(matrix(1)), LIMITS.weights[kind])


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K"])
def test_one_wrong_scale_is_red(kind):
    weight = matrix()
    found = stored(weight, kind)
    kinds = GGML_TYPES[kind]
    offset = kinds.bytes - 4 if kind == "Q2_K" else 0  # where the block's float16 scale stands
    row = found.data[3, kinds.bytes + offset : kinds.bytes + offset + 2]
    row[:] = (row.copy().view(np.float16) * np.float16(2)).view(np.uint8)
    fault = value_fault(found, torch.from_numpy(weight), LIMITS.weights[kind])
    assert "relative RMS error" in fault
    assert "in one block" in fault or kind not in ("Q4_0", "Q4_1", "Q5_0")


@pytest.mark.parametrize("kind", [k for k in ROUNDED if k not in GRIDS])
def test_weights_a_hundredth_apart_are_told_by_their_order(kind):
    """Far less than the rounding error of most types, as between two fine-tunes of one model."""
    weight = matrix()
    tuned = weight + 0.01 * matrix(2)
    fault = value_fault(stored(tuned, kind), torch.from_numpy(weight), LIMITS.weights[kind])
    assert "not in the order of the model's" in fault or "relative RMS error" in fault


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_floats_are_the_weight_rounded_once(kind, dtype):
    weight = matrix()
    found = stored(weight, kind)
    assert value_fault(found, torch.from_numpy(weight), LIMITS.weights[kind]) == ""
    changed = weight.copy()
    changed[2, 3] += 0.1
    assert value_fault(found, torch.from_numpy(changed), LIMITS.weights[kind]).startswith("1 of 12288 values are not")
    assert value_fault(found, torch.from_numpy(weight[:-1]), LIMITS.weights[kind]).startswith("[24, 512] values where")


def test_broken_values_never_pass():
    weight = matrix()
    found = stored(weight, "Q4_0")
    found.data[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert "nan" in value_fault(found, torch.from_numpy(weight), LIMITS.weights["Q4_0"])
    half = stored(weight, "F16")
    half.data[0, :2] = np.array([np.nan], np.float16).view(np.uint8)
    assert value_fault(half, torch.from_numpy(weight), LIMITS.weights["F16"]) != ""


def test_rows_of_zeros_and_of_next_to_nothing_are_no_fault():
    weight = matrix()
    weight[4] = 0.0
    weight[5] *= 1e-9
    for kind in ("Q4_0", "Q4_K", "Q8_0"):
        assert value_fault(stored(weight, kind), torch.from_numpy(weight), LIMITS.weights[kind]) == ""


class Files:
    """Two files as `rebuilt_weights` and `check_pairing` see them."""

    def __init__(self, **tensors):
        self.tensors = tensors
        self.path = type("Path", (), {"name": "text.gguf"})

    def of(self, _file):
        return self


def test_weights_are_rebuilt_with_their_transforms_undone():
    weight = torch.from_numpy(matrix(rows=32, columns=64))
    transform = Transform("permute", (2,))
    (moved,) = values.apply(weight, "permute", (2,))
    tensor = GgufTensor("q", "text", (32, 64), "F32", "", source="layer.q", transform=transform)
    borrowed = GgufTensor("v.q", "mmproj", (32, 64), "F32", "", source="layer.q")
    files = Files(q=stored(moved.numpy().copy(), "F32"))
    assert torch.equal(dict(rebuilt_weights(files, [tensor, borrowed]))["layer.q"], weight)


def test_one_damaged_tensor_is_no_other_model(record):
    tensors = [GgufTensor(f"t{i}", "text", (4, 32), "F32", "", source=f"w{i}") for i in range(20)]
    check_pairing(record, Files(), tensors, {"t0", "t1"})
    check_pairing(record, Files(), tensors, {"t0", "t1", "t2"})
    assert [c.status for c in record.checks] == ["passed", "failed"]
    assert record.checks[1].reason == "text.gguf is of another model: 3 of 20 tensors differ"


@pytest.fixture
def record():
    from vlmexport.verify.gates import Gate

    return Gate()


def test_importance_of_the_text_half_excuses_nothing_in_the_mmproj(record):
    """Scaled as a whole: more than plain rounding may do, less than rounding by importance, all in order."""
    weight = matrix()

    class Pair(Files):
        def importance(self):
            return True

    found = stored(weight * np.float32(1.17), "Q4_K")
    assert value_fault(found, torch.from_numpy(weight), LIMITS.weights_importance["Q4_K"]) == ""
    tensors = [GgufTensor("t", file, weight.shape, "Q4_K", "", source="w") for file in ("text", "mmproj")]
    wrong = check_values(record, Pair(t=found), tensors, {"w": torch.from_numpy(weight)}, LIMITS, {})
    assert {c.name: c.status for c in record.checks} == {"gguf/values[text]": "passed", "gguf/values[mmproj]": "failed"}
    assert wrong == {"t"}
    assert "relative RMS error" in record.checks[1].reason
