"""torchao's tensors in safetensors: the prototype form that transformers' `TorchAoHfQuantizer` reads.

Integers and scales are tensors of their own (``_weight_qdata``, ``_weight_scale``, ...); what they mean is in the
header's metadata, under the name of the weight in the *model*.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmexport.errors import BadInputError
from vlmexport.lower.checkpoint.layout import Layout, Subject, zero_points
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor
from vlmexport.quantize.torchao import torchao_config, torchao_tensor


def layout(subject: Subject) -> Layout:
    """The torchao layout for `subject`; raises `NotPossibleHereError` when torchao is not installed."""
    return Torchao(subject, torchao_config(subject.plan.options.scheme))


@dataclass(frozen=True)
class Torchao:
    """See the module; `quantizer` is torchao's own config object."""

    subject: Subject
    quantizer: Any
    _metadata: dict[str, str] = field(default_factory=dict)

    def pack(self, name: str, tensor: QuantizedTensor, scheme: QuantScheme) -> dict[str, torch.Tensor]:
        """The parts of torchao's tensor for these codes, in torchao's own flat form."""
        support = importlib.import_module("torchao.prototype.safetensors.safetensors_support")
        flat, metadata = support.flatten_tensor_state_dict({name: self._tensor(name, tensor, scheme)})
        self._metadata[name] = self._in_checkpoint_dtype(metadata[name])
        module = name.removesuffix("weight")
        return {key.removeprefix(module): value for key, value in flat.items()}

    def config(self) -> dict[str, Any]:
        """The keys of transformers' `TorchAoConfig`."""
        return {
            "quant_method": "torchao",
            "quant_type": {"default": importlib.import_module("torchao.core.config").config_to_dict(self.quantizer)},
            "modules_to_not_convert": self.subject.untouched_modules(),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }

    def metadata(self) -> dict[str, str]:
        """What each weight is, and the list of them."""
        return {**self._metadata, "tensor_names": json.dumps(list(self._metadata))}

    def _in_checkpoint_dtype(self, metadata: str) -> str:
        """The metadata with the dtype that the weight dequantizes to: it must be that of the activations."""
        data = json.loads(metadata)
        data["_data"]["dtype"]["_data"] = self.subject.dtype
        return json.dumps(data)

    def _tensor(self, name: str, tensor: QuantizedTensor, scheme: QuantScheme) -> Any:
        """Torchao's tensor with our codes: one of its own of the same shape says everything but the numbers."""
        middle = 1 << (tensor.bits - 1)
        numbers = {
            "qdata": _signed(tensor.codes, middle),
            "scale": tensor.scale.float(),
            "zero_point": _signed(zero_points(tensor), middle),
        }
        made = torchao_tensor(torch.zeros(tensor.shape), scheme)
        for part, value in numbers.items():
            like = getattr(made, part)
            if like is None:
                continue
            if like.shape != value.shape or like.dtype != value.dtype:
                raise BadInputError(
                    f"{name}: torchao keeps {part} as {like.dtype} {list(like.shape)}, not {value.dtype} "
                    f"{list(value.shape)}; another version of torchao than this vlmexport knows"
                )
            setattr(made, part, value)
        return made


def _signed(values: torch.Tensor, middle: int) -> torch.Tensor:
    return (values.to(torch.int16) - middle).to(torch.int8)
