"""Load a vision-language model: a folder or hub id becomes a `VLM` whose weights stay memory-mapped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.calling_transformers import clear_errors, quiet_transformers
from vlmexport.model.checkpoint import Checkpoint, check_loading, read_checkpoint
from vlmexport.model.importers.packed import QuantizedCheckpoint
from vlmexport.model.kv import KVGeometry
from vlmexport.model.packed import load_packed
from vlmexport.model.remote import loading_class
from vlmexport.model.retrieval import gives_embeddings, retrieval_class, with_embedding_head
from vlmexport.model.source import resolve_source
from vlmexport.model.wrapped import inner_model, wrapping_class

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from vlmexport.model.lora import MergedAdapter

FLOAT_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class ModelFacts:
    """What the other rooms need to know of a model, read from its config.

    `output`: what the decoder's head gives; of ``embeddings``, `vocab_size` is their width.
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
    output: Literal["logits", "embeddings"] = "logits"


@dataclass(frozen=True)
class VLM:
    """A loaded model: `model` is in eval mode, in the checkpoint's own dtype, its parameters memory-mapped.

    `source` is what the user typed, `path` the local folder. Call `processor()` for the Hugging Face processor. Where
    the checkpoint came quantized, `quantized` holds its codes, and `model` is in float32 with exactly what they mean.
    Where an adapter was merged, `lora` says which; the weights are then those in `path` with it.
    """

    source: str
    path: Path
    config: PreTrainedConfig
    model: PreTrainedModel
    facts: ModelFacts
    trust_remote_code: bool = False
    quantized: QuantizedCheckpoint | None = None
    lora: MergedAdapter | None = None

    def processor(self) -> Any:
        """The model's processor (image processor, tokenizer, chat template)."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)

    @property
    def adapter_files(self) -> tuple[Path, ...]:
        """The files of the adapter that was merged; none without one."""
        return () if self.lora is None else self.lora.files

    def parameters_by_name(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer by its name in the PyTorch model (tied ones once, under their first name)."""
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


def load_vlm(source: str, *, lora: str | None = None, trust_remote_code: bool = False, embeddings: bool = False) -> VLM:
    """Load the model `source` (a folder, a hub id, or ``demo``) and merge the LoRA adapter `lora` (folder or hub id).

    Every tensor of the checkpoint is accounted for: nothing is filled with random numbers and nothing is left over. A
    quantized checkpoint keeps its codes (see `vlmexport.model.packed`). A model that gives `embeddings` instead of text
    is refused where that is False. Raises `BadInputError` with one clear line for
    anything that is not a loadable vision-language model, and `NotPossibleHereError` when a hub id cannot be fetched.
    """
    path = resolve_source(source, trust_remote_code=trust_remote_code)
    checkpoint = read_checkpoint(path, trust_remote_code=trust_remote_code)
    quantized = None
    dtype = None
    if checkpoint.quantization is None:
        model = _from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    else:
        model, quantized, dtype = load_packed(checkpoint, trust_remote_code=trust_remote_code)
    model.eval()
    model.requires_grad_(False)
    merged = None if lora is None else _merge(model, lora, source, quantized)
    facts = model_facts(model, dtype)
    if facts.output == "embeddings" and not embeddings:
        raise UnsupportedModelError(
            f"{source}: {facts.model_type} gives embeddings of pages and queries, not text; `vlmexport onnx` exports "
            "such a model, this command needs one that writes text"
        )
    return VLM(source, path, model.config, model, facts, trust_remote_code, quantized, merged)


def _merge(model: PreTrainedModel, lora: str, source: str, quantized: QuantizedCheckpoint | None) -> MergedAdapter:
    from vlmexport.model.lora import merge_adapter
    from vlmexport.model.lora_files import read_adapter

    if quantized is not None:
        raise BadInputError(
            f"{source} is quantized already ({quantized.summary}); merging {lora} would round its weights a second "
            "time: give the original weights as --model"
        )
    return merge_adapter(model, read_adapter(lora), source)


def _from_pretrained(checkpoint: Checkpoint, *, trust_remote_code: bool) -> PreTrainedModel:
    with clear_errors(checkpoint), quiet_transformers():
        retrieval = retrieval_class(checkpoint.path)
        wrapping = retrieval or wrapping_class(checkpoint.path)
        found = wrapping or loading_class(checkpoint.path, trust_remote_code=trust_remote_code)
        remote: dict[str, Any] = {} if wrapping is not None else {"trust_remote_code": trust_remote_code}
        model, info = found.from_pretrained(
            checkpoint.path,
            dtype="auto",
            **remote,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported in `info`, with both shapes, and refused there
            output_loading_info=True,
        )
    check_loading(checkpoint.path, info)
    loaded: PreTrainedModel = model
    if retrieval is not None:
        return with_embedding_head(loaded)
    return loaded if wrapping is None else inner_model(loaded) or loaded


def model_facts(model: PreTrainedModel, dtype: str | None = None) -> ModelFacts:
    """Read `ModelFacts` from a loaded model's config; raises `UnsupportedModelError` naming what it lacks.

    `dtype` is the checkpoint's where that is not the model's own.
    """
    retrieves = gives_embeddings(model)
    config: Any = model.base_model.config if retrieves else model.config
    text = config.get_text_config()
    head: Any = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{config.model_type}: {_without_head(model)}")
    return ModelFacts(
        architecture=type(model).__name__,
        model_type=model.config.model_type,
        dtype=dtype or _checkpoint_dtype(model),
        image_token_id=_image_token_id(config),
        hidden_size=text.hidden_size,
        vocab_size=head.out_features if retrieves else text.vocab_size,
        kv=_kv_geometry(config.model_type, text),
        tied_embeddings=bool(model.get_input_embeddings().weight.data_ptr() == head.weight.data_ptr()),
        eos_token_ids=_eos_token_ids(model, text),
        output="embeddings" if retrieves else "logits",
    )


def _without_head(model: PreTrainedModel) -> str:
    """Why a model whose own accessor gives no LM head cannot be exported."""
    for name, child in model.named_children():
        if getattr(child, "get_output_embeddings", lambda: None)() is not None:
            return f"its LM head is inside {name}, and not given by the model itself; such models are not supported yet"
    return "the model has no LM head, so it writes no text"


def _checkpoint_dtype(model: PreTrainedModel) -> str:
    name = str(model.dtype).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        raise UnsupportedModelError(
            f"{model.config.model_type}: the weights are {name}; supported are {', '.join(FLOAT_DTYPES)}"
        )
    return name


def _image_token_id(config: PreTrainedConfig) -> int:
    for name in ("image_token_id", "image_token_index"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    raise UnsupportedModelError(f"{config.model_type}: the config has no image token id, so features have no place")


def _kv_geometry(model_type: str, text: Any) -> KVGeometry:
    heads = getattr(text, "num_attention_heads", None)
    layers = getattr(text, "num_hidden_layers", None)
    if not heads or not layers:
        raise UnsupportedModelError(f"{model_type}: the text config names no attention heads or layers")
    first = text.per_layer_config[0] if getattr(text, "is_heterogeneous", False) else text
    head_dim = getattr(first, "head_dim", None) or text.hidden_size // heads
    return KVGeometry(layers, getattr(first, "num_key_value_heads", None) or heads, head_dim)


def _eos_token_ids(model: PreTrainedModel, text: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = getattr(text, "eos_token_id", None)
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
