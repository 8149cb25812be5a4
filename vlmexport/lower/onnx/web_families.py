"""Can transformers.js run a model? Judged by what the model does, and then by the model types that the client knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.transformersjs import UNWRITTEN, WEB_FAMILIES, WebFamily

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.model.merge import MergeSpec
    from vlmexport.split.parts import Split


def web_family(vlm: VLM, split: Split) -> WebFamily:
    """How transformers.js calls the model; raises `UnsupportedModelError` with the reason when it cannot run it."""
    name = vlm.facts.model_type
    reason = UNWRITTEN.get(name) or _unfit(split.merge)
    if not reason and not split.kv.uniform:
        reason = "its layers keep different things from token to token, which this layout has no names for yet"
    if not reason and name not in WEB_FAMILIES:
        reason = f"transformers.js runs no such model; this layout is for {', '.join(WEB_FAMILIES)}"
    if reason:
        raise UnsupportedModelError(f"{name}: no transformersjs layout: {reason}")
    return WEB_FAMILIES[name]


def _unfit(merge: MergeSpec) -> str:
    """What of a merge the client has no words for; "" when nothing."""
    if merge.place != "scatter" or merge.fixed_tokens or merge.decoder_start_token_id is not None:
        return "its image features enter the decoder in a way that transformers.js does not know"
    if merge.packing is not None or merge.pictures is not None:
        return "transformers.js gives all pixels to the vision encoder at once, and lays out no tiles"
    if merge.deepstack_layers:
        return UNWRITTEN["qwen3_vl"]
    if merge.mask == "image_blocks":
        return UNWRITTEN["gemma3"]
    if unknown := sorted(set(merge.extras) - {"position_ids", "block_ids"}):
        return f"transformers.js gives the decoder no {unknown[0]}"
    return ""
