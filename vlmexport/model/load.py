"""Load a vision-language model: a folder or hub id becomes a `VLM` whose weights stay memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.errors import UnsupportedModelError
from vlmexport.model.kv import KVGeometry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ModelFacts:
    """What the other rooms need to know of a model, read from its config.

    `dtype` is the checkpoint's torch dtype name (``bfloat16``); sizes are in elements.
    """

    architecture: str
    model_type: str
    dtype: str
    image_token_id: int
    hidden_size: int
    vocab_size: int
    kv: KVGeometry
    tied_embeddings: bool
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class VLM:
    """A loaded model: `model` is in eval mode, in the checkpoint's own dtype, its parameters memory-mapped.

    `source` is what the user typed, `path` the local folder. Call `processor()` for the Hugging Face processor.
    """

    source: str
    path: Path
    config: PreTrainedConfig
    model: PreTrainedModel
    facts: ModelFacts
    trust_remote_code: bool = False

    def processor(self) -> Any:
        """The model's processor (image processor, tokenizer, chat template)."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    def parameters_by_name(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer by its name in the PyTorch model (tied ones once, under their first name)."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


def load_vlm(source: str, *, trust_remote_code: bool = False) -> VLM:
    """Load the model `source` (a folder, a hub id, or ``demo``).

    Raises `BadInputError` with one clear line for anything that is not a loadable vision-language model.
    """
    from transformers import AutoModelForImageTextToText

    path = Path(source)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto", trust_remote_code=trust_remote_code)
    model.eval()
    return VLM(source, path, model.config, model, model_facts(model), trust_remote_code)


def model_facts(model: PreTrainedModel) -> ModelFacts:
    """Read `ModelFacts` from a loaded model's config."""
    config = model.config
    text = config.get_text_config()
    image_token = getattr(config, "image_token_id", None)
    if image_token is None:
        image_token = getattr(config, "image_token_index", None)
    if image_token is None:
        raise UnsupportedModelError(f"{config.model_type}: the config has no image token id, so features have no place")
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return ModelFacts(
        architecture=type(model).__name__,
        model_type=config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        image_token_id=image_token,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        kv=KVGeometry(text.num_hidden_layers, kv_heads, head_dim),
        tied_embeddings=_shares_storage(model),
        eos_token_ids=eos_ids,
    )


def _shares_storage(model: PreTrainedModel) -> bool:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and bool(table.weight.data_ptr() == head.weight.data_ptr())
