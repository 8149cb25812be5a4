"""The type of every tensor of a GGUF file: llama-quantize's mix, or the converter's ``--outtype``.

Follows llama.cpp b11549: ``src/llama-quant.cpp`` for quantized file types, ``conversion/base.py`` for F32, F16, BF16
and for Q8_0 vision files. tests/quantize/ggml compares it with files that the real tools wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from vlmexport.errors import BadInputError
from vlmexport.quantize.ggml.file_types import FILE_TYPES, FileType, file_type
from vlmexport.quantize.ggml.mix_rules import Mix, MixFacts, MixTensor, fallback, needs_imatrix, role
from vlmexport.quantize.ggml.types import ggml_type

__all__ = [
    "FILE_TYPES",
    "FileType",
    "MixFacts",
    "MixTensor",
    "TypeChoice",
    "choose_types",
    "file_type",
    "needs_imatrix",
    "tensor_order",
]

Half: TypeAlias = Literal["text", "mmproj"]

# llama-quantize leaves these alone, wherever in the name they are (those that our architectures have).
_KEPT_PARTS = (
    *("_norm.weight", "ffn_gate_inp.weight", "shortconv.conv.weight", "ssm_conv1d", "per_layer_model_proj"),
    *("altup", "laurel", ".position_embd", ".patch_embd", ".patch_merger", ".rel_pos"),
)
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")

# The converter writes these in F32 (as it does biases, norms and all that has one dimension).
_F32_NAMES = re.compile(
    r"blk\.\d+\.(ffn_gate_inp|ffn_gate_inp_shexp|shortconv\.conv|ssm_conv1d)\.weight"
    r"|(v\.)?position_embd\.weight|token_types\.weight"
)
# llama.cpp transposes this one as it is (its issue 13025), which no quantized type allows.
_TRANSPOSED = "mm.input_projection.weight"
# With these file types llama-quantize asks a vision file for its attention heads, and stops since there are none.
_STOPS_ON_VISION = (
    *("Q2_K", "Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"),
    *("IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
)


@dataclass(frozen=True)
class TypeChoice:
    """A tensor's type and why; `wanted` is the type before the fall-back, empty without one."""

    type: str
    reason: str
    wanted: str = ""


def tensor_order(names: Iterable[str]) -> list[str]:
    """The order of tensors in llama-quantize's files: by block (``blk.N.``, those without one first), then by name."""
    return sorted(names, key=lambda name: (_text_block(name), name))


def choose_types(
    tensors: Sequence[MixTensor],
    name: str,
    facts: MixFacts,
    *,
    half: Half = "text",
    overrides: Sequence[tuple[str, str]] = (),
    with_imatrix: bool = False,
    compatible: bool = False,
) -> dict[str, TypeChoice]:
    """The type of each of `tensors` (all of one file) for the file type `name`.

    F32, F16 and BF16 follow the converter's ``--outtype``, and so does Q8_0 of a vision file; the rest llama-quantize
    from an F16 file. `facts` are the text model's. An override is a (regular expression, type) pair, the first that
    is found in a name wins; rows that it does not fit fall back as all others.

    In a vision file, `facts` and `with_imatrix` are not looked at: its blocks are counted from the names, in numeric
    order, unless `compatible`; then they are taken in llama-quantize's order, which also sees 0 of them and so gives
    every ``ffn_down`` the better type.

    Raises `BadInputError` for an unknown type, an override that is no regular expression or matches nothing, and a
    file type that needs an importance matrix when there is none.
    """
    kind = file_type(name)
    checked = _Overrides(overrides, tensors, compatible)
    if kind.is_float or (half == "mmproj" and kind.name == "Q8_0"):
        return {t.name: _converted(t, kind, half, checked, compatible) for t in tensors}
    if half == "mmproj":
        facts, with_imatrix = _vision_facts(tensors, kind, compatible), False
    mix = Mix.of(kind, facts, (t.name for t in tensors), with_imatrix=with_imatrix)
    order = tensor_order if half == "text" or compatible else _numeric_order
    by_name = {t.name: t for t in tensors}
    chosen = {n: _quantized(by_name[n], mix, half, checked, compatible) for n in order(by_name)}
    if not with_imatrix:
        _check_possible_without_imatrix(chosen, kind, half)
    return {t.name: chosen[t.name] for t in tensors}


def _converted(tensor: MixTensor, kind: FileType, half: Half, overrides: _Overrides, compatible: bool) -> TypeChoice:
    """As convert_hf_to_gguf.py writes it with ``--outtype`` of that name."""
    override = overrides.find(tensor) if _allows_quantization(tensor, compatible) else None
    if override:
        return override
    if len(tensor.shape) <= 1 or tensor.name.endswith("_norm.weight"):
        return TypeChoice("F32", "norms, biases and vectors stay F32")
    if half == "mmproj" and any(part in tensor.name for part in (".patch_embd.weight", ".patch_merger.weight")):
        return TypeChoice("F16" if kind.name == "F16" else "F32", "llama.cpp reads patch weights as F32 or F16")
    if half == "mmproj" and tensor.name == _TRANSPOSED and (compatible or kind.name != "F32"):
        return TypeChoice("F16", "llama.cpp transposes it, so it stays F16")
    if not tensor.name.endswith(".weight") or _F32_NAMES.fullmatch(tensor.name):
        return TypeChoice("F32", "llama.cpp reads it as F32")
    return _fitting(tensor, kind.default, f"{kind.name} throughout")


