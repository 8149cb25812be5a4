"""Can transformers.js run a model? Judged by what the model does, and then by the model types that the client knows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmexport.errors import UnsupportedModelError
from vlmexport.families.transformersjs import UNWRITTEN, WEB_FAMILIES, WebFamily
from vlmexport.model.kv import KVGeometry, LayerKV

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.model.merge import MergeSpec
    from vlmexport.split.parts import Split


def web_family(vlm: VLM, split: Split) -> WebFamily:
    """How transformers.js calls the model; raises `UnsupportedModelError` with the reason when it cannot run it."""
    name = vlm.facts.model_type
    family = WEB_FAMILIES.get(name)
    reason = UNWRITTEN.get(name) or _unfit(split.merge, family)
    if not reason and not _is_kept(split.kv, family):
        reason = "its layers keep different things from token to token, which this layout has no names for yet"
    if not reason and family is None:
        reason = f"transformers.js runs no such model; this layout is for {', '.join(WEB_FAMILIES)}"
    if reason:
        raise UnsupportedModelError(f"{name}: no transformersjs layout: {reason}")
    return WEB_FAMILIES[name]


def _is_kept(kv: KVGeometry, family: WebFamily | None) -> bool:
    """Has the client names for what every layer keeps?"""
    if kv.uniform or family is None:
        return kv.uniform
    alike = all(kept == LayerKV(kv.heads, kv.head_dim) for kept in kv.keeping.values())
    return alike and all(state.kind in family.states for state in kv.states)


def _unfit(merge: MergeSpec, family: WebFamily | None) -> str:
    """What of a merge the client has no words for; "" when nothing."""
    if merge.place != "scatter" or merge.fixed_tokens or merge.decoder_start_token_id is not None:
        return "its image features enter the decoder in a way that transformers.js does not know"
    each = merge.pictures
    of_any_size = each is None or (family is not None and family.each_picture and not each.fixed)
    if merge.packing is not None or not of_any_size:
        return "transformers.js gives all pixels to the vision encoder at once, and lays out no tiles"
    if merge.deepstack_layers:
        return UNWRITTEN["qwen3_vl"]
    if merge.mask == "image_blocks":
        return UNWRITTEN["gemma3"]
    if unknown := sorted(set(merge.extras) - {"position_ids", "block_ids"}):
        return f"transformers.js gives the decoder no {unknown[0]}"
    return ""
