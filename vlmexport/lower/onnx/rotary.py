"""Take rotary position embedding out of a trace, for attention operators that apply it themselves.

transformers' attention calls a module-level ``apply_rotary_pos_emb(q, k, cos, sin)``; the tables come from one rotary
module of the decoder. Both are found by looking, and the rotation is accepted only if the operator's formula gives the
same numbers on random input (RoFormer, arXiv:2104.09864; half-split as in GPT-NeoX or interleaved as in GPT-J).
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx import neutral
from vlmexport.split.per_layer import text_arguments

_FUNCTION = "apply_rotary_pos_emb"
_LIMIT = 1e-5
_TABLE_AXES = 3  # of a table ``[B, S, width]`` for the tokens of a call
_TABLE_ARGUMENTS = 2  # of a rotary module: a tensor whose type the tables get, and the positions


@dataclass(frozen=True)
class Rotary:
    """Tables ``[max_positions, rotary_dim / 2]`` in float32, the pairing, and the module whose function to override."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    modeling: str

    def emitted(self) -> AbstractContextManager[None]:
        """Let ``apply_rotary_pos_emb`` of the modeling module mark q and k and leave them as they are.

        The marks tell layers that rotate from layers that do not.
        """
        return _overridden(self.modeling, lambda q, k, *_args, **_kwargs: (neutral.rotary(q), neutral.rotary(k)))


@dataclass(frozen=True)
class RotaryOperator:
    """A rotation by tables that the decoder computes from the positions it is given, as an operator of its own.

    `doubled` says how a table ``[B, S, width]`` holds each number twice: ``halves`` or ``neighbours``.
    """

    interleaved: bool
    doubled: str
    modeling: str

    def emitted(self) -> AbstractContextManager[None]:
        """Let ``apply_rotary_pos_emb`` of the modeling module emit the neutral operator."""

        def one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> torch.Tensor:
            if unsqueeze_dim == 1:
                return neutral.rotation(x, cos, sin, self.interleaved, self.doubled)
            # Tokens come before heads here, behind them in the operator.
            return one(x.transpose(1, 2), cos, sin).transpose(1, 2)

        def pair(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_a: Any, **_k: Any) -> Any:
            return tuple(one(x, cos, sin) for x in (q, k))

        single = _takes_one(getattr(sys.modules[self.modeling], _FUNCTION))
        return _overridden(self.modeling, one if single else pair)


@dataclass(frozen=True)
class RotaryInTrace:
    """Positions that stay in the trace as the model computes them, or that a decoder adds to its embeddings.

    Right for every decoder, since a key is cached behind whatever was done to it; more nodes than the other forms.
    """

    interleaved: bool = False

    def emitted(self) -> AbstractContextManager[None]:
        """Nothing is replaced."""
        return nullcontext()


@contextmanager
def _overridden(modeling: str, function: Callable[..., Any]) -> Iterator[None]:
    module = sys.modules[modeling]
    original = getattr(module, _FUNCTION)
    setattr(module, _FUNCTION, function)
    try:
        yield
    finally:
        setattr(module, _FUNCTION, original)


def find_rotary(decoder: Any, layers: Sequence[nn.Module], axes: int) -> Rotary | RotaryOperator | RotaryInTrace:
    """The decoder's rotation in the fastest form that it has.

    Tables by position inside attention; else, for positions on several `axes`, tables that differ from layer to layer
    and rotations of a part of each head, an operator in front of it; else what the model does, traced.
    Raises `UnsupportedModelError` for positions on several axes that no operator turns by.
    """
    layer = next((layer for layer in layers if _attention(layer) is not None), layers[0])
    if axes > 1:
        return probe_operator(decoder, layer, axes)
    try:
        apply, modeling, head_dim = _function(decoder, layer)
        _, arguments = _rotary_call(decoder, layer)
    except UnsupportedModelError:
        return RotaryInTrace()
    if arguments <= _TABLE_ARGUMENTS:
        with suppress(UnsupportedModelError):
            return probe_rotary(decoder, layer)
    tables = [pair for pair in _reached_tables(decoder, layers) if pair is not None]
    forms = {_part_form(apply, head_dim, cos, sin) for cos, sin in tables}
    form = forms.pop() if len(forms) == 1 else None
    return RotaryInTrace() if form is None else RotaryOperator(*form, modeling)


