"""Trace layers that keep states: what they ask of a cache becomes neutral operators.

transformers' layers read and write their states through the cache that they are given, and call one function of their
modeling module for the gated delta rule (arXiv:2412.06464). Both are stood in for. The function is accepted only if it
gives the same numbers as `states.delta_rule` on random input, so its name decides nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx import neutral
from vlmexport.lower.onnx.states import delta_rule
from vlmexport.split.layers import overridden

_FUNCTION = "torch_chunk_gated_delta_rule"
_LIMIT = 1e-4  # relative; the function computes in chunks, the reference token by token


@dataclass
class TracedStates:
    """Stands for the cache of layers that keep states, within a trace.

    A layer finds no state of earlier tokens, as in a first call; the operators that it emits have them.
    """

    results: list[torch.Tensor] = field(default_factory=list)  # of linear attention, in the order of the trace
    layer: int = -1  # the one that asked for the state of its linear attention last

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise UnsupportedModelError(
            f"a decoder layer uses its cache in a way that cannot be traced ({name}); such layers are not supported yet"
        )

    def is_recording_past(self, _layer_idx: int) -> bool:
        """No."""
        return False

    def get_conv_state(self, _layer_idx: int, state_idx: int = 0) -> None:
        """No state yet."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """No state yet."""
        self.layer = layer_idx

    def update(self, key: torch.Tensor, value: torch.Tensor, _layer: int, *_args: Any) -> tuple[torch.Tensor, ...]:
        """Keys and values as they are: the operator of attention has the earlier ones."""
        return key, value

    def update_conv_state(
        self, x: torch.Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_more: Any
    ) -> torch.Tensor:
        """The new inputs of a convolution behind the ones before them."""
        if conv_kernel_size is None:
            raise UnsupportedModelError(f"layer {layer_idx} of the decoder does not say how many inputs it keeps")
        return neutral.conv_state(x, layer_idx, conv_kernel_size)

    def update_recurrent_state(self, state: Any, layer_idx: int, state_idx: int = 0, **_more: Any) -> Any:
        """Refuse a state that the gated delta rule did not make."""
        if not any(state is result for result in self.results):
            raise UnsupportedModelError(
                f"layer {layer_idx} of the decoder keeps a state that is not that of the gated delta rule; such linear "
                "attention is not supported yet"
            )
        return state

    def attend(self, *tensors: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the layer calls for linear attention: emits the operator."""
        names = ("query", "key", "value", "g", "beta")
        given = [*tensors, *(kwargs[name] for name in names[len(tensors) :])]
        normalized = bool(kwargs.get("use_qk_l2norm_in_kernel", False))
        out = neutral.delta_rule(given, self.layer, float(given[0].shape[-1] ** -0.5), normalized)
        self.results.append(out)
        return out, out


@contextmanager
def traced_states(layers: list[nn.Module]) -> Iterator[TracedStates]:
    """Within, `layers` are called with a stand-in for a cache, and their states become neutral operators.

    Enter it last: what `layers` have been overridden with is called. Raises `UnsupportedModelError` for a gated delta
    rule that computes something else.
    """
    states = TracedStates()
    codes = {type(module).__module__ for layer in layers for module in layer.modules()}
    modules = [sys.modules[name] for name in sorted(codes) if hasattr(sys.modules[name], _FUNCTION)]
    originals = [getattr(module, _FUNCTION) for module in modules]
    for function in originals:
        _check_rule(function)
    for module in modules:
        setattr(module, _FUNCTION, states.attend)
    try:
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(overridden(layer, _with_cache(layer, states)))
            yield states
    finally:
        for module, function in zip(modules, originals, strict=True):
            setattr(module, _FUNCTION, function)


def _with_cache(layer: nn.Module, states: TracedStates) -> Callable[..., Any]:
    forward = layer.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" not in kwargs:
            raise UnsupportedModelError(
                f"{type(layer).__name__} keeps a state, but gets no past_key_values; such layers are not supported yet"
            )
        return forward(*args, **{**kwargs, "past_key_values": states})

    return run


def _check_rule(function: Any) -> None:
    """Compare `function` with the operator's reference, with more value heads than key heads and a state before."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = [noise(1, 7, 2, 8), noise(1, 7, 2, 8), noise(1, 7, 4, 6), -noise(1, 7, 4).abs(), noise(1, 7, 4).sigmoid()]
    state = noise(1, 4, 8, 6)
    valid = torch.ones(1, 7, dtype=torch.bool)
    for normalized in (False, True):
        with torch.no_grad():
            out, last = function(
                *tensors, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=normalized
            )
            wanted = delta_rule(tensors, state, valid, 8**-0.5, normalized)
        for got, reference in zip((out, last), wanted, strict=True):
            if got.shape != reference.shape or (got - reference).abs().max() > _LIMIT * reference.abs().max():
                raise UnsupportedModelError(
                    f"{function.__module__}.{function.__name__} is not the gated delta rule as it is written for ONNX; "
                    "this linear attention is not supported yet"
                )
