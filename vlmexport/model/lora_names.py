"""Which parameter of the model a name from training time means: modules were renamed from version to version."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmexport.errors import BadInputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# What the text model was called below the whole one, in transformers' past and in text-only training; longest first.
_TEXT_PREFIXES = (
    "model.language_model.model", "language_model.model", "model.language_model", "model.text_model", "language_model",
    "text_model", "model",
)  # fmt: skip


class ParameterNames:
    """Finds parameters of one model by other versions' names.

    In this order: the name itself; transformers' own rules for old checkpoints; the text model under its former names;
    the one parameter that ends in the same words, layer numbers included.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        whole: Any = model
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._known: dict[str, torch.Tensor] = dict(whole.named_parameters(remove_duplicate=False))
        self._prefix = whole.base_model_prefix
        self._architecture = type(model).__name__
        decoder = whole.get_decoder()
        self._text: str = next((name for name, module in whole.named_modules() if module is decoder), "")

    def find(self, name: str) -> str:
        """The model's name of the parameter `name`.

        Raises `BadInputError` when there is none, when several could be meant, or when transformers builds that
        parameter from several tensors.
        """
        if name in self._known:
            return name
        found, several = self._renamed(name)
        if several:
            raise BadInputError(
                f"{name} has no parameter of its own in {self._architecture}: transformers builds {found} from several "
                "tensors; merge the adapter with the transformers version that it was trained with"
            )
        return found if found in self._known else self._text_only(name) or self._by_end(name)

    def loaded_as(self, key: str) -> str | None:
        """The parameter that transformers loads the tensor `key` of a checkpoint as; None where it is not just that."""
        found, several = self._renamed(key)
        return found if found in self._known and not several else None

    def _renamed(self, name: str) -> tuple[str, bool]:
        """The name by transformers' rules, and whether that parameter is built from several tensors."""
        from transformers.core_model_loading import rename_source_key

        found, pattern = rename_source_key(name, self._renamings, self._converters, self._prefix, self._known)
        return str(found), pattern is not None

    def _text_only(self, name: str) -> str | None:
        for prefix in _TEXT_PREFIXES:
            if name.startswith(f"{prefix}."):
                found = f"{self._text}.{name.removeprefix(prefix + '.')}".removeprefix(".")
                if found in self._known:
                    return found
        return None

    def _by_end(self, name: str) -> str:
        words = name.split(".")
        numbers = [i for i, word in enumerate(words) if word.isdigit()]
        most = max(numbers[0] - 1, 0) if numbers else max(len(words) - 3, 0)  # `layers.0...`; `module.leaf.weight`
        for dropped in range(1, most + 1):
            end = "." + ".".join(words[dropped:])
            found = [known for known in self._known if f".{known}".endswith(end)]
            if len(found) > 1:
                raise BadInputError(f"{name} could mean {found[0]} or {found[1]} of {self._architecture}")
            if found:
                return found[0]
        raise BadInputError(f"{name} is not in {self._architecture}; is the adapter for another base?")
