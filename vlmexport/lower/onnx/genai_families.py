"""Can onnxruntime-genai run a model? Judged by what the model does, and then by the model types that it knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.genai import GENAI_FAMILIES, UNWRITTEN, GenaiFamily

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.model.merge import MergeSpec
    from vlmexport.split.parts import Split


def genai_family(vlm: VLM, split: Split) -> GenaiFamily:
    """How onnxruntime-genai calls the model; raises `UnsupportedModelError` with the reason when it cannot run it."""
    name = vlm.facts.model_type
    reason = UNWRITTEN.get(name, "")
    if not reason and name not in GENAI_FAMILIES:
        reason = "onnxruntime-genai runs no such model"
    if not reason:
        reason = _unfit(split.merge)
    if not reason and not split.kv.uniform:
        reason = "its layers keep different things from token to token"
    if reason:
        raise UnsupportedModelError(
            f"{name}: no genai layout: {reason}; this layout is for {', '.join(GENAI_FAMILIES)}"
        )
    return GENAI_FAMILIES[name]


def _unfit(merge: MergeSpec) -> str:
    """What of a merge the runtime has no words for; "" when nothing."""
    if merge.place != "scatter" or merge.fixed_tokens or merge.decoder_start_token_id is not None or merge.crosses:
        return "its image features enter the decoder in a way that onnxruntime-genai does not know"
    if merge.packing is not None or merge.pictures is not None:
        return "onnxruntime-genai gives the pixels to the vision encoder as they are, and lays out no tiles"
    if merge.deepstack_layers:
        return UNWRITTEN["qwen3_vl"]
    if merge.mask != "causal":
        return UNWRITTEN["gemma3"]
    if unknown := sorted(set(merge.extras) - {"position_ids"}):
        return f"onnxruntime-genai gives the decoder no {unknown[0]}"
    return ""
