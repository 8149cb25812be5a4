"""Read a LoRA adapter in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

The format is that of https://huggingface.co/docs/peft (``LoraConfig``, ``get_peft_model_state_dict``); LoRA is arXiv
2106.09685, rsLoRA arXiv 2312.03732, DoRA arXiv 2402.09353. PEFT itself is not needed, and pickle is never read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError, UnsupportedModelError
from vlmexport.model.json_files import read_json
from vlmexport.model.source import resolve_source

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PICKLES = ("adapter_model.bin", "non_lora_trainables.bin")
# Starts that leave the base's weights alone; the others (PiSSA, OLoRA, CorDA, LoftQ) subtract the adapter from them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_REFUSED = {
    "target_parameters": "it adapts parameters that are packed (experts), not modules",
    "layer_replication": "it repeats layers of its base",
    "alora_invocation_tokens": "it acts only after its invocation tokens (aLoRA), so no merged weight is equal to it",
    "use_qalora": "its inputs are pooled (QALoRA), so no merged weight is equal to it",
    "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
    "arrow_config": "it routes between several adapters (Arrow), so no merged weight is equal to it",
    "kasa_config": "it has singular values of its own (KaSA)",
    "monteclora_config": "it samples its weights (MonteCLoRA)",
}  # fmt: skip
# What PEFT calls the tensors of an adapted module, after the module's name.
_KINDS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_B.bias": "bias",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "token_adapter.trainable_tokens_delta": "tokens",
}
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save)?\.(?P<leaf>weight|bias)")


@dataclass(frozen=True)
class LoraConfig:
    """What ``adapter_config.json`` says of an adapter's numbers.

    Patterns are PEFT's: a regular expression for the end of a module's name, and its value.
    """

    rank: int
    alpha: float
    rslora: bool
    base_model: str
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of `module`, by its name at training time."""
        return int(_matched(self.rank_pattern, module, self.rank))

    def scaling(self, module: str) -> float:
        """What ``B @ A`` of `module` is multiplied by: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA."""
        rank = self.rank_of(module)
        return float(_matched(self.alpha_pattern, module, self.alpha)) / (rank**0.5 if self.rslora else rank)


@dataclass(frozen=True)
class AdaptedModule:
    """The tensors of one adapted module, as stored.

    `a` is ``[r, in]`` and `b` ``[out, r]``; of a convolution ``[r, in, *kernel]`` and ``[out, r, 1, 1]``; of an
    embedding (`embedding`) ``[r, rows]`` and ``[columns, r]``. `bias` is added to the module's own, times the scaling;
    `magnitude` is DoRA's; `tokens` are whole rows of an embedding.
    """

    name: str
    embedding: bool = False
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: `source` is what the user typed, `modules` and `whole` go by names at training time.

    `whole` are tensors that replace a weight or bias altogether (``modules_to_save``, trained biases).
    """

    source: str
    path: Path
    config: LoraConfig
    modules: Mapping[str, AdaptedModule]
    whole: Mapping[str, torch.Tensor]

    @property
    def files(self) -> tuple[Path, ...]:
        """The two files that decide the result."""
        return self.path / CONFIG_NAME, self.path / WEIGHTS_NAME


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter and no model."""
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def base_name(folder: Path) -> str:
    """The base model that the adapter in `folder` names; empty when it names none."""
    return str(read_json(folder / CONFIG_NAME).get("base_model_name_or_path") or "")


def local_base(adapter: str) -> str:
    """The folder of the base model that `adapter` (a folder or a hub id) names.

    Raises `BadInputError` when it names none, or one that is no folder here: nothing is fetched unasked.
    """
    path = resolve_source(adapter)
    _config(path)
    named = base_name(path)
    if not named or not Path(named).is_dir():
        says = f"it was trained on {named}" if named else "it names none"
        raise BadInputError(f"{adapter}: give the base model with --base ({says})")
    return named


def read_adapter(source: str) -> Adapter:
    """Read the adapter `source` (a folder or a hub id).

    Raises `BadInputError` with one line for anything that is not such an adapter, and `UnsupportedModelError` for a
    variant whose effect is not a merged weight, or not known to be.
    """
    path = resolve_source(source)
    config = _config(path)
    modules, whole = _sorted_tensors(path / WEIGHTS_NAME, _tensors(path))
    for module in modules.values():
        _check_module(path, module, config)
    return Adapter(source, path, config, modules, whole)


