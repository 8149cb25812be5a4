"""Image features as rows: what `get_image_features` of any family gives, in the order of the image tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.packed import packed_pictures
from vlmexport.split.projected import Projected
from vlmexport.split.state_features import states_function
from vlmexport.split.tower_features import SeenEncoderError, patches_function, stopped_at_encoder

_FUNCTION = "get_image_features"


@dataclass(frozen=True)
class FeatureCall:
    """How the whole model asks for its image features: the function, and by which names it gets the model's inputs.

    `arguments`: input of the whole model (what a processor makes) to the argument that it is given as. `behind`: what
    the model does with a result that holds no features yet.
    """

    function: Callable[..., Any]
    arguments: Mapping[str, str]
    behind: Projected | None = None

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The function's result for those of `inputs` that it takes."""
        given = {argument: inputs[name] for name, argument in self.arguments.items() if name in inputs}
        with packed_pictures(getattr(self.function, "__self__", None)):
            result = self.function(**given)
            if self.behind is None:
                return result
            return self.behind(result, {name: inputs[name] for name in self.arguments if name in inputs})


def find_feature_call(model: Any, image_token: int, inputs: Mapping[str, torch.Tensor]) -> FeatureCall:
    """See what the whole model gives ``get_image_features`` (its own or its base model's) for `inputs`.

    The model is run up to that call and no further. `inputs` may lack the text.
    Raises `UnsupportedModelError` when there is no such function, or it is given something else than inputs.
    """
    family = model.config.model_type
    base = getattr(model, "base_model", model)
    owners = [owner for owner in ((model,) if base is model else (model, base)) if hasattr(owner, _FUNCTION)]
    if not owners:
        return FeatureCall(*states_function(model, inputs))
    tokens = torch.full((1, 2), image_token)  # a single token may pass for a step behind the prompt
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **inputs}
    try:
        with torch.no_grad(), _stopped(owners), stopped_at_encoder(model):
            model(**given, use_cache=False)
    except _SeenError as seen:
        owner = getattr(seen.function, "__self__", model)
        behind = Projected(model, owner, _FUNCTION, image_token)
        return FeatureCall(seen.function, _arguments(family, seen, inputs), behind)
    except SeenEncoderError as seen:
        if (direct := patches_function(model, inputs, seen)) is not None:
            return FeatureCall(*direct)
    raise UnsupportedModelError(
        f"{family}: the model does not call {_FUNCTION} for the inputs {sorted(inputs)}, so it cannot be cut"
    )


class _SeenError(Exception):
    """Carries a call out of the model."""

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(_FUNCTION)
        self.function = function
        self.given = {**dict(zip(inspect.signature(function).parameters, args, strict=False)), **kwargs}


@contextmanager
def _stopped(owners: Sequence[Any]) -> Iterator[None]:
    """Within, asking one of `owners` for image features raises `_SeenError`."""

    def stop(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            raise _SeenError(function, args, kwargs)

        return run

    before = [owner.__dict__.get(_FUNCTION) for owner in owners]
    for owner in owners:
        owner.__dict__[_FUNCTION] = stop(getattr(owner, _FUNCTION))
    try:
        yield
    finally:
        for owner, function in zip(owners, before, strict=True):
            del owner.__dict__[_FUNCTION]
            owner.__dict__.update({} if function is None else {_FUNCTION: function})


def _arguments(family: str, seen: _SeenError, inputs: Mapping[str, torch.Tensor]) -> dict[str, str]:
    tensors = {name: value for name, value in seen.given.items() if isinstance(value, torch.Tensor)}
    found = {}
    for argument, tensor in tensors.items():
        names = [name for name, value in inputs.items() if value is tensor] or [n for n in inputs if n == argument]
        if not names:
            raise UnsupportedModelError(
                f"{family}: {_FUNCTION} gets {argument}, which is none of the inputs {sorted(inputs)} as they are"
            )
        found[names[0]] = argument
    if not found:
        raise UnsupportedModelError(f"{family}: {_FUNCTION} gets none of the inputs {sorted(inputs)}")
    return found


def feature_rows(output: Any, deepstack_layers: int) -> torch.Tensor:
    """Rows ``[image_tokens, (1 + deepstack_layers) * hidden]`` of what ``get_image_features`` returned.

    Raises `UnsupportedModelError` where it gives none.

    The first `hidden` values of a row replace the embedding; each further `hidden` are for one early decoder layer.
    """
    features = getattr(output, "pooler_output", output)
    if features is None:
        raise UnsupportedModelError(
            f"{_FUNCTION} gives hidden states that the model itself projects afterwards, and no features; such models "
            "cannot be cut yet"
        )
    rows = [_joined(features)]
    if deepstack_layers:
        rows += [_joined(level) for level in output.deepstack_features[:deepstack_layers]]
    return torch.cat(rows, dim=1)


def _joined(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """``[rows, hidden]`` of one tensor of any rank, or of one for each picture."""
    rows = [features] if isinstance(features, torch.Tensor) else list(features)
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
