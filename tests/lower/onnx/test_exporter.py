"""What is changed for the time of an export, and only for it."""

from __future__ import annotations

import gc
import logging

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry

from vlmexport.lower.onnx.exporter import quiet_exporter

OPSET = 18


def test_everything_is_as_it_was_behind_an_export_that_fails() -> None:
    before = ONNXRegistry.__dict__["from_torchlib"]
    level = logging.getLogger("torch.onnx").level
    with pytest.raises(ZeroDivisionError), quiet_exporter():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert ONNXRegistry.__dict__["from_torchlib"] is before
    assert logging.getLogger("torch.onnx").level == level
    assert gc.isenabled()


def test_exports_share_operators_and_not_the_table_of_them() -> None:
    own = ONNXRegistry.from_torchlib(opset_version=OPSET)
    with quiet_exporter():
        one, other = (ONNXRegistry().from_torchlib(opset_version=OPSET) for _ in range(2))
    assert one.functions.keys() == own.functions.keys()
    assert one.opset_version == OPSET
    name = next(iter(one.functions))
    assert one.functions[name][0] is other.functions[name][0]
    one.functions[name].clear()
    assert other.functions[name]
