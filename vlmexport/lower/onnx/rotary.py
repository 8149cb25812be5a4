"""Take rotary position embedding out of a trace, for attention operators that apply it themselves.

transformers' attention calls a module-level ``apply_rotary_pos_emb(q, k, cos, sin)``; the tables come from one rotary
module of the decoder. Both are found by looking, and the rotation is accepted only if the operator's formula gives the
same numbers on random input (RoFormer, arXiv:2104.09864; half-split as in GPT-NeoX or interleaved as in GPT-J).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.lower.onnx import neutral

_FUNCTION = "apply_rotary_pos_emb"
_LIMIT = 1e-5
_TABLE_ARGUMENTS = 2  # of a rotary module: a tensor whose type the tables get, and the positions


@dataclass(frozen=True)
class Rotary:
    """Tables ``[max_positions, rotary_dim / 2]`` in float32, the pairing, and the module whose function to override."""

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool
    modeling: str

    @contextmanager
    def removed(self) -> Iterator[None]:
        """Let ``apply_rotary_pos_emb`` of the modeling module mark q and k and leave them as they are.

        The marks tell layers that rotate from layers that do not.
        """
        module = sys.modules[self.modeling]
        original = getattr(module, _FUNCTION)
        setattr(module, _FUNCTION, lambda q, k, *_args, **_kwargs: (neutral.rotary(q), neutral.rotary(k)))
        try:
            yield
        finally:
            setattr(module, _FUNCTION, original)


def probe_rotary(decoder: Any, layer: nn.Module) -> Rotary:
    """Find the decoder's rotary tables and check that an attention operator's formula reproduces the rotation.

    Raises `UnsupportedModelError` (naming ``--attention standard`` as the way out) when it does not.
    """
    attention = next((m for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "head_dim")), None)
    modeling = type(attention).__module__ if attention is not None else ""
    apply = getattr(sys.modules.get(modeling), _FUNCTION, None)
    if apply is None:
        raise _refusal(decoder, f"its attention does not call {_FUNCTION}")
    module = _rotary_module(decoder, layer)
    text = decoder.config.get_text_config()
    cos, sin = _tables(decoder, module, text.max_position_embeddings)
    for interleaved in (False, True):
        halves = (
            (cos[:, ::2], sin[:, ::2]) if interleaved else (cos[:, : cos.shape[1] // 2], sin[:, : sin.shape[1] // 2])
        )
        if _matches(apply, cos, sin, halves, interleaved, int(getattr(attention, "head_dim", 0))):
            return Rotary(halves[0].contiguous(), halves[1].contiguous(), interleaved, modeling)
    raise _refusal(decoder, "its rotation is neither the half-split nor the interleaved form")


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """The operator's formula: rotate the first ``2 * cos.shape[1]`` of the head dims of x ``[B, N, S, D]``."""
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    width = 2 * cos.shape[1]
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
    if cos.shape[1] != head_dim:  # partial rotary is applied outside this function: not expressed here
        return False
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 7, head_dim, generator=generator) for _ in range(2))
    positions = torch.tensor([[0, 1, 2, 3, 5, 8, 13]])
    got_q, got_k = apply(q, k, cos[positions], sin[positions])
    want_q, want_k = (rotate(x, *halves, positions, interleaved) for x in (q, k))
    return bool((got_q - want_q).abs().max() <= _LIMIT and (got_k - want_k).abs().max() <= _LIMIT)


def _rotary_module(decoder: Any, layer: nn.Module) -> nn.Module:
    outputs: list[tuple[nn.Module, Any, int]] = []
    reached: list[Any] = []

    def seen(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        outputs.append((module, out, len(args) + len(kwargs)))

    handles = [m.register_forward_hook(seen, with_kwargs=True) for m in decoder.children()]
    handles.append(
        layer.register_forward_pre_hook(
            lambda _m, _a, kw: reached.append(kw.get("position_embeddings")), with_kwargs=True
        )
    )
    hidden = decoder.config.get_text_config().hidden_size
    try:
        with torch.no_grad():
            decoder(inputs_embeds=torch.zeros(1, 2, hidden, dtype=decoder.dtype), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for module, out, arguments in outputs:
        if reached and out is reached[0]:
            if arguments > _TABLE_ARGUMENTS:
                raise _refusal(decoder, "its rotary table depends on more than the position")
            return module
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
