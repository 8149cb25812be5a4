"""`plan_gguf`: every weight's place and type in the two GGUF files, decided before any work is done."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.families import gguf_text_module, gguf_vision_module
from vlmexport.gguf_options import File, GgufOptions, GgufPlan, GgufTensor
from vlmexport.gguf_processor import preprocessor_config
from vlmexport.model.family import GgufHalf, TensorRule, Transform
from vlmexport.quantize.ggml import values
from vlmexport.quantize.ggml.code_types import BLOCK, codes_type
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

    Codes that came with a quantized checkpoint are handed over, unless the user named a file type. Raises
    `BadInputError` for an unknown type, an override that matches nothing and codes that no ggml type holds, and
    `UnsupportedModelError` when llama.cpp has no place for the architecture or for a weight.
    """
    options, coded = _settle_codes(vlm, options)
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
    if coded and facts.experts:
        raise BadInputError(
            f"{vlm.facts.model_type}: codes of mixture-of-experts decoders are not handed over to GGUF yet; choose a "
            "file type such as --quant Q4_K_M"
        )
    tensors = [
        *_typed("text", text, placed, options, facts, coded),
        *_typed("mmproj", vision, placed, options, facts, {}),
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
        notes=(*text.notes, *vision.notes, *_kept_notes(vlm, coded)),
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


def _settle_codes(vlm: VLM, options: GgufOptions) -> tuple[GgufOptions, dict[str, QuantScheme]]:
    """`options` with the type that the codes need, and the scheme of every weight whose codes are handed over.

    With an algorithm those are the text model's linears but for the LM head; with a quantized checkpoint, its own codes
    unless a file type was named.
    """
    from vlmexport.plan import head_weight_name, linear_weights

    kept = vlm.quantized
    if kept is None:
        if options.scheme is None:
            return options, {}
        return options, {n: options.scheme.for_weight(n) for n in linear_weights(vlm) - {head_weight_name(vlm)}}
    if options.scheme is not None:
        raise BadInputError(
            f"the checkpoint is already quantized ({kept.summary}): {options.scheme.algorithm} would need the original "
            "weights; leave --quant out to keep its codes, or choose a file type such as Q8_0"
        )
    if options.named:
        return options, {}
    if isinstance(options.imatrix, Path):
        raise BadInputError(
            f"--imatrix {options.imatrix} is for rounding, and the codes of the {kept.method} checkpoint are kept; "
            "choose a file type such as --quant Q4_K_M to round again"
        )
    from vlmexport.kept_codes import codes_scheme

    try:
        schemes = {name: codes_scheme(name, codes) for name, codes in kept.formats.items()}
        types = Counter(codes_type(scheme) for scheme in schemes.values())
    except BadInputError as error:
        raise BadInputError(
            f"the codes of the {kept.method} checkpoint cannot be handed over: {error}; choose a file type such as "
            "--quant Q8_0, which rounds what they mean"
        ) from error
    return replace(options, quant=types.most_common(1)[0][0]), schemes


def _kept_notes(vlm: VLM, coded: Mapping[str, QuantScheme]) -> tuple[str, ...]:
    if vlm.quantized is None or coded:
        return ()
    return (f"the checkpoint was quantized already ({vlm.quantized.summary}); what its codes mean was rounded again",)


def _typed(
    file: File,
    half: GgufHalf,
    placed: Sequence[_Placed],
    options: GgufOptions,
    facts: MixFacts,
    coded: Mapping[str, QuantScheme],
) -> list[GgufTensor]:
    """The tensors of one file in its order, each with its type; `coded` are weights whose codes are handed over."""
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
        scheme = coded.get(placed_tensor.source)
        if any(re.search(pattern, name) for pattern, _ in options.tensor_types):
            scheme = None  # the user's word for this tensor counts more than the codes
        if scheme is not None:
            _check_codes_fit(placed_tensor)
            kind, reason, wanted = codes_type(scheme), _CODES, ""
        tensor = GgufTensor(
            name, file, placed_tensor.shape, kind, reason, placed_tensor.source, placed_tensor.transform,
            placed_tensor.output, scheme, wanted,
        )  # fmt: skip
        made.append(replace(tensor, bytes=ggml_type(kind).size(tensor.shape)))
    return made


def _check_codes_fit(tensor: _Placed) -> None:
    """Refuse a tensor that codes cannot go through."""
    if tensor.transform is not None and not values.moves_rows_only(tensor.transform.kind):
        raise BadInputError(f"{tensor.source}: llama.cpp stores it in another form, so its codes cannot be handed over")
    if tensor.output or len(tensor.shape) != 2:
        raise BadInputError(f"{tensor.source}: llama.cpp stores it as several tensors; its codes cannot be handed over")
    columns = tensor.shape[-1]
    if columns % BLOCK:
        raise BadInputError(
            f"{tensor.source} has {columns} input features, not a multiple of {BLOCK} as ggml's blocks: choose a file "
            "type such as --quant Q4_K_M, which falls back by itself"
        )
