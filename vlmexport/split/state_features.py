"""Image features of models that have no function for them: what their decoder is given to attend to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.cross import STATES, TILE_MASK
from vlmexport.split.decoder import text_decoder
from vlmexport.split.layers import overridden

_TEXT = ("input_ids", "attention_mask", TILE_MASK)


def states_function(model: Any, inputs: Mapping[str, torch.Tensor]) -> tuple[Callable[..., Any], dict[str, str]]:
    """A function of the model's image inputs that gives the states, and its arguments by input.

    The decoder does not run. Raises `UnsupportedModelError` for a decoder that is given none.
    """
    if not hasattr(model, "get_decoder"):
        raise UnsupportedModelError(
            f"{model.config.model_type}: the model has no get_image_features and no get_decoder"
        )
    decoder = text_decoder(model)
    hidden = decoder.config.get_text_config().hidden_size

    def ask(**given: Any) -> Any:
        found: list[Any] = []

        def keep(*_args: Any, **kwargs: Any) -> Any:
            found.append(kwargs.get(STATES))
            last = torch.zeros(1, 1, hidden, dtype=decoder.dtype)
            return SimpleNamespace(last_hidden_state=last, past_key_values=None, hidden_states=None, attentions=None)

        with overridden(decoder, keep):
            model(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False, **given)
        return found[0]

    arguments = {name: name for name in inputs if name not in _TEXT}
    with torch.no_grad():
        states = ask(**{name: inputs[name] for name in arguments})
    if not isinstance(states, torch.Tensor):
        raise UnsupportedModelError(
            f"{model.config.model_type}: the model has no get_image_features and gives its decoder no {STATES}, so it "
            "cannot be cut"
        )
    return ask, arguments
