"""Classes that wrap a whole image-text-to-text model and add no weights, such as a classifier by two tokens' logits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.model.json_files import read_json_if_there

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def wrapping_class(path: Path) -> Any:
    """The class of transformers that the checkpoint in `path` names, where it wraps the model that is exported.

    None where the name is that of the model itself, or of nothing that transformers has: its auto class then decides.
    Nothing but transformers' own code runs, on no memory for weights.
    """
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    config = read_json_if_there(path / "config.json")
    name = str((config.get("architectures") or [""])[0])
    if name == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(str(config.get("model_type"))):
        return None
    found: Any = getattr(transformers, name, None)
    kind: Any = getattr(found, "config_class", None)
    if kind is None or getattr(kind, "model_type", None) != config.get("model_type") or not kind.sub_configs_defaults:
        return None
    if issubclass(found, transformers.GenerationMixin):
        return None
    with torch.device("meta"):
        empty = found(kind.from_pretrained(path, local_files_only=True))
    return found if inner_model(empty) is not None else None


def inner_model(model: PreTrainedModel) -> PreTrainedModel | None:
    """The only child of `model`, where it is a model that writes text and holds all of its weights; else None."""
    from transformers import PreTrainedModel

    children = list(model.children())
    if len(children) != 1 or not isinstance(children[0], PreTrainedModel):
        return None
    (child,) = children
    alone = not list(model.named_parameters(recurse=False)) and not list(model.named_buffers(recurse=False))
    return child if alone and child.get_output_embeddings() is not None else None
