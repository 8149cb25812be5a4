"""Image features of models whose ``get_image_features`` gives hidden states that the model projects afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.interception import Absorber


class _FeaturesError(Exception):
    """Carries the features out of the model."""

    def __init__(self, features: Any) -> None:
        super().__init__("features")
        self.features = features


class Projected:
    """What a model does with the result of its feature function before it merges it.

    `owner` has the function under `name`; `inputs` are the whole model's, without text.
    """

    def __init__(self, model: Any, owner: Any, name: str, image_token: int) -> None:
        self._cut = (model, owner, name, image_token)

    def __call__(self, result: Any, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Features of the text's width: those in `result`, or what the first module behind the function makes of it.

        `result` itself where neither is there. Raises `UnsupportedModelError` for hidden states that are as wide.
        """
        if not unprojected(result):
            return result
        model, owner, name, image = self._cut
        if _as_wide(result, model):
            raise UnsupportedModelError(
                f"{model.config.model_type}: {name} gives hidden states of the text's own width and no features; such "
                "models are not supported yet"
            )
        tokens = torch.full((1, 2), image)  # a single token may pass for a step behind the prompt
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **inputs}
        watch = _Watch(model.config.get_text_config().hidden_size)

        def asked(*_args: Any, **_kwargs: Any) -> Any:
            watch.asked = True
            return result

        with ExitStack() as stack:
            before = owner.__dict__.get(name)
            owner.__dict__[name] = asked
            stack.callback(_restore, owner, name, before)
            for module in model.modules():
                stack.callback(module.register_forward_pre_hook(watch.enter).remove)
                stack.callback(module.register_forward_hook(watch.leave).remove)
            try:
                model.forward(**given, use_cache=False)  # a trace knows the model by another name
            except _FeaturesError as found:
                return found.features
        return result


def _as_wide(result: Any, model: Any) -> bool:
    """Have the hidden states of `result` the text's width already, so that nothing may project them?"""
    states = result.last_hidden_state
    return isinstance(states, torch.Tensor) and states.shape[-1] == model.config.get_text_config().hidden_size


def unprojected(result: Any) -> bool:
    """Does a result of ``get_image_features`` hold hidden states and no features?"""
    if isinstance(result, torch.Tensor | list | tuple) or not hasattr(result, "last_hidden_state"):
        return False
    return getattr(result, "pooler_output", None) is None


class _Watch:
    """Hooks of all modules: once the features were `asked` for, the first module's result is taken."""

    def __init__(self, width: int) -> None:
        self.asked = False
        self._width = width
        self._first: nn.Module | None = None

    def enter(self, module: nn.Module, _args: Any) -> None:
        if self.asked and self._first is None:
            self._first = module

    def leave(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if self._first is not module:
            return None
        if isinstance(output, Absorber) or getattr(output, "shape", (0,))[-1] == self._width:
            return _Taken(output)
        self._first = None
        return None


class _Taken:
    """Stands for the features: whatever is done to it takes them out of the model.

    A trace does not bear what a module raises, so it is left to the code behind the module.
    """

    def __init__(self, features: Any) -> None:
        self._features = features

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name) if name.startswith("__") else _FeaturesError(self._features)

    def __getitem__(self, _key: Any) -> Any:
        raise _FeaturesError(self._features)

    @classmethod
    def __torch_function__(cls, _function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        taken = next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise _FeaturesError(taken._features)


def _restore(owner: Any, name: str, before: Any) -> None:
    del owner.__dict__[name]
    owner.__dict__.update({} if before is None else {name: before})
