"""The language side of a split: its parts, and the calls that they were compared on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmexport.model.kv import KVGeometry
from vlmexport.model.merge import MergeSpec
from vlmexport.split.decoder import DecoderCall
from vlmexport.split.parts import Part, Role


@dataclass(frozen=True)
class LanguageParts:
    """The decoder, and what a family has beside it, with how inputs are merged for them.

    `calls` has one entry for each example: its ``inputs_embeds`` are the merged ones. `difference` is the largest of
    the replays.
    """

    parts: dict[Role, Part]
    merge: MergeSpec
    kv: KVGeometry
    calls: Sequence[DecoderCall]
    difference: float
