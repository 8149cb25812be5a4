"""The parts of a vision-language model and what each takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from vlmexport.manifest import TensorSpec
from vlmexport.model.kv import KVGeometry
from vlmexport.model.merge import MergeSpec

if TYPE_CHECKING:
    import torch
    from torch import nn


class Role(StrEnum):
    """The roles; the values are the file names of the ``split`` layout and the keys of the manifest.

    `ENCODER` is there where the decoder attends to states beside its tokens: it makes their keys and values.
    """

    VISION_ENCODER = "vision_encoder"
    PROJECTOR = "projector"
    EMBEDDING = "embed_tokens"
    ENCODER = "encoder"
    DECODER = "decoder"


@dataclass(frozen=True)
class Signature:
    """Names, dtypes and dims of a part's inputs and outputs, in graph order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Part:
    """One part: a module that can be called with each of `examples` (input name to tensor).

    `prefix` says where the module's parameters live in the whole model: whole-model name = ``prefix`` + module name.
    The first example is the one to trace; the others differ in every size that may vary, and define the dynamic axes.
    """

    role: Role
    module: nn.Module
    prefix: str
    signature: Signature
    examples: tuple[dict[str, torch.Tensor], ...]


@dataclass(frozen=True)
class Split:
    """A model taken apart: its parts by role, how they merge, and the largest replay difference that was measured.

    `kv` is what its decoder keeps from token to token, as a run of it showed. `notes` are sentences on what the model
    takes and the parts do not.
    """

    parts: dict[Role, Part]
    merge: MergeSpec
    replay_difference: float
    kv: KVGeometry
    notes: tuple[str, ...] = ()