def _config(path: Path) -> LoraConfig:
    file = path / CONFIG_NAME
    if not file.is_file():
        inner = next(iter(sorted(path.glob(f"*/{CONFIG_NAME}"))), None)
        hint = f"; did you mean {inner.parent}?" if inner else "; give the folder that PEFT's save_pretrained wrote"
        raise BadInputError(f"{path} is no LoRA adapter: it has no {CONFIG_NAME}{hint}")
    data = read_json(file)
    if data.get("peft_type") != "LORA":
        raise UnsupportedModelError(f"{file}: peft_type is {data.get('peft_type')!r}; only LORA is merged")
    for key, reason in _REFUSED.items():
        if data.get(key):
            raise UnsupportedModelError(f"{file}: {key} is set, and such an adapter is not merged: {reason}")
    start = data.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UnsupportedModelError(
            f"{file}: init_lora_weights {start!r} also changes the base's weights; save the adapter by PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
        )
    try:
        return LoraConfig(
            rank=int(data["r"]),
            alpha=float(data["lora_alpha"]),
            rslora=bool(data.get("use_rslora")),
            base_model=str(data.get("base_model_name_or_path") or ""),
            rank_pattern=dict(data.get("rank_pattern") or {}),
            alpha_pattern=dict(data.get("alpha_pattern") or {}),
            token_indices=_token_indices(data.get("trainable_token_indices") or {}),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(f"{file}: r, lora_alpha or a pattern is missing or no number ({error})") from error


def _token_indices(data: Any) -> dict[str, tuple[int, ...]]:
    """By the end of the embedding's name; a bare list is for whichever embedding has such rows."""
    found = data if isinstance(data, dict) else {"": data}
    return {str(name): tuple(int(i) for i in indices) for name, indices in found.items()}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    pickles = [name for name in _PICKLES if (path / name).is_file()]
    if pickles and (pickles[0] != _PICKLES[0] or not (path / WEIGHTS_NAME).is_file()):
        raise BadInputError(
            f"{path} has weights in pickle ({pickles[0]}); pickle can run any code, so it is never read: load the "
            "adapter where you trust it and call save_pretrained(folder, safe_serialization=True)"
        )
    file = path / WEIGHTS_NAME
    if not file.is_file():
        raise BadInputError(f"{path} has no {WEIGHTS_NAME}")
    try:
        tensors: dict[str, torch.Tensor] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise BadInputError(f"{file} is damaged or cut off: {error}; copy or download it again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise BadInputError(f"{file}: {name} is {tensor.dtype}, not a float type")
        if not tensor.isfinite().all():
            raise BadInputError(f"{file}: {name} holds NaN or infinity; the training diverged")
    return tensors


def _sorted_tensors(
    file: Path, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, AdaptedModule], dict[str, torch.Tensor]]:
    """The tensors by module, and those that replace a parameter, by its name."""
    if not tensors:
        raise BadInputError(f"{file} holds no tensors")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    embeddings: set[str] = set()
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        suffix = next((s for s in _KINDS if name.endswith(f".{s}")), None)
        replaced = _WHOLE.fullmatch(name)
        if suffix is not None:
            stem = name.removesuffix(f".{suffix}")
            modules.setdefault(stem, {})[_KINDS[suffix]] = tensor
            if suffix.startswith("lora_embedding"):
                embeddings.add(stem)
        elif replaced is not None and "lora_" not in name:
            whole[f"{replaced['module']}.{replaced['leaf']}"] = tensor
        else:
            raise BadInputError(f"{file}: {key} is no tensor of a LoRA adapter; known ends: {', '.join(_KINDS)}")
    return {stem: AdaptedModule(stem, stem in embeddings, **parts) for stem, parts in modules.items()}, whole


def _check_module(path: Path, module: AdaptedModule, config: LoraConfig) -> None:
    """Refuse half a pair, and a rank that is not the one that the scaling is computed from."""
    where = f"{path / WEIGHTS_NAME}: {module.name}"
    if module.tokens is not None and module.a is None and module.b is None:
        return
    if module.a is None or module.b is None:
        raise BadInputError(f"{where} has only half of its pair: lora_{'A' if module.a is None else 'B'} is missing")
    rank, found = config.rank_of(module.name), (module.a.shape[0], module.b.shape[1])
    if found != (rank, rank):
        raise BadInputError(f"{where} has ranks {found[0]} (lora_A) and {found[1]} (lora_B), {CONFIG_NAME} says {rank}")


def _matched(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name, from a dot on."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
