"""TensorRT for RTX as a judge of graphs: its parser, and its compiler for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Dims = tuple[int, ...]


def build_engine(path: Path, shapes: Callable[[str, Dims, int], Dims], sizes: tuple[int, ...]) -> str | int:
    """The size in bytes of an engine for SM80, or the parser's first error; skips the test without the library.

    `shapes` gives the dims of an input by name, dims (-1: free) and one of `sizes`; there is a profile for each size.
    """
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed: no engine was built")
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        return str(parser.get_error(0).desc())
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(trt.ComputeCapability.SM80, 0)
    for size in sizes:
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            dims = shapes(tensor.name, tuple(tensor.shape), size)
            profile.set_shape(tensor.name, dims, dims, dims)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return "no engine" if engine is None else int(engine.nbytes)
