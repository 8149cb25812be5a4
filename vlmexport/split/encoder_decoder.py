"""The split of a model whose language model is an encoder-decoder: image features go into its encoder's embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.manifest import TensorSpec
from vlmexport.model.cross import STATE_MASK
from vlmexport.model.merge import MergeSpec
from vlmexport.split.cross import STATES, CrossAttention, CrossDecoder, CrossKeys, find_cross
from vlmexport.split.decoder import DecoderCall, text_decoder
from vlmexport.split.difference import refuse_difference
from vlmexport.split.language import LanguageParts
from vlmexport.split.logits import find_logit_scale
from vlmexport.split.parts import Part, Role, Signature
from vlmexport.split.relative import find_relative
from vlmexport.split.usage import parameters_behind
from vlmexport.split.vision import VisionPart

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

Example = dict[str, torch.Tensor]
# Tokens of an answer that the decoder is compared on, the one that starts it included.
_ANSWER = 4
_PADDED = 2
_ENCODER_KNOWN = {"inputs_embeds", "attention_mask"}
_DECODER_KNOWN = {"input_ids", "attention_mask", "inputs_embeds", STATES[0], STATE_MASK}
_CONTROL = {"past_key_values", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}


def is_encoder_decoder(model: Any) -> bool:
    """Has the language model of `model` an encoder of its own?"""
    return bool(getattr(model.get_decoder().config, "is_encoder_decoder", False))


def start_token(model: Any) -> int:
    """The token that an answer starts with; raises `UnsupportedModelError` where no configuration names one."""
    owners = (model.generation_config, model.config, model.config.get_text_config(), text_decoder(model).config)
    for owner in owners:
        token = getattr(owner, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise UnsupportedModelError(f"{model.config.model_type}: no configuration names a decoder_start_token_id")


@dataclass(frozen=True)
class EncoderCall:
    """One full forward: what reached the text encoder, its states, what reached the decoder, and the logits."""

    embeds: torch.Tensor
    mask: torch.Tensor
    states: torch.Tensor
    tokens: torch.Tensor
    logits: torch.Tensor


def text_encoder(model: Any, decoder: Any, example: Example) -> Any:
    """The module of `model` whose result the decoder gets as states: the outermost one that has not the decoder."""
    seen: list[tuple[Any, torch.Tensor]] = []
    wanted: list[torch.Tensor] = []

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if isinstance(state, torch.Tensor):
            seen.append((module, state))

    handles = [m.register_forward_hook(keep) for m in model.modules() if m is not decoder]
    handles.append(
        decoder.register_forward_pre_hook(lambda _m, _a, kwargs: wanted.append(kwargs[STATES[0]]), with_kwargs=True)
    )
    try:
        with torch.no_grad():
            model(**example, decoder_input_ids=torch.full((1, 1), start_token(model)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    found = [m for m, state in seen if wanted and state is wanted[0] and decoder not in set(m.modules())]
    if not found:
        raise UnsupportedModelError(
            f"{model.config.model_type}: what its decoder attends to is not the result of a text encoder as it is"
        )
    return found[-1]


def capture_call(model: Any, encoder: Any, example: Example, tokens: torch.Tensor) -> EncoderCall:
    """Run the whole model on `example` and an answer's first `tokens` ``[1, n]``, and keep what reached its parts.

    Raises `UnsupportedModelError` for a part that is given more than embeddings, states and masks of padding.
    """
    family, decoder = model.config.model_type, text_decoder(model)
    inner: list[dict[str, Any]] = []
    outer: list[dict[str, Any]] = []

    def keep(calls: list[dict[str, Any]]) -> Any:
        return lambda _module, args, kwargs: calls.append({**kwargs, **({"positional": args} if args else {})})

    handles = [
        encoder.register_forward_pre_hook(keep(inner), with_kwargs=True),
        decoder.register_forward_pre_hook(keep(outer), with_kwargs=True),
    ]
    try:
        with torch.no_grad():
            logits = model(**example, decoder_input_ids=tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if (len(inner), len(outer)) != (1, 1):
        raise UnsupportedModelError(
            f"{family}: encoder and decoder ran {len(inner)} and {len(outer)} times in one forward, expected once each"
        )
    for what, call, known in (("encoder", inner[0], _ENCODER_KNOWN), ("decoder", outer[0], _DECODER_KNOWN)):
        given = {name for name, value in call.items() if isinstance(value, torch.Tensor) or name == "positional"}
        if unknown := sorted(given - known - _CONTROL):
            raise UnsupportedModelError(f"{family}: the text {what} also takes {', '.join(unknown)}")
    embeds = inner[0]["inputs_embeds"]
    mask = inner[0].get("attention_mask")
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64) if mask is None else mask.long()
    return EncoderCall(embeds, mask, outer[0][STATES[0]], tokens, logits)


class TextEncoder(VisionPart):
    """Merged embeddings in, keys and values of every cross-attention out.

    It has the parameters of the whole model under their names; `used` are those that it computes with. `relative`: what
    its attention adds to scores, None for nothing.
    """

    def __init__(self, model: Any, encoder: Any, keys: CrossKeys, example: Example) -> None:
        super().__init__(model, tuple(keys.cross.names), ())
        self._cut = (encoder, keys)
        self.relative = find_relative(model.config.model_type, encoder)
        self.used = parameters_behind(model, lambda: self(**example))

    @property
    def attending(self) -> Any:
        """The module whose attention a lowering writes in its own words."""
        return self._cut[0]

    def states(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """What the decoder attends to, ``[B, T, width]``; ``attention_mask`` ``[B, T]`` is 1 for what is no padding."""
        out: Any = self._cut[0](inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        states: torch.Tensor = out.last_hidden_state
        return states

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values ``[B, heads, T, head_dim]`` in the order of `outputs`."""
        return tuple(self._cut[1](self.states(inputs_embeds, attention_mask)).values())


