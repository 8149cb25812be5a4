"""Run one decoder layer at a time, with everything around the layers done by the real decoder.

Masks, rotary tables, deepstack additions and cross-attention arguments are never imitated: for layer i the
decoder's own ``forward`` is called with the layers before it standing aside, the output of layer i - 1 put in from a
cache, and the call cut off after layer i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.layers import find_layers, overridden

if TYPE_CHECKING:
    from vlmexport.calibrate.capture import Batch

# A layer run alone repeats the same float32 operations, so only a layer that needs more than its input differs.
_ALONE_LIMIT = 1e-5
# What a layer raises when something that another layer should have left for it is missing.
_MISSING = (KeyError, RuntimeError, AttributeError, TypeError, IndexError, ValueError)


class _LayerDoneError(Exception):
    """Cuts a decoder call off after the layer of interest."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class LayerReplay:
    """The layers of `decoder`, each to be run alone on cached inputs.

    Layers must be in float32 when they run (see `float32_parameters`); `around` are the modules that surround them.
    """

    def __init__(self, decoder: nn.Module, family: str) -> None:
        self.decoder = decoder
        self.family = family
        self.layers = find_layers(decoder)[1]
        inside = {id(m) for layer in self.layers for m in layer.modules()}
        self.around = [m for m in decoder.modules() if id(m) not in inside and not isinstance(m, nn.Embedding)]
        self.returns_tuple = [False] * len(self.layers)

    def run(self, index: int, batch: Batch, previous: torch.Tensor | None) -> torch.Tensor:
        """Output ``[B, S, H]`` of layer `index`; `previous` is that of the layer before (None for the first)."""
        with ExitStack() as stack:
            self._stand_in(stack, index, previous)
            stack.enter_context(overridden(self.layers[index], _stop_after(self.layers[index].forward)))
            try:
                self._call(batch)
            except _LayerDoneError as done:
                return done.hidden
        raise UnsupportedModelError(f"{self.family}: the decoder does not run its layer {index}")

    def final(self, batch: Batch, last: torch.Tensor) -> torch.Tensor:
        """What the decoder makes of the last layer's output: the LM head's input ``[B, S, H]``."""
        return self.onward(len(self.layers), batch, last)

    def onward(self, index: int, batch: Batch, previous: torch.Tensor | None) -> torch.Tensor:
        """The LM head's input ``[B, S, H]`` when layers `index` and later run on `previous`, the output before them."""
        with ExitStack() as stack:
            self._stand_in(stack, index, previous)
            hidden: torch.Tensor = self._call(batch).last_hidden_state
            return hidden

    def check(self, batch: Batch) -> None:
        """Prove on one batch that every layer needs nothing but its input, and learn what the layers return.

        Holds one float32 layer at a time. Raises `UnsupportedModelError` naming the first layer that differs.
        """
        outputs: list[torch.Tensor] = []

        def checked(index: int) -> Callable[..., Any]:
            layer = self.layers[index]
            forward = layer.forward

            def run(*args: Any, **kwargs: Any) -> Any:
                with float32_parameters(layer.modules()):
                    out = forward(*args, **kwargs)
                    self.returns_tuple[index] = isinstance(out, tuple)
                    hidden = self._only_hidden(index, out).clone()
                    with overridden(layer, forward):
                        self._compare(index, batch, outputs[-1] if outputs else None, hidden)
                outputs[:] = [hidden]
                return out

            return run

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                stack.enter_context(overridden(layer, checked(index)))
            self._call(batch)

    def _compare(self, index: int, batch: Batch, previous: torch.Tensor | None, expected: torch.Tensor) -> None:
        try:
            alone = self.run(index, batch, previous)
        except _MISSING as error:
            raise self._dependent(index, " ".join(str(error).split())[:120] or type(error).__name__) from error
        # NaN on both sides is no difference: NaN weights are refused by name when they are quantized.
        difference = relative_difference(alone.nan_to_num(), expected.nan_to_num(), batch.valid)
        if not difference <= _ALONE_LIMIT:
            raise self._dependent(index, f"run alone it differs by {difference:.1e}")

    def _dependent(self, index: int, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.family}: decoder layer {index} needs more than its input, such as another layer's cache ({why}); "
            "it cannot be calibrated layer by layer, choose --quant rtn or hqq"
        )

    def _only_hidden(self, index: int, out: Any) -> torch.Tensor:
        hidden = out[0] if isinstance(out, tuple) else out
        if not isinstance(hidden, torch.Tensor) or (isinstance(out, tuple) and any(o is not None for o in out[1:])):
            raise UnsupportedModelError(
                f"{self.family}: decoder layer {index} returns more than a hidden state; it cannot be calibrated layer "
                "by layer, choose --quant rtn or hqq"
            )
        return hidden

    def _stand_in(self, stack: ExitStack, index: int, previous: torch.Tensor | None) -> None:
        for i, layer in enumerate(self.layers[:index]):
            stack.enter_context(overridden(layer, self._hand_on(i, previous if i == index - 1 else None)))

    def _hand_on(self, index: int, output: torch.Tensor | None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]) if output is None else output.clone()
            return (hidden,) if self.returns_tuple[index] else hidden

        return run

    def _call(self, batch: Batch) -> Any:
        given = {k: v for k, v in batch.kwargs.items() if k != "past_key_values"}
        kwargs = pytree.tree_map(_widened, {**given, "use_cache": False})
        with torch.no_grad(), float32_parameters(self.around):
            return self.decoder(**kwargs)


def _stop_after(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        raise _LayerDoneError(out[0] if isinstance(out, tuple) else out)

    return run


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@contextmanager
def float32_parameters(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, `modules` own float32 copies of their parameters; afterwards the original objects are back."""
    originals = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.is_floating_point()
    ]
    copies: dict[int, nn.Parameter] = {}
    for module, name, parameter in originals:
        if id(parameter) not in copies:
            wide = parameter.detach().to(torch.float32, copy=True)
            copies[id(parameter)] = nn.Parameter(wide, requires_grad=False)
        module.register_parameter(name, copies[id(parameter)])
    try:
        yield
    finally:
        for module, name, parameter in originals:
            module.register_parameter(name, parameter)


def relative_difference(got: torch.Tensor, expected: torch.Tensor, valid: torch.Tensor) -> float:
    """Largest difference over the largest expected value, among the `valid` positions ``[B, S]``."""
    scale = expected[valid].abs().max().clamp_min(1e-12)
    return float((got[valid] - expected[valid]).abs().max() / scale)
