"""What a family module says of its models: data, found by the model type and read by whoever needs it.

A family knows no target; `GgufHalf` describes how its weights are named and laid out in the GGUF container, which is a
format of the field (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), not a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

MetaValue: TypeAlias = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]


@dataclass(frozen=True)
class Transform:
    """How a weight becomes one tensor or several; `kind` names a function of `vlmexport.quantize.ggml.values`.

    `arguments` are what that function takes besides the weight (numbers of heads, say).
    """

    kind: str
    arguments: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorRule:
    """Where the tensors of a module go: `source` is a module's name in the PyTorch model, `targets` GGUF stems.

    ``{i}`` in both stands for the number of a block. The rule holds for ``<source>.weight`` and ``<source>.bias``
    (``<target>.weight``, ``<target>.bias``); a `source` that is a parameter itself (``...class_embedding``) names it
    whole (`whole`), and so do `targets` then. A target may carry an end of its own after a bar, not ``.weight``:
    ``v.patch_embd|.weight.1``. Of a text half, names are those below the text model (``get_decoder()``), and
    ``lm_head``; of a vision half, names in the whole model. `transform` (of the weight; `bias_transform` of the bias)
    gives as many tensors as there are `targets`.
    """

    source: str
    targets: tuple[str, ...]
    transform: Transform | None = None
    bias_transform: Transform | None = None
    whole: bool = False


@dataclass(frozen=True)
class GgufHalf:
    """One of the two files of a GGUF export.

    `arch` is ``general.architecture`` of a text half and the ``clip.projector_type`` of a vision half. `metadata` are
    complete keys (``llama.block_count``) with their values: an int is written as uint32, a float as float32, lists as
    arrays of int32, float32, bool or string. `computed` are tensors that no weight holds (``rope_freqs.weight``), as
    nested lists of numbers, in F32. `unused` are `fnmatch` patterns of weights that llama.cpp has no place for, each
    with the reason. `always_f32` are GGUF names (patterns) that keep F32 whatever was asked, beyond llama.cpp's
    general rules. `text_metadata` are keys that a vision half adds to the text file: what a decoder must know of the
    images' features (``qwen3vl.n_deepstack_layers``). `borrowed` are rules by which a vision half makes tensors of its
    own from the text model's weights (`whole`, by their names below the text model). `notes` say where llama.cpp treats
    pictures otherwise than the model's own processor, and what helps.
    """

    arch: str
    rules: tuple[TensorRule, ...]
    metadata: Mapping[str, MetaValue]
    computed: Mapping[str, Any] = field(default_factory=dict)
    unused: Mapping[str, str] = field(default_factory=dict)
    always_f32: tuple[str, ...] = ()
    text_metadata: Mapping[str, MetaValue] = field(default_factory=dict)
    borrowed: tuple[TensorRule, ...] = ()
    notes: tuple[str, ...] = ()


def linear(source: str, target: str, transform: Transform | None = None, bias: Transform | None = None) -> TensorRule:
    """The common rule: one module, one stem."""
    return TensorRule(source, (target,), transform, bias)
