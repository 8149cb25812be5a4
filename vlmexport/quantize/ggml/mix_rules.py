"""Which type llama-quantize wants for a tensor that it quantizes (llama.cpp b11549, ``src/llama-quant.cpp``).

Only what the architectures that vlmexport writes can meet is here: nothing of Falcon, of GLM5-next or of MXFP4.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.file_types import FileType
from vlmexport.quantize.ggml.types import NEEDS_IMPORTANCE, ggml_type

# The first part of a name that is found decides; llama-quantize looks anywhere in the name.
_ROLE_OF_PART = (
    ("attn_qkv.weight", "attn_v"),
    ("attn_kv_b.weight", "attn_v"),
    ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"),
    ("attn_q.weight", "attn_q"),
    ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"),
    ("ffn_gate", "ffn_gate"),
    ("ffn_down", "ffn_down"),
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

_ONE_BIT = ("IQ1_S", "IQ1_M")
_TWO_BITS_MORE = ("IQ2_S", "IQ2_M")
_LOW = (*_ONE_BIT, "IQ2_XXS", "IQ2_XS", *_TWO_BITS_MORE)

_EMBEDDING_TYPE = {
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", *_ONE_BIT), "Q2_K"),
    **dict.fromkeys((*_TWO_BITS_MORE, "IQ3_XXS"), "IQ3_S"),
}
_VALUE_TYPE = {"IQ3_M": "Q4_K", "Q3_K_L": "Q5_K", "Q2_K": "Q3_K"}
_VALUE_TYPE_OF_FOUR_HEADS = {  # four or more query heads share one value head, so its bits cost little
    **dict.fromkeys(("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"), "Q4_K"),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), "Q5_K"),
}
_QUERY_KEY_TYPE = {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}
_ATTENTION_OUTPUT_TYPE = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
_ATTENTION_OUTPUT_Q5_OF_EIGHT_EXPERTS = (
    *("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"),
)
_FIRST_DOWN_TYPE = {"Q2_K_S": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_S": "Q5_K"}
_FIRST_DOWN_TYPE_WITH_IMATRIX = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
_FIRST_DOWN_TYPE_WITHOUT_IMATRIX = {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K", "IQ3_XXS": "Q4_K"}
_DOWN_TYPE = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}


@dataclass(frozen=True)
class MixTensor:
    """A tensor as the rules see it; `shape` in numpy order, so ``shape[-1]`` is a row."""

    name: str
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Values of a row; 1 of a scalar."""
        return self.shape[-1] if self.shape else 1