def _part_form(
    apply: Callable[..., Any], head_dim: int, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[bool, str] | None:
    """`_form` of a function that is given whole heads, or the part of each head that it turns."""
    widths = dict.fromkeys((head_dim, cos.shape[-1]))
    return next((form for width in widths if (form := _form(apply, width, cos, sin)) is not None), None)


def _reached_tables(decoder: Any, layers: Sequence[nn.Module]) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """The tables ``[2, 7, width]`` that each layer gets for some positions; None for a layer without attention."""
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 1000, (2, 7), generator=generator)
    reached: list[tuple[torch.Tensor, torch.Tensor] | None] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        reached.append(_tables_of(module, args, kwargs) if _attention(module) is not None else None)

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    hidden = decoder.config.get_text_config().hidden_size
    try:
        with torch.no_grad():
            embeds = torch.zeros(2, 7, hidden, dtype=decoder.dtype)
            decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, **text_arguments(decoder, 2, 7))
    finally:
        for handle in handles:
            handle.remove()
    return [None if tables is None else (tables[0].float(), tables[1].float()) for tables in reached]


def probe_operator(decoder: Any, layer: nn.Module, axes: int) -> RotaryOperator:
    """Check that the operator's formula reproduces the decoder's rotation at positions ``[axes, B, S]``.

    Raises `UnsupportedModelError` (naming ``--attention standard`` as the way out) when it does not.
    """
    apply, modeling, head_dim = _function(decoder, layer)
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 1000, (axes, 2, 7), generator=generator)
    with torch.no_grad():
        cos, sin = _rotary_module(decoder, layer)(torch.zeros(1, 1, 1), positions)
    form = _form(apply, head_dim, cos, sin)
    if form is None:
        raise _refusal(decoder, "its rotation is neither the half-split nor the interleaved form")
    return RotaryOperator(*form, modeling)


def _form(apply: Callable[..., Any], head_dim: int, cos: torch.Tensor, sin: torch.Tensor) -> tuple[bool, str] | None:
    """``(interleaved, doubled)`` of the operator that does what `apply` does with the tables ``[2, 7, width]``."""
    generator = torch.Generator().manual_seed(1)
    pair = [torch.randn(2, 3, 7, head_dim, generator=generator) for _ in range(2)]
    if cos.ndim != _TABLE_AXES or cos.shape[-1] > head_dim:
        return None
    try:
        got = tuple(apply(x, cos, sin) for x in pair) if _takes_one(apply) else apply(*pair, cos, sin)
    except RuntimeError:  # shapes that it is never given
        return None
    for interleaved, doubled in itertools.product((False, True), ("halves", "neighbours")):
        c, s = (_once(table, doubled).unsqueeze(1) for table in (cos, sin))
        wanted = [_turned(x, c, s, interleaved) for x in pair]
        if all(g.shape == w.shape and (g - w).abs().max() <= _LIMIT for g, w in zip(got, wanted, strict=True)):
            return interleaved, doubled
    return None


def _takes_one(apply: Callable[..., Any]) -> bool:
    """Does a function turn queries or keys, and not both at once?"""
    return len(inspect.signature(apply).parameters) > 1 and list(inspect.signature(apply).parameters)[1] == "cos"


