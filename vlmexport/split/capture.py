"""The generic split: capture what reaches the decoder, replay it, and refuse unless the parts reproduce the model."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.manifest import TensorSpec
from vlmexport.model.kv import KVGeometry
from vlmexport.model.merge import MergeSpec
from vlmexport.model.per_token import PER_LAYER
from vlmexport.model.positions import AXES
from vlmexport.split.cache import find_cache
from vlmexport.split.counted import find_counted
from vlmexport.split.cross_attention import check_states, crosses, split_cross_attention
from vlmexport.split.decoder import (
    DecoderCall,
    DecoderPart,
    capture_decoder_call,
    find_capped_scale,
    find_logit_cap,
    replay,
    text_decoder,
)
from vlmexport.split.difference import refuse_difference as _refuse_difference
from vlmexport.split.encoder_decoder import is_encoder_decoder, split_encoder_decoder
from vlmexport.split.examples import processor_examples
from vlmexport.split.language import LanguageParts
from vlmexport.split.logits import find_hidden_tokens, find_logit_scale
from vlmexport.split.masks import SeenMasks, find_masks
from vlmexport.split.own_attention import remote_errors
from vlmexport.split.parts import Part, Role, Signature, Split
from vlmexport.split.per_layer import embedding_part, per_layer_spec, with_per_layer
from vlmexport.split.places import find_places, fixed_rows, merged_embeddings, with_embeddings
from vlmexport.split.positions import (
    configure,
    deepstack_arguments,
    dense_deepstack,
    further_inputs,
    has_axes,
    with_deepstack,
    with_positions,
)
from vlmexport.split.retrieval import decoder_of
from vlmexport.split.videos import with_videos
from vlmexport.split.vision import packed_features, projector_packing, projector_pictures, split_vision

if TYPE_CHECKING:
    from vlmexport.model.load import VLM


def split_model(vlm: VLM, examples: tuple[dict[str, torch.Tensor], ...] | None = None) -> Split:
    """Take `vlm` apart and prove that the parts reproduce it.

    `examples` are keyword inputs of the whole model (one image, another aspect ratio, two images); by default the
    model's own processor makes them. Raises `UnsupportedModelError` naming the family and what differs,
    `BadInputError` naming a weight that makes the logits NaN.
    """
    with remote_errors(vlm):
        return _split(vlm, processor_examples(vlm) if examples is None else examples)


def _split(vlm: VLM, examples: tuple[dict[str, torch.Tensor], ...]) -> Split:
    try:
        language = _language(vlm, examples)
    except RuntimeError as error:
        if "dtype" not in str(error) or vlm.model.dtype == torch.float32:
            raise
        examples = _in_own_type(vlm, examples)  # a model that does not turn pictures into its type
        language = _language(vlm, examples)
    merge, calls, difference = language.merge, language.calls, language.difference
    vision, projector = split_vision(vlm, examples)
    made = zip(projector.examples, examples, strict=True)
    features = [packed_features(projector, projector.module(**inner), example) for inner, example in made]
    merge = dataclasses.replace(merge, packing=projector_packing(projector), pictures=projector_pictures(projector))
    merge, projector = find_places(vlm, merge, projector, examples, calls, features)
    for example, call, rows in zip(examples, calls, features, strict=True):
        fixed = fixed_rows(projector.module)
        difference = max(difference, _merge_difference(vlm, merge, example, call, rows, fixed))
    merge, notes = with_videos(vlm, merge, (vision, projector), examples[0])
    parts = {
        Role.VISION_ENCODER: vision,
        Role.PROJECTOR: projector,
        Role.EMBEDDING: embedding_part(vlm, text_decoder(vlm.model), examples, calls),
        **language.parts,
    }
    return Split(parts, merge, difference, language.kv, notes)


def _in_own_type(vlm: VLM, examples: tuple[dict[str, torch.Tensor], ...]) -> tuple[dict[str, torch.Tensor], ...]:
    """`examples` with floats of the model's own type."""
    kind = vlm.model.dtype
    return tuple({n: t.to(kind) if t.is_floating_point() else t for n, t in e.items()} for e in examples)


def _language(vlm: VLM, examples: tuple[dict[str, torch.Tensor], ...]) -> LanguageParts:
    """The language side: the decoder alone, or with what it attends to beside its tokens."""
    if is_encoder_decoder(vlm.model):
        return split_encoder_decoder(vlm, examples)
    calls = [capture_decoder_call(vlm.model, example) for example in examples]
    _refuse_nan(vlm, calls)
    if crosses(calls):
        return split_cross_attention(vlm, examples, calls)
    calls = with_embeddings(vlm, examples, calls)
    kv = find_cache(vlm)
    decoder, merge, difference = split_decoder(vlm, examples, calls, kv)
    return LanguageParts({Role.DECODER: decoder}, merge, kv, calls, difference)


