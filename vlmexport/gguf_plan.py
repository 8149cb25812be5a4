"""`plan_gguf`: every weight's place and type in the two GGUF files, decided before any work is done."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.families import gguf_text_module, gguf_vision_module
from vlmexport.gguf_options import File, GgufOptions, GgufPlan, GgufTensor
from vlmexport.model.family import GgufHalf, TensorRule, Transform
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.mix import MixFacts, MixTensor, choose_types, file_type, tensor_order
from vlmexport.quantize.ggml.types import ggml_type
from vlmexport.quantize.scheme import QuantScheme

if TYPE_CHECKING:
    import torch

    from vlmexport.model.load import VLM

HEAD = "lm_head.weight"
_TIED = "tied to the embedding: llama.cpp reads token_embd.weight for both"
_CODES = "codes handed over without loss"


def plan_gguf(vlm: VLM, options: GgufOptions) -> GgufPlan:
    """Decide for every parameter of `vlm` which tensors of which file it becomes, and of which type.

    Raises `BadInputError` for an unknown type or an override that matches nothing, and `UnsupportedModelError` when
    llama.cpp has no place for the architecture or for a weight.
    """
    _check_types(options)
    weights = dict(vlm.model.state_dict(keep_vars=True))
    text_names, unused = _text_names(vlm, weights)
    others = [name for name in weights if name not in text_names and name not in unused]
    text, vision = family_halves(vlm, text_names.values(), others)
    placed = [
        *_place("text", text, {own: weights[name] for name, own in text_names.items()}, unused, _back(text_names)),
        *_place("mmproj", vision, {name: weights[name] for name in others}, unused, {}),
        *_borrowed(vision, {own: (name, weights[name]) for name, own in text_names.items()}),
    ]
    facts = MixFacts.of_metadata(text.arch, text.metadata)
    tensors = [
        *_typed("text", text, placed, options, facts, _code_sources(vlm, options)),
        *_typed("mmproj", vision, placed, options, facts, frozenset()),
    ]
    return GgufPlan(
        architecture=vlm.facts.architecture,
        arch=text.arch,
        projector=vision.arch,
        options=options,
        tensors=tuple(tensors),
        unused=unused,
        metadata={"text": {**text.metadata, **vision.text_metadata}, "mmproj": dict(vision.metadata)},
        computed={**text.computed, **vision.computed},
        notes=(*text.notes, *vision.notes),
    )


def _check_types(options: GgufOptions) -> None:
    for name in (options.quant, options.mmproj_type):
        file_type(name)
    for _, name in options.tensor_types:
        ggml_type(name)


def family_halves(vlm: VLM, text_names: Iterable[str], vision_names: Iterable[str]) -> tuple[GgufHalf, GgufHalf]:
    """What the model's family says of its two files; raises `UnsupportedModelError` as the family does."""
    text_config = vlm.config.get_text_config()
    text = gguf_text_module(text_config.model_type).text(text_config, tuple(text_names))
    module = gguf_vision_module(vlm.facts.model_type)
    vision = module.vision(vlm.config, preprocessor_config(vlm), tuple(vision_names))
    return text, vision


def preprocessor_config(vlm: VLM) -> dict[str, Any]:
    """The image processor's parsed settings; raises `BadInputError` when the model's folder has none.

    ``added_tokens`` are the ids of the tokenizer's added tokens by their text, which some vision halves need.
    """
    import json

    for name in ("preprocessor_config.json", "processor_config.json"):
        file = vlm.path / name
        if file.is_file():
            data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return {**data.get("image_processor", data), "added_tokens": _added_tokens(vlm)}
    raise BadInputError(f"{vlm.path} has no preprocessor_config.json, so llama.cpp could not prepare images as it does")


def _added_tokens(vlm: VLM) -> dict[str, int]:
    import json

    file = vlm.path / "tokenizer.json"
    if not file.is_file():
        return {}
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    return {token["content"]: int(token["id"]) for token in tokenizer.get("added_tokens") or ()}