def _tables_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tables (cos, sin) that a call of `layer` is given, by name or by place; None without."""
    names = list(inspect.signature(layer.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}.get("position_embeddings")


def _once(table: torch.Tensor, doubled: str) -> torch.Tensor:
    """Each number of a table ``[..., width]`` once."""
    return table[..., ::2] if doubled == "neighbours" else table[..., : table.shape[-1] // 2]


def _function(decoder: Any, layer: nn.Module) -> tuple[Callable[..., Any], str, int]:
    """The function that rotates queries and keys, the module that it is in, and the size of a head."""
    attention = _attention(layer)
    modeling = type(attention).__module__ if attention is not None else ""
    apply = getattr(sys.modules.get(modeling), _FUNCTION, None)
    if apply is None:
        raise _refusal(decoder, f"its attention does not call {_FUNCTION}")
    return apply, modeling, int(getattr(attention, "head_dim", 0))


def _attention(layer: nn.Module) -> nn.Module | None:
    """The attention of a layer; None for one that has none."""
    return next((m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_dim")), None)


def probe_rotary(decoder: Any, layer: nn.Module) -> Rotary:
    """Find the decoder's rotary tables and check that an attention operator's formula reproduces the rotation.

    Raises `UnsupportedModelError` (naming ``--attention standard`` as the way out) when it does not.
    """
    apply, modeling, head_dim = _function(decoder, layer)
    module = _rotary_module(decoder, layer)
    text = decoder.config.get_text_config()
    cos, sin = _tables(decoder, module, text.max_position_embeddings)
    for interleaved, doubled in itertools.product((False, True), ("halves", "neighbours")):
        halves = _once(cos, doubled), _once(sin, doubled)
        if _matches(apply, cos, sin, halves, interleaved, head_dim):
            return Rotary(halves[0].contiguous(), halves[1].contiguous(), interleaved, modeling)
    raise _refusal(decoder, "its rotation is neither the half-split nor the interleaved form")


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The operator's formula: rotate the first ``2 * cos.shape[1]`` of the head dims of x ``[B, N, S, D]``."""
    return _turned(x, cos[positions].unsqueeze(1), sin[positions].unsqueeze(1), interleaved)


def _turned(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor, interleaved: bool) -> torch.Tensor:
    width = 2 * c.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        out = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned[..., : width // 2], turned[..., width // 2 :]
        out = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((out, rest), -1)


def _matches(
    apply: Callable[..., Any],
    cos: torch.Tensor,
    sin: torch.Tensor,
    halves: tuple[torch.Tensor, torch.Tensor],
    interleaved: bool,
    head_dim: int,
) -> bool:
    if cos.shape[1] != head_dim or _takes_one(apply):  # a part of each head: not expressed here
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 7, head_dim, generator=generator) for _ in range(2))
    positions = torch.tensor([[0, 1, 2, 3, 5, 8, 13]])
    got_q, got_k = apply(q, k, cos[positions], sin[positions])
    want_q, want_k = (rotate(x, *halves, positions, interleaved) for x in (q, k))
    return bool((got_q - want_q).abs().max() <= _LIMIT and (got_k - want_k).abs().max() <= _LIMIT)


def _rotary_module(decoder: Any, layer: nn.Module) -> nn.Module:
    module, arguments = _rotary_call(decoder, layer)
    if arguments > _TABLE_ARGUMENTS:
        raise _refusal(decoder, "its rotary table depends on more than the position")
    return module


def _rotary_call(decoder: Any, layer: nn.Module) -> tuple[nn.Module, int]:
    """The module that makes the tables of `layer`, and how many arguments it is called with."""
    outputs: list[tuple[nn.Module, Any, int]] = []
    reached: list[Any] = []

    def seen(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        outputs.append((module, out, len(args) + len(kwargs)))

    handles = [m.register_forward_hook(seen, with_kwargs=True) for m in decoder.children()]
    handles.append(
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: reached.append(_tables_of(m, args, kwargs)), with_kwargs=True
        )
    )
    hidden = decoder.config.get_text_config().hidden_size
    try:
        with torch.no_grad():
            embeds = torch.zeros(1, 2, hidden, dtype=decoder.dtype)
            decoder(inputs_embeds=embeds, use_cache=False, **text_arguments(decoder, 1, 2))
    finally:
        for handle in handles:
            handle.remove()
    for module, out, arguments in outputs:
        if reached and out is reached[0]:
            return module, arguments
    raise _refusal(decoder, "its layers do not get (cos, sin) from one rotary module")


def _tables(decoder: Any, module: nn.Module, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    like = torch.zeros(1, 1, 1)
    with torch.no_grad():
        cos, sin = module(like, torch.arange(positions).unsqueeze(0))
        short_cos, _ = module(like, torch.arange(8).unsqueeze(0))
    if not torch.equal(short_cos, cos[:, :8]):
        raise _refusal(decoder, "its rotary table depends on the length of the sequence")
    return cos[0].float(), sin[0].float()


def _refusal(decoder: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{decoder.config.model_type}: rotary positions cannot move into GroupQueryAttention: {reason}; "
        "use --attention standard"
    )