def _quantized(tensor: MixTensor, mix: Mix, half: Half, overrides: _Overrides, compatible: bool) -> TypeChoice:
    """As llama-quantize makes it from an F16 file."""
    if not _allows_quantization(tensor, compatible):
        kept = _converted(tensor, FILE_TYPES["F16"], half, _NO_OVERRIDES, compatible)
        return TypeChoice(kept.type, f"llama-quantize leaves it alone: {kept.reason}")
    override = overrides.find(tensor)
    if override:
        return override
    wanted, part = mix.wanted(tensor), role(tensor.name)
    reason = (
        f"the default of {mix.kind.name}" if wanted == mix.kind.default else f"{mix.kind.name} gives {part} {wanted}"
    )
    if part == "output" or (part == "embedding" and mix.tied):
        return _fitting(tensor, wanted, reason if part == "output" else f"{reason}, being the output too", "Q8_0")
    return _fitting(tensor, wanted, reason)


def _fitting(tensor: MixTensor, wanted: str, reason: str, instead: str = "") -> TypeChoice:
    """`wanted` where the tensor's rows hold whole blocks of it, else the fall-back of `instead` (default: of it)."""
    if tensor.columns % ggml_type(wanted).block == 0:
        return TypeChoice(wanted, reason)
    found = fallback(instead or wanted, tensor.columns)
    block = ggml_type(wanted).block
    return TypeChoice(found, f"{reason}; rows of {tensor.columns} are no multiple of {block}", wanted)


def _allows_quantization(tensor: MixTensor, compatible: bool) -> bool:
    """False for what llama-quantize copies; and, unless `compatible`, for what llama.cpp then could not run."""
    dims = max((i + 1 for i, size in enumerate(reversed(tensor.shape)) if size > 1), default=1)
    if dims < 2 or not tensor.name.endswith("weight") or tensor.name in _KEPT_NAMES:
        return False
    if tensor.name == _TRANSPOSED and not compatible:
        return False
    return not any(part in tensor.name for part in _KEPT_PARTS)


def _vision_facts(tensors: Sequence[MixTensor], kind: FileType, compatible: bool) -> MixFacts:
    if compatible and kind.name in _STOPS_ON_VISION and any(role(t.name) == "attn_v" for t in tensors):
        raise BadInputError(
            f"llama-quantize itself stops on a vision file with {kind.name}: use Q4_K_M, Q5_K_M or Q6_K"
        )
    blocks = {match.group(1) for t in tensors if (match := re.match(r"v\.blk\.(\d+)\.", t.name))}
    return MixFacts("clip", 0 if compatible else len(blocks), heads=1, kv_heads=1)


def _check_possible_without_imatrix(chosen: dict[str, TypeChoice], kind: FileType, half: Half) -> None:
    for name, choice in chosen.items():
        if needs_imatrix(name, choice.type, kind):
            remedy = (
                "calibrate one (--imatrix auto) or give one (--imatrix FILE)"
                if half == "text"
                else "which vision files do not have"
            )
            raise BadInputError(
                f"{kind.name} makes {name} {choice.type}, which without an importance matrix is garbage: {remedy}, "
                "or choose Q3_K_M, IQ4_XS or larger"
            )


class _Overrides:
    """Compiled overrides, all of which are found in some tensor that may be quantized."""

    def __init__(self, overrides: Sequence[tuple[str, str]], tensors: Sequence[MixTensor], compatible: bool) -> None:
        self._pairs = [(_pattern(text), ggml_type(kind).name) for text, kind in overrides]
        for pattern, _ in self._pairs:
            found = [t for t in tensors if pattern.search(t.name)]
            if not any(_allows_quantization(t, compatible) for t in found):
                why = f"only {found[0].name} and the like, which stay as they are" if found else "no tensor"
                raise BadInputError(
                    f"--tensor-type {pattern.pattern!r} matches {why}; names are such as {_examples(tensors)}"
                )

    def find(self, tensor: MixTensor) -> TypeChoice | None:
        for pattern, kind in self._pairs:
            if pattern.search(tensor.name):
                return _fitting(tensor, kind, f"--tensor-type {pattern.pattern}")
        return None


_NO_OVERRIDES = _Overrides((), (), compatible=False)


def _examples(tensors: Sequence[MixTensor]) -> str:
    names = [t.name for t in tensors if _allows_quantization(t, compatible=True)]
    return ", ".join(names[:: max(1, len(names) // 3)][:3]) or "none here"


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise BadInputError(f"--tensor-type {text!r} is no regular expression: {error}") from error


def _text_block(name: str) -> int:
    match = re.match(r"blk\.(\d+)", name)
    return int(match.group(1)) if match else -1


def _numeric_order(names: Iterable[str]) -> list[str]:
    """By name, but numbers in it by their value: block 2 before block 10."""
    return sorted(names, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)])
