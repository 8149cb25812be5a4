"""The emitter's products against the dequantized weight, in ONNX Runtime."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tests.lower.onnx.products import emitted_product, run_model
from vlmexport.errors import BadInputError
from vlmexport.quantize.scheme import QuantScheme, make_scheme
from vlmexport.quantize.weights import quantize_data_free

INTEGERS = [
    make_scheme("rtn", bits=bits, symmetric=symmetric, group_size=group)
    for bits, symmetric, group in itertools.product((2, 4, 8), (True, False), (16, 32, 64, 128, -1))
]
LEVELS = [make_scheme(name, group_size=group) for name in ("nf4", "nf4:nested") for group in (64, 128, 256)]


def title(scheme: QuantScheme) -> str:
    kind = "sym" if scheme.symmetric else "asym"
    return f"{scheme.algorithm}-{scheme.bits}-{scheme.group_size}-{kind}"


def weights(columns: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return {name: torch.randn(rows, columns, generator=generator) for name, rows in (("q", 32), ("k", 16))}


def expected(parts: dict[str, torch.Tensor], scheme: QuantScheme, x: torch.Tensor) -> np.ndarray:
    dequantized = torch.cat([quantize_data_free(w, scheme).dequantize() for w in parts.values()])
    return (x.double() @ dequantized.double().T).numpy()


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("scheme", [*INTEGERS, *LEVELS], ids=title)
def test_products_are_those_of_the_dequantized_weight(scheme: QuantScheme, level: int) -> None:
    columns = 512 if scheme.group_size == 256 else 384  # one group per row of 384 becomes three blocks of one scale
    parts = weights(columns)
    model, records = emitted_product(parts, scheme, torch.float32, level, {})
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    assert error(run_model(model, x), expected(parts, scheme, x)) <= 1e-6
    (record,) = records
    assert [m.rows for m in record.members] == [(0, 32), (32, 48)]
    assert record.codebook == ("nf4" if scheme in LEVELS else "")


@pytest.mark.parametrize(
    "scheme", [make_scheme("rtn"), make_scheme("rtn", symmetric=False), make_scheme("nf4")], ids=title
)
def test_biases_are_added(scheme: QuantScheme) -> None:
    parts = weights(128)
    model, _ = emitted_product(parts, scheme, torch.float32, 0, {"k": torch.arange(16.0)})
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    want = expected(parts, scheme, x) + np.concatenate([np.zeros(32), np.arange(16.0)])
    assert error(run_model(model, x), want) <= 1e-6


@pytest.mark.parametrize("name", ["nf4", "nf4:nested", "torchao:int4wo", "torchao:int8wo"])
def test_float16_decoders_keep_the_float32_scales_in_the_file(name: str) -> None:
    scheme, parts = make_scheme(name), weights(128)
    model, _ = emitted_product(parts, scheme, torch.float16, 0, {})
    stored = model.graph.initializers["packed.weight.scale"].const_value
    assert stored is not None
    scale = torch.cat([quantize_data_free(w, scheme).scale for w in parts.values()])
    assert np.array_equal(np.unique(stored.numpy()), np.unique(scale.numpy()))
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).half()
    assert error(run_model(model, x), expected(parts, scheme, x)) <= 2e-3


@pytest.mark.parametrize("name", ["nf4", "torchao:int4wo"])
def test_a_scale_that_overflows_float16_is_refused_where_it_would_be_used(name: str) -> None:
    parts = {"q": torch.full((16, 64), 1e6)}
    emitted_product(parts, make_scheme(name), torch.float32, 0, {})
    with pytest.raises(BadInputError, match=r"packed\.weight: a scale overflows FP16; keep this layer with --keep"):
        emitted_product(parts, make_scheme(name), torch.float16, 0, {})


def test_a_scale_that_is_subnormal_in_float16_is_recorded_as_a_float16_product_takes_it() -> None:
    parts, scheme = weights(128), make_scheme("rtn", bits=8)
    parts["k"][:, :32] *= 1e-4
    chosen = quantize_data_free(parts["k"], scheme)
    assert chosen.scale.dtype == torch.float32
    model, (record,) = emitted_product(parts, scheme, torch.float16, 0, {})
    taken = dataclasses.replace(chosen, scale=chosen.scale.half())
    assert record.members[1].digest == taken.digest() != chosen.digest()
    stored = model.graph.initializers["packed.weight.scale"].const_value
    assert stored is not None
    assert np.array_equal(stored.numpy()[32:], taken.scale.numpy())
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).half()
    assert error(run_model(model, x), expected(parts, scheme, x)) <= 2e-3