def split_encoder_decoder(vlm: VLM, examples: tuple[Example, ...]) -> LanguageParts:
    """Text encoder and decoder of `vlm`, proven on every example, on several tokens of an answer and on padding.

    Raises `UnsupportedModelError` when they do not reproduce the model's logits.
    """
    model, family = vlm.model, vlm.facts.model_type
    decoder, start = text_decoder(model), start_token(model)
    encoder = text_encoder(model, decoder, examples[0])
    answer = torch.arange(1, _ANSWER) * 7 % vlm.facts.vocab_size
    tokens = torch.cat([torch.tensor([start]), answer])[None]
    calls = [capture_call(model, encoder, example, tokens) for example in (*examples, _padded(examples[-1]))]
    cross, kv = find_cross(family, decoder, STATES[0], calls[0].states.shape[-1], 0)
    whole = CrossDecoder(decoder, model.get_output_embeddings(), cross)
    states = cross.arguments(torch.zeros(1, _ANSWER, cross.width, dtype=decoder.dtype), None)
    whole.kv, whole.relative = kv, find_relative(family, decoder, states)
    first = {"inputs_embeds": calls[0].embeds, "attention_mask": calls[0].mask}
    inner = TextEncoder(model, encoder, CrossKeys(decoder, cross), first)
    difference, given = 0.0, []
    for call in calls:
        with torch.no_grad():
            keys = dict(zip(inner.outputs, inner(call.embeds, call.mask), strict=True))
            embeds = model.get_input_embeddings()(call.tokens)
        given.append(
            {"inputs_embeds": embeds, "attention_mask": torch.ones_like(call.tokens), **keys, STATE_MASK: call.mask}
        )
        with torch.no_grad():
            logits = whole(**given[-1])
            if whole.logit_scale is None:
                whole.logit_scale = find_logit_scale(decoder.config, logits, call.logits)
                logits = logits if whole.logit_scale is None else whole(**given[-1])
        difference = max(difference, refuse_difference(vlm, "text encoder, decoder and LM head", logits, call.logits))
    layers = tuple(cross.kept)
    merge = MergeSpec(vlm.facts.image_token_id, decoder_start_token_id=start, cross_layers=layers)
    prompts = tuple({"inputs_embeds": c.embeds, "attention_mask": c.mask} for c in calls)
    parts = {
        Role.ENCODER: _encoder_part(inner, cross, prompts, vlm),
        Role.DECODER: decoder_part(whole, tuple(given), vlm, (STATE_MASK,)),
    }
    seen = [DecoderCall({"inputs_embeds": call.embeds}, call.logits) for call in calls[: len(examples)]]
    return LanguageParts(parts, merge, kv, seen, difference)


def _padded(example: Example) -> Example:
    """The same prompt with its last tokens marked as padding."""
    mask = torch.ones_like(example["input_ids"])
    mask[:, -_PADDED:] = 0
    return {**example, "attention_mask": mask}


def _encoder_part(inner: TextEncoder, cross: CrossAttention, prompts: tuple[Example, ...], vlm: VLM) -> Part:
    rows = ("batch_size", "encoder_length")
    signature = Signature(
        (
            TensorSpec("inputs_embeds", "float32", (*rows, vlm.facts.hidden_size)),
            TensorSpec("attention_mask", "int64", rows),
        ),
        key_value_specs(cross, "encoder_length"),
    )
    # A trace takes an axis of 1 for a constant: two rows, one of them padded.
    both = (prompts[-2], prompts[-1])
    batch = {name: torch.cat([prompt[name] for prompt in both]) for name in prompts[0]}
    return Part(Role.ENCODER, inner, "", signature, (batch, *prompts))


def key_value_specs(cross: CrossAttention, length: str) -> tuple[TensorSpec, ...]:
    """The keys and values of every cross-attention, as graphs give and take them."""
    return tuple(
        TensorSpec(name, "float32", ("batch_size", kept.heads, length, kept.head_dim))
        for name, kept in cross.names.items()
    )


def decoder_part(whole: CrossDecoder, examples: tuple[Example, ...], vlm: VLM, masks: tuple[str, ...]) -> Part:
    """The decoder part; `masks` are the names of what says which states are seen."""
    tokens = ("batch_size", "sequence_length")
    dims = {STATE_MASK: ("batch_size", "cross_length")}
    signature = Signature(
        (
            TensorSpec("inputs_embeds", "float32", (*tokens, vlm.facts.hidden_size)),
            TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
            *key_value_specs(whole.cross, "cross_length"),
            *(TensorSpec(name, "int64", dims.get(name, (*tokens, "tiles"))) for name in masks),
        ),
        (TensorSpec("logits", "float32", (*tokens, vlm.facts.vocab_size)),),
    )
    return Part(Role.DECODER, whole, "", signature, examples)
