"""The generic split: capture what reaches the decoder, replay it, and refuse unless the parts reproduce the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.manifest import TensorSpec
from vlmexport.model.merge import MergeSpec
from vlmexport.split.decoder import DecoderCall, DecoderPart, capture_decoder_call, check_masks_are_causal, replay
from vlmexport.split.examples import processor_examples
from vlmexport.split.names import module_path
from vlmexport.split.parts import Part, Role, Signature, Split
from vlmexport.split.vision import split_vision

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

# Replayed logits may differ from the full model's by rounding only.
REPLAY_LIMIT = 1e-5


def split_model(vlm: VLM, examples: tuple[dict[str, torch.Tensor], ...] | None = None) -> Split:
    """Take `vlm` apart and prove that the parts reproduce it.

    `examples` are keyword inputs of the whole model (one image, another aspect ratio, two images); by default the
    model's own processor makes them. Raises `UnsupportedModelError` naming the family and what differs,
    `BadInputError` naming a weight that makes the logits NaN.
    """
    examples = processor_examples(vlm) if examples is None else examples
    calls = [capture_decoder_call(vlm.model, example) for example in examples]
    _refuse_nan(vlm, calls)
    vision, projector = split_vision(vlm, examples)
    decoder = DecoderPart(vlm.model.get_decoder(), vlm.model.get_output_embeddings())
    merge = _merge_spec(vlm, calls)
    # The merge below is proven on every example; the decoder gets nothing else, so the richest prompt does for it.
    difference = _replay_difference(vlm, decoder, calls[-1])
    features = [projector.module(**example) for example in projector.examples]
    for example, call, rows in zip(examples, calls, features, strict=True):
        difference = max(difference, _merge_difference(vlm, merge, example, call, rows))
    check_masks_are_causal(decoder, calls[0], vlm.facts.model_type)
    parts = {
        Role.VISION_ENCODER: vision,
        Role.PROJECTOR: projector,
        Role.EMBEDDING: _embedding_part(vlm, examples),
        Role.DECODER: _decoder_part(vlm, decoder, calls),
    }
    return Split(parts, merge, difference)


def _refuse_nan(vlm: VLM, calls: list[DecoderCall]) -> None:
    """Name the weight that is to blame for NaN logits: nothing could be compared with them."""
    if not any(bool(call.logits.isnan().any()) for call in calls):
        return
    for name, parameter in vlm.model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise BadInputError(f"{name}: the weight holds NaN or infinity; the checkpoint is damaged, get it again")


def _merge_spec(vlm: VLM, calls: list[DecoderCall]) -> MergeSpec:
    family = vlm.facts.model_type
    for call in calls:
        if call.extras:
            raise UnsupportedModelError(
                f"{family}: the decoder also takes {', '.join(sorted(call.extras))}; only families whose image "
                "features replace token embeddings are supported yet"
            )
        mask, positions = call.kwargs.get("attention_mask"), call.kwargs.get("position_ids")
        if isinstance(mask, dict) or (mask is not None and mask.ndim != 2):
            raise UnsupportedModelError(f"{family}: the decoder gets its own mask (image blocks); not supported yet")
        if positions is not None and positions.ndim == 3 and positions.shape[0] > 1:
            raise UnsupportedModelError(f"{family}: the decoder uses 3-D positions (M-RoPE); not supported yet")
        if positions is not None and not _counts_from_zero(positions):
            raise UnsupportedModelError(f"{family}: positions do not count from 0: {positions.flatten()[:4].tolist()}…")
    return MergeSpec(image_token_id=vlm.facts.image_token_id)


def _counts_from_zero(positions: torch.Tensor) -> bool:
    return bool((positions == torch.arange(positions.shape[-1])).all())


def _replay_difference(vlm: VLM, decoder: DecoderPart, call: DecoderCall) -> float:
    return _refuse_difference(vlm, "decoder and LM head", replay(decoder, call), call.logits)


def _merge_difference(
    vlm: VLM, merge: MergeSpec, example: dict[str, torch.Tensor], call: DecoderCall, features: torch.Tensor
) -> float:
    ids = example["input_ids"]
    with torch.no_grad():
        embeds = vlm.model.get_input_embeddings()(ids).clone()
    places = ids == merge.image_token_id
    tokens, rows = int(places.sum()), features.shape[0]
    if tokens != rows:
        raise UnsupportedModelError(f"{vlm.facts.model_type}: {tokens} image tokens in the prompt, {rows} feature rows")
    embeds[places] = features.to(embeds.dtype)
    return _refuse_difference(vlm, "merged embeddings", embeds, call.kwargs["inputs_embeds"])


def _refuse_difference(vlm: VLM, what: str, got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the replayed {what} have shape {tuple(got.shape)}, "
            f"the model's {tuple(expected.shape)}"
        )
    scale = expected.float().abs().max().clamp_min(1e-12)
    difference = float((got.float() - expected.float()).abs().max() / scale)
    if not difference <= REPLAY_LIMIT:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the replayed {what} differ from the full model by {difference:.2e} (limit "
            f"{REPLAY_LIMIT:.0e}); this family needs a family module, which this version does not have"
        )
    return difference


def _embedding_part(vlm: VLM, examples: tuple[dict[str, torch.Tensor], ...]) -> Part:
    table = vlm.model.get_input_embeddings()
    signature = Signature(
        (TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),),
        (TensorSpec("inputs_embeds", "float32", ("batch_size", "sequence_length", vlm.facts.hidden_size)),),
    )
    ids = tuple({"input_ids": e["input_ids"]} for e in examples)
    return Part(Role.EMBEDDING, table, module_path(vlm.model, table) + ".", signature, ids)


def _decoder_part(vlm: VLM, decoder: DecoderPart, calls: list[DecoderCall]) -> Part:
    hidden, vocab = vlm.facts.hidden_size, vlm.facts.vocab_size
    signature = Signature(
        (
            TensorSpec("inputs_embeds", "float32", ("batch_size", "sequence_length", hidden)),
            TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
        ),
        (TensorSpec("logits", "float32", ("batch_size", "sequence_length", vocab)),),
    )
    examples = tuple(
        {
            "inputs_embeds": c.kwargs["inputs_embeds"],
            "attention_mask": torch.ones(c.logits.shape[:2], dtype=torch.int64),
        }
        for c in calls
    )
    return Part(Role.DECODER, decoder, "", signature, examples)
