"""Keys and values of layers that keep something smaller, of which they make them again for every token (latents)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.kv import LayerKV
from vlmexport.split.attention import attention_implementation, plain_attention
from vlmexport.split.decoder import text_decoder
from vlmexport.split.difference import REPLAY_LIMIT
from vlmexport.split.per_layer import text_arguments

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

_TOKENS, _FIRST = 5, 3
_Pair = tuple[torch.Tensor, torch.Tensor]


def expanded_kv(vlm: VLM) -> dict[int, LayerKV]:
    """What each layer's attention is given, as keys and values that can be kept: by layer, with the wider head size.

    A layer is there only if its keys and values of first tokens are the same with and without further tokens behind
    them: then they may be kept for each token. Narrower ones are kept with zeros behind them.
    """
    decoder: Any = text_decoder(vlm.model)
    width = vlm.facts.hidden_size
    embeds = torch.randn(1, _TOKENS, width, generator=torch.Generator().manual_seed(0)).to(decoder.dtype)
    whole, first = _attended(decoder, embeds), _attended(decoder, embeds[:, :_FIRST])
    found = {}
    for layer, (keys, values) in whole.items():
        if layer in first and keys.ndim == values.ndim == 4 and keys.shape[:3] == values.shape[:3]:
            same = all(_same(many[:, :, :_FIRST], few) for many, few in zip((keys, values), first[layer], strict=True))
            if same and keys.shape[2] == _TOKENS:
                found[layer] = LayerKV(keys.shape[1], max(keys.shape[3], values.shape[3]))
    return found


def refuse_more(what: str, layer: Any) -> None:
    """Refuse a layer (`what` names it) whose entry in the cache holds tensors beside keys and values.

    Such layers attend to some of the tokens, which they choose by them or keep there. With few tokens that is all of
    them, so nothing else would show it.
    """
    more = [
        name
        for name, tensor in getattr(layer, "__dict__", {}).items()
        if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and name not in {"keys", "values"}
    ]
    if more:
        raise UnsupportedModelError(
            f"{what} of the decoder keeps {', '.join(more)} beside keys and values, for attention to some of the "
            "tokens; such sparse attention is not supported yet"
        )


@torch.no_grad()
def _attended(decoder: Any, embeds: torch.Tensor) -> dict[int, _Pair]:
    """Keys and values that reach the attention of each layer for `embeds` ``[1, tokens, hidden]``."""
    found: dict[int, _Pair] = {}

    def keep(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
        found[getattr(module, "layer_idx", -1)] = (key, value)
        return plain_attention(module, query, key, value, mask, **kwargs)

    with attention_implementation(decoder, "vlmexport_expanded", keep):
        decoder(inputs_embeds=embeds, use_cache=False, **text_arguments(decoder, 1, embeds.shape[1]))
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    scale = other.float().abs().max().clamp_min(1e-12)
    return one.shape == other.shape and bool((one.float() - other.float()).abs().max() <= REPLAY_LIMIT * scale)
