"""Tiny random checkpoints with a working processor, tokenizer and chat template, made from configs alone.

The weights are random but nothing is 0 or 1 (norms and biases included), logits have a spread of about 1 and depend on
the image, so that a difference of 0 between two ways of computing means something.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CORPUS = (
    "what is in the picture? a red square above a blue circle.",
    "how many shapes are there? there are three shapes: one triangle, two circles.",
    "read the word. describe the image in one sentence. where is the green star?",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] | capitalize }}:"
    "{% if m['content'] is string %} {{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class TinySpec:
    """Sizes of a tiny checkpoint; `text` and `vision` are keys of the sub-configs, `text_type` is the decoder."""

    dtype: str = "float32"
    hidden: int = 128
    intermediate: int = 256
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    vocab: int = 448
    tied: bool = False
    vision_hidden: int = 64
    vision_layers: int = 3
    vision_heads: int = 2
    image_size: int = 32
    patch_size: int = 8
    image_splitting: bool = True
    text_type: str = "llama"
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)


def make_tiny(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a checkpoint of `family` (``idefics3``, ``llava``, ``vipllava``) to `folder` and return it.

    `overrides` are fields of `TinySpec`.
    """
    spec = TinySpec(**overrides)
    tokenizer = make_tokenizer(spec.vocab)
    model, processor = FAMILIES[family](spec, tokenizer)
    randomise(model, seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(getattr(torch, spec.dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter: matrices keep the scale of their input, norms are near 1, biases near 0, none equal."""
    generator = torch.Generator().manual_seed(seed)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in tables or (parameter.ndim == 1 and "class_embedding" in name):
                parameter.copy_(noise if "position" not in name else 0.3 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter[0].numel() ** 0.5)
        # A tied head reads the table, whose rows must then have the scale of a head.
        head = model.get_output_embeddings().weight
        if id(head) in tables:
            head.div_(head.shape[1] ** 0.5)


def make_tokenizer(vocab: int) -> Any:
    """A byte-level BPE tokenizer of at most `vocab` entries, special tokens included."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    special = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1,
        special_tokens=[*special, "<global-img>", *rows],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("\n\n", special=False, normalized=False)])  # as SmolVLM's has; llama.cpp needs it
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=2048,
    )


def _text_config(spec: TinySpec, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        spec.text_type,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab,
        max_position_embeddings=2048,
        tie_word_embeddings=spec.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **spec.text,
    )


def _vision_sizes(spec: TinySpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.vision_hidden,
        "intermediate_size": 2 * spec.vision_hidden,
        "num_hidden_layers": spec.vision_layers,
        "num_attention_heads": spec.vision_heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        **spec.vision,
    }


def _idefics3(spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    config = Idefics3Config(
        text_config=_text_config(spec, tokenizer),
        vision_config=_vision_sizes(spec),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=spec.tied,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 2 * spec.image_size if spec.image_splitting else spec.image_size},
        max_image_size={"longest_edge": spec.image_size},
        do_image_splitting=spec.image_splitting,
    )
    tokens = (spec.image_size // spec.patch_size) ** 2 // 4
    processor = Idefics3Processor(images, tokenizer, image_seq_len=tokens, chat_template=CHAT_TEMPLATE)
    return Idefics3ForConditionalGeneration(config), processor


def _llava_parts(spec: TinySpec, tokenizer: Any) -> tuple[dict[str, Any], Any]:
    from transformers import CLIPVisionConfig, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = spec.image_size
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=spec.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = {
        "text_config": _text_config(spec, tokenizer),
        "vision_config": CLIPVisionConfig(**_vision_sizes(spec)),
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": spec.tied,
    }
    return config, processor


def _llava(spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config, processor = _llava_parts(spec, tokenizer)
    return LlavaForConditionalGeneration(LlavaConfig(**config)), processor


def _vipllava(spec: TinySpec, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    config, processor = _llava_parts(spec, tokenizer)
    layers = VipLlavaConfig(**config, vision_feature_layer=[-1, -2, 1])
    return VipLlavaForConditionalGeneration(layers), processor


FAMILIES = {"idefics3": _idefics3, "llava": _llava, "vipllava": _vipllava}