@dataclass(frozen=True)
class MixFacts:
    """What the rules ask of a text model.

    `kv_heads` are the first block's (0 where it has no attention, as LFM2's convolutions): llama-quantize looks there.
    """

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @classmethod
    def of_metadata(cls, arch: str, metadata: Mapping[str, Any]) -> MixFacts:
        """The facts in a text file's complete keys (``llama.block_count``), where llama-quantize reads them.

        Raises KeyError when a key is missing that every file has.
        """
        layers, heads = metadata[f"{arch}.block_count"], metadata[f"{arch}.attention.head_count"]
        kv_heads = metadata.get(f"{arch}.attention.head_count_kv", heads)
        experts = metadata.get(f"{arch}.expert_count", 0)
        return cls(arch, int(layers), _first(heads), _first(kv_heads), int(experts))

    @property
    def shared_heads(self) -> int:
        """Query heads of one key-value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """The shapes that llama.cpp calls 70B, for which it has a rule of its own."""
        return self.layers == 80 and (self.arch == "qwen2" or (self.arch == "llama" and self.heads != self.kv_heads))


def _first(value: int | Sequence[int]) -> int:
    return int(value[0]) if isinstance(value, Sequence) else int(value)


def role(name: str) -> str:
    """What a tensor does, by its name: ``output``, ``embedding``, ``attn_v`` ..., or ``other``."""
    if name == "output.weight":
        return "output"
    if name in _EMBEDDINGS:
        return "embedding"
    return next((role for part, role in _ROLE_OF_PART if part in name), "other")


def needs_imatrix(name: str, type_name: str, kind: FileType) -> bool:
    """True where llama-quantize refuses `type_name` for the tensor `name` without an importance matrix."""
    if role(name) in ("output", "embedding"):
        return False
    if type_name == "Q2_K":
        return kind.name == "Q2_K_S"
    return type_name in NEEDS_IMPORTANCE


@dataclass
class Mix:
    """The rules of one file; ask for its tensors once each, in order, since blocks are counted as they pass.

    `values` is the number of attention values (``attn_v`` and fused ones) in the file; `tied`: it has no output tensor.
    """

    kind: FileType
    facts: MixFacts
    with_imatrix: bool
    tied: bool
    values: int
    _seen: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, kind: FileType, facts: MixFacts, names: Iterable[str], *, with_imatrix: bool) -> Mix:
        """The rules for a file with the tensors `names`."""
        roles = Counter(role(name) for name in names)
        return cls(kind, facts, with_imatrix, tied=not roles["output"], values=roles["attn_v"])

    def wanted(self, tensor: MixTensor) -> str:
        """The type that the rules ask for, whatever the length of its rows."""
        part = role(tensor.name)
        if part == "output" or (part == "embedding" and self.tied):
            return self._head()
        if part == "embedding":
            return _EMBEDDING_TYPE.get(self.kind.name, self.kind.default)
        if self.kind.name in _LOW:
            return self._low(part) or self.kind.default
        rule = {
            "attn_v": self._value,
            "attn_k": self._key,
            "attn_q": lambda _: _QUERY_KEY_TYPE.get(self.kind.name),
            "attn_output": lambda _: self._attention_output(),
            "ffn_down": self._down,
            "ffn_gate": self._up,
            "ffn_up": self._up,
        }.get(part)
        return (rule(tensor) if rule else None) or self.kind.default

    def _head(self) -> str:
        if self.kind.name in (*_LOW, "IQ3_XXS"):
            return "Q5_K"
        return "Q8_0" if self.kind.default == "Q8_0" else "Q6_K"

    def _low(self, part: str) -> str | None:
        """The file types below 3 bits have rules of their own."""
        better = "IQ3_S" if self.kind.name in _TWO_BITS_MORE else "Q2_K"
        if part == "attn_v":
            return "Q4_K" if self.facts.shared_heads >= 4 or self.facts.experts >= 4 else better
        if part == "attn_k" and self.facts.experts == 8:
            return "Q4_K"
        if part == "ffn_down":
            return better if self._count(part) < self.facts.layers // 8 else None
        if part != "attn_output":
            return None
        if self.facts.experts == 8:
            return "Q5_K"
        return "IQ2_XXS" if self.kind.name in _ONE_BIT else "IQ3_S" if self.kind.name in _TWO_BITS_MORE else None

    def _value(self, tensor: MixTensor) -> str | None:
        found = self._dense_value(self._count("attn_v"))
        if self.facts.is_70b and (found or self.kind.default) in ("Q3_K", "Q4_K"):
            found = "Q5_K"
        return "Q8_0" if self.facts.experts == 8 else found

    def _dense_value(self, index: int) -> str | None:
        name = self.kind.name
        if self.facts.shared_heads >= 4 and name in _VALUE_TYPE_OF_FOUR_HEADS:
            return _VALUE_TYPE_OF_FOUR_HEADS[name]
        if name == "IQ3_XXS" and not self.with_imatrix:
            return "IQ3_S"
        if name == "Q3_K_M":
            return "Q5_K" if index < 2 else "Q4_K"
        if name in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if _gets_more(index, self.values) else None
        if name == "Q4_K_S":
            return "Q5_K" if index < 4 else None
        return _VALUE_TYPE.get(name)

    def _key(self, tensor: MixTensor) -> str | None:
        return "Q8_0" if self.facts.experts == 8 else _QUERY_KEY_TYPE.get(self.kind.name)

    def _attention_output(self) -> str | None:
        if self.facts.experts == 8:
            return "Q5_K" if self.kind.name in _ATTENTION_OUTPUT_Q5_OF_EIGHT_EXPERTS else None
        return _ATTENTION_OUTPUT_TYPE.get(self.kind.name)

    def _down(self, tensor: MixTensor) -> str | None:
        layer, layers, name = self._layer("ffn_down", tensor), self.facts.layers, self.kind.name
        if name in ("Q4_K_M", "Q5_K_M"):
            return "Q6_K" if _gets_more(layer, layers) else None
        if name == "Q3_K_M" and layer < layers // 16:
            return "Q5_K"
        if name == "IQ3_M" and self.facts.experts == 8 and _gets_more(layer, layers):
            return "Q4_K"
        if layer < layers // 8:
            special = _FIRST_DOWN_TYPE_WITH_IMATRIX if self.with_imatrix else _FIRST_DOWN_TYPE_WITHOUT_IMATRIX
            first = {**_FIRST_DOWN_TYPE, **special}.get(name)
            if first:
                return first
        if name == "IQ3_XXS" and not self.with_imatrix:
            return "Q3_K"
        return _DOWN_TYPE.get(name)

    def _up(self, tensor: MixTensor) -> str | None:
        layer, layers = self._layer(role(tensor.name), tensor), self.facts.layers
        return "IQ3_XXS" if self.kind.name == "IQ3_XS" and layers // 8 <= layer < 7 * layers // 8 else None

    def _layer(self, part: str, tensor: MixTensor) -> int:
        """The block of a feed-forward tensor: counted in a dense model, read from the name where there are experts."""
        index = self._count(part)
        if self.facts.experts <= 1:
            return index
        match = re.match(r"blk\.(\d+)", tensor.name)
        if match is None or int(match.group(1)) >= self.facts.layers:
            raise BadInputError(f"{tensor.name} is in none of the {self.facts.layers} blocks (blk.N.) of the model")
        return int(match.group(1))

    def _count(self, part: str) -> int:
        self._seen[part] += 1
        return self._seen[part] - 1


def _gets_more(index: int, count: int) -> bool:
    """The first and last eighths, and every third between them."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def fallback(type_name: str, columns: int) -> str:
    """The type that llama-quantize takes where rows of `columns` values hold no whole blocks of `type_name`."""
    smaller = _FALLBACK.get(type_name, type_name)
    return smaller if columns % ggml_type(smaller).block == 0 else "F16"
