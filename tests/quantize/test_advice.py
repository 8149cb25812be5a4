from __future__ import annotations

import pytest

from vlmexport.quantize.advice import quantization_advice
from vlmexport.quantize.scheme import QuantScheme, make_scheme


def test_few_bits_are_warned_of_by_task() -> None:
    said = quantization_advice(7_000_000_000, [make_scheme()])
    assert len(said) == 1
    assert "OCR" in said[0]
    assert "counting" in said[0]
    assert "--bits 8" in said[0]


def test_small_models_and_methods_without_data_get_a_line_each() -> None:
    said = quantization_advice(250_000_000, [QuantScheme(4), make_scheme("nf4"), make_scheme(bits=8)])
    assert any("below 3 B" in line for line in said)
    assert any(line.startswith("nf4, rtn looks at no data") for line in said)


@pytest.mark.parametrize("scheme", [make_scheme(bits=8), make_scheme("fp8")])
def test_eight_bits_need_no_advice(scheme: QuantScheme) -> None:
    assert quantization_advice(1000, [scheme]) == ()
