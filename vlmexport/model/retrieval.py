"""Models that give embeddings of pages and queries, one for each token, instead of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.model.json_files import read_json_if_there

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def retrieval_class(path: Path) -> Any:
    """The class of transformers that the checkpoint in `path` names, where it gives embeddings; None for any other.

    Nothing but transformers' own code runs, on no memory for weights.
    """
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    config = read_json_if_there(path / "config.json")
    found: Any = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    kind: Any = getattr(found, "config_class", None)
    model_type = str(config.get("model_type"))
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or getattr(kind, "model_type", None) != model_type:
        return None
    if issubclass(found, transformers.GenerationMixin) or not kind.sub_configs_defaults:
        return None
    with torch.device("meta"):
        empty = found(kind.from_pretrained(path, local_files_only=True))
    return found if embedding_head(empty) is not None else None


def embedding_head(model: PreTrainedModel) -> nn.Linear | None:
    """The linear layer that makes embeddings of the last hidden states: beside one whole model, the only child."""
    from torch import nn
    from transformers import GenerationMixin, PreTrainedModel

    children = [] if isinstance(model, GenerationMixin) else list(model.children())
    heads = [child for child in children if isinstance(child, nn.Linear)]
    if len(children) != 2 or len(heads) != 1 or not any(isinstance(child, PreTrainedModel) for child in children):
        return None
    return heads[0]


def gives_embeddings(model: PreTrainedModel) -> bool:
    """Was `model` loaded for its embeddings (`with_embedding_head`)?"""
    return "get_output_embeddings" in model.__dict__


def with_embedding_head(model: Any) -> Any:
    """`model`, whose output embeddings are from now on the layer that makes its embeddings."""
    head = embedding_head(model)
    model.__dict__["get_output_embeddings"] = lambda: head
    return model
