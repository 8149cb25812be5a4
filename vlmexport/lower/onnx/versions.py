"""The version of ONNX's file format that goes with an opset."""

from __future__ import annotations

# onnx's own table says 11 for opset 23, which every reader takes with 10 too; what came with 24 needs its version.
_LATEST_OLD = 23


def ir_version(opset: int) -> int:
    """10 up to opset 23, and 12 from 24 on (onnx.helper.VERSION_TABLE); ONNX Runtime 1.31 and TensorRT read both."""
    return 10 if opset <= _LATEST_OLD else 12