def _text_names(vlm: VLM, weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Whole-model names of the text model's weights with their names below it, and those that go nowhere."""
    decoder: Any = vlm.model.get_decoder()
    prefix = next((name for name, module in vlm.model.named_modules() if module is decoder), None)
    if prefix is None:
        raise UnsupportedModelError(f"{vlm.facts.model_type}: its text model is not one of its modules")
    prefix = f"{prefix}." if prefix else ""
    head_module: Any = vlm.model.get_output_embeddings()
    head = next(name for name, module in vlm.model.named_modules() if module is head_module)
    names = {name: name.removeprefix(prefix) for name in weights if name.startswith(prefix)}
    unused: dict[str, str] = {}
    for name in (n for n in weights if n.startswith(f"{head}.")):
        if name.endswith(".weight") and vlm.facts.tied_embeddings:
            unused[name] = _TIED
        else:
            names[name] = f"lm_head.{name.rpartition('.')[2]}"
    return names, unused


def _back(names: Mapping[str, str]) -> dict[str, str]:
    return {own: name for name, own in names.items()}


@dataclass(frozen=True)
class _Placed:
    """One tensor before its type is chosen."""

    name: str
    file: File
    shape: tuple[int, ...]
    source: str
    transform: Transform | None
    output: int


def _place(
    file: File,
    half: GgufHalf,
    weights: Mapping[str, torch.Tensor],
    unused: dict[str, str],
    whole_names: Mapping[str, str],
) -> list[_Placed]:
    """The tensors of every weight; adds to `unused` what the family says has no place."""
    rules = _Rules(half.rules)
    placed = []
    for name, weight in weights.items():
        whole = whole_names.get(name, name)
        found = rules.targets(name)
        reason = next((why for pattern, why in half.unused.items() if fnmatchcase(name, pattern)), None)
        if found is None and reason is None:
            raise UnsupportedModelError(f"{whole} has no place in a GGUF file of {half.arch}, so it would be lost")
        if found is None or reason is not None:
            unused[whole] = str(reason)
            continue
        targets, transform = found
        placed += [
            _Placed(target, file, shape, whole, transform, output)
            for output, (target, shape) in enumerate(zip(targets, _shapes(weight, transform), strict=True))
        ]
    placed += [_Placed(name, file, _shape(value), "", None, 0) for name, value in half.computed.items()]
    _check_unique(placed)
    return placed


def _borrowed(half: GgufHalf, text_weights: Mapping[str, tuple[str, torch.Tensor]]) -> list[_Placed]:
    """The tensors that the mmproj file makes from the text model's weights, which have their own place besides."""
    placed = []
    for rule in half.borrowed:
        name, weight = text_weights[rule.source]
        for output, (target, shape) in enumerate(zip(rule.targets, _shapes(weight, rule.transform), strict=True)):
            placed.append(_Placed(target, "mmproj", shape, name, rule.transform, output))
    return placed


class _Rules:
    """A half's rules, each name matched by exactly one."""

    def __init__(self, rules: Sequence[TensorRule]) -> None:
        self._rules = [(re.compile(re.escape(rule.source).replace(r"\{i\}", r"(\d+)")), rule) for rule in rules]

    def targets(self, name: str) -> tuple[tuple[str, ...], Transform | None] | None:
        """The GGUF names of the weight `name` and its transform; None when no rule knows it."""
        stem, _, leaf = name.rpartition(".")
        for pattern, rule in self._rules:
            match = pattern.fullmatch(name if rule.whole else stem)
            if match is None or not (rule.whole or leaf in ("weight", "bias")):
                continue
            number = match.group(1) if pattern.groups else ""
            ends = "" if rule.whole else f".{leaf}"
            transform = rule.bias_transform if leaf == "bias" and not rule.whole else rule.transform
            return tuple(_target(t.replace("{i}", number), ends) for t in rule.targets), transform
        return None


def _target(stem: str, ends: str) -> str:
    """``blk.0.attn_q`` + ``.weight``; a target may carry its own end after a bar: ``v.patch_embd|.weight.1``."""
    name, bar, own = stem.partition("|")
    return name + own if bar else name + ends


def _shapes(weight: torch.Tensor, transform: Transform | None) -> list[tuple[int, ...]]:
    import torch

    blank = torch.empty(weight.shape, device="meta", dtype=weight.dtype)
    kind, arguments = (transform.kind, transform.arguments) if transform else (None, ())
    return [tuple(made.shape) for made in values.apply(blank, kind, arguments)]


def _shape(value: Any) -> tuple[int, ...]:
    import numpy as np

    return np.asarray(value).shape


def _check_unique(placed: Sequence[_Placed]) -> None:
    seen: dict[str, str] = {}
    for tensor in placed:
        if tensor.name in seen:
            raise UnsupportedModelError(f"{tensor.source} and {seen[tensor.name]} would both become {tensor.name}")
        seen[tensor.name] = tensor.source


def _code_sources(vlm: VLM, options: GgufOptions) -> frozenset[str]:
    """The weights whose codes of ours are handed over: the decoder's linears, but not the LM head."""
    if options.scheme is None:
        return frozenset()
    from vlmexport.plan import head_weight_name, linear_weights

    if vlm.quantized is not None:
        return frozenset(vlm.quantized.formats)
    return linear_weights(vlm) - {head_weight_name(vlm)}


def _typed(
    file: File,
    half: GgufHalf,
    placed: Sequence[_Placed],
    options: GgufOptions,
    facts: MixFacts,
    coded: frozenset[str],
) -> list[GgufTensor]:
    """The tensors of one file in its order, each with its type."""
    own = {t.name: t for t in placed if t.file == file}
    choices = choose_types(
        [MixTensor(name, own[name].shape) for name in tensor_order(own)],
        options.quant if file == "text" else options.mmproj_type,
        facts,
        half=file,
        overrides=options.tensor_types if file == "text" else (),
        with_imatrix=options.imatrix != "none",
        compatible=options.compatible,
    )
    made = []
    for name in tensor_order(own):
        placed_tensor, choice = own[name], choices[name]
        kind, reason, wanted = choice.type, choice.reason, choice.wanted
        if any(fnmatchcase(name, pattern) for pattern in half.always_f32):
            kind, reason, wanted = "F32", "llama.cpp reads it as F32", ""
        scheme = None
        if placed_tensor.source in coded and options.scheme is not None:
            scheme = _scheme(placed_tensor, options.scheme)
            kind, reason, wanted = options.quant, _CODES, ""
        tensor = GgufTensor(
            name, file, placed_tensor.shape, kind, reason, placed_tensor.source, placed_tensor.transform,
            placed_tensor.output, scheme, wanted,
        )  # fmt: skip
        made.append(replace(tensor, bytes=ggml_type(kind).size(tensor.shape)))
    return made


def _scheme(tensor: _Placed, scheme: QuantScheme) -> QuantScheme:
    """`scheme`'s own for this weight; refuses what codes cannot go through."""
    if not values.moves_rows_only(tensor.transform.kind if tensor.transform else None):
        raise BadInputError(f"{tensor.source}: llama.cpp stores it in another form, so its codes cannot be handed over")
    columns = tensor.shape[-1]
    if columns % 32:
        raise BadInputError(
            f"{tensor.source} has {columns} input features, not a multiple of 32 as ggml's blocks: choose a file type "
            "such as --quant Q4_K_M, which falls back by itself"
        )
    return scheme.for_weight(tensor.source)