def split_decoder(
    vlm: VLM, examples: tuple[dict[str, torch.Tensor], ...], calls: list[DecoderCall], kv: KVGeometry | None = None
) -> tuple[Part, MergeSpec, float]:
    """The decoder part, how inputs are merged for it, and by how much it differs from the whole model's `calls`.

    `kv` is what `find_cache` found (None: the cache is as the config says).

    Raises `UnsupportedModelError` as `split_model` does.
    """
    decoder = decoder_of(vlm)
    decoder.kv = kv
    merge = with_deepstack(vlm, with_positions(vlm, _merge_spec(vlm, calls), examples, calls), calls)
    merge = with_per_layer(merge, calls)
    configure(decoder, merge)
    masks = find_masks(vlm, decoder, examples, calls)
    decoder.hidden_tokens = find_hidden_tokens(calls)
    decoder.chunks = masks.chunks
    decoder.counted = find_counted(vlm.facts.model_type, decoder.decoder, merge.position_start, decoder.position_axes)
    decoder.blocks, decoder.logit_cap = masks.blocks, find_logit_cap(decoder, calls[-1])
    if masks.blocks is not None:
        extras = (*merge.extras, "block_ids")
        merge = dataclasses.replace(merge, mask=masks.kind, block_tokens=masks.tokens, extras=extras)
    # The merge is proven on every example; the decoder gets nothing else, so the richest prompt does for it.
    replayed = replay(decoder, calls[-1])
    if (scale := find_logit_scale(decoder.decoder.config, replayed, calls[-1].logits)) is not None:
        decoder.logit_scale = scale
        replayed = replay(decoder, calls[-1])
    elif not torch.equal(replayed, calls[-1].logits) and (capped := find_capped_scale(decoder, calls[-1])):
        decoder.logit_scale, decoder.logit_cap = capped
        replayed = replay(decoder, calls[-1])
    difference = _refuse_difference(vlm, "decoder and LM head", replayed, calls[-1].logits)
    part = _decoder_part(vlm, decoder, calls, masks, merge)
    if merge.extras:
        with torch.no_grad():
            logits = decoder(**part.examples[-1])
        what = f"decoder with {', '.join(merge.extras)}"
        difference = max(difference, _refuse_difference(vlm, what, logits, calls[-1].logits))
    return part, merge, difference


def _refuse_nan(vlm: VLM, calls: list[DecoderCall]) -> None:
    """Name the weight that is to blame for NaN logits: nothing could be compared with them."""
    if not any(bool(call.logits.isnan().any()) for call in calls):
        return
    for name, parameter in vlm.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise BadInputError(f"{name}: the weight holds NaN or infinity; the checkpoint is damaged, get it again")


def _merge_spec(vlm: VLM, calls: list[DecoderCall]) -> MergeSpec:
    family = vlm.facts.model_type
    start = _first_position(calls[0])
    for call in calls:
        if unknown := sorted(call.extras.keys() - deepstack_arguments(call) - {PER_LAYER}):
            raise UnsupportedModelError(
                f"{family}: the decoder also takes {', '.join(unknown)}; only families whose image features replace "
                "token embeddings, or are added to those of early layers, are supported yet"
            )
        positions = call.kwargs.get("position_ids")
        if has_axes(call):
            continue
        if positions is not None and not bool((positions == start + torch.arange(positions.shape[-1])).all()):
            raise UnsupportedModelError(
                f"{family}: positions do not count up from {start}: {positions.flatten()[:4].tolist()}…"
            )
    return MergeSpec(image_token_id=vlm.facts.image_token_id, position_start=start)


def _first_position(call: DecoderCall) -> int:
    positions = call.kwargs.get("position_ids")
    return 0 if positions is None else int(positions.flatten()[0])


def _merge_difference(
    vlm: VLM,
    merge: MergeSpec,
    example: dict[str, torch.Tensor],
    call: DecoderCall,
    features: torch.Tensor,
    fixed: torch.Tensor | None,
) -> float:
    if merge.place == "cross_attention":
        return check_states(vlm, features, call)
    embeds = merged_embeddings(vlm, merge, example, features, fixed)
    difference = _refuse_difference(vlm, "merged embeddings", embeds, call.kwargs["inputs_embeds"])
    if not merge.deepstack_layers:
        return difference
    hidden, places = embeds.shape[-1], example["input_ids"] == merge.image_token_id
    added = features[:, hidden:].reshape(len(features), merge.deepstack_layers, hidden).transpose(0, 1)
    wanted = dense_deepstack(call)[:, places]
    return max(difference, _refuse_difference(vlm, "features of early layers", added, wanted))


def _decoder_part(vlm: VLM, decoder: DecoderPart, calls: list[DecoderCall], masks: SeenMasks, merge: MergeSpec) -> Part:
    hidden, vocab = vlm.facts.hidden_size, vlm.facts.vocab_size
    tokens = ("batch_size", "sequence_length")
    further = {
        "position_ids": TensorSpec("position_ids", "int64", (AXES, *tokens)),
        "deepstack_embeds": TensorSpec("deepstack_embeds", "float32", (merge.deepstack_layers, *tokens, hidden)),
        "block_ids": TensorSpec("block_ids", "int64", tokens),
        **per_layer_spec(decoder.decoder),
    }
    signature = Signature(
        (
            TensorSpec("inputs_embeds", "float32", ("batch_size", "sequence_length", hidden)),
            TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
            *(further[name] for name in merge.extras),
        ),
        (TensorSpec(vlm.facts.output, "float32", ("batch_size", "sequence_length", vocab)),),
    )
    examples = tuple(
        {
            "inputs_embeds": c.kwargs["inputs_embeds"],
            "attention_mask": torch.ones(c.logits.shape[:2], dtype=torch.int64),
            **further_inputs(merge, c),
            **({} if masks.blocks is None else {"block_ids": masks.ids[index]}),
        }
        for index, c in enumerate(calls)
    )
    return Part(Role.DECODER, decoder, "", signature, examples)
