"""bitsandbytes' prequantized NF4: the tensors that its `QuantState.from_dict` reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch

from vlmexport.lower.checkpoint.layout import Layout, Subject
from vlmexport.quantize.nf4 import NESTED_BLOCK, nest_absmax, quantize_nf4
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

NESTED = "nf4:nested"


def layout(subject: Subject) -> Layout:
    """The bitsandbytes layout for `subject`."""
    return Bnb(subject)


@dataclass(frozen=True)
class Bnb:
    """See the module."""

    subject: Subject

    def pack(self, name: str, tensor: QuantizedTensor, scheme: QuantScheme) -> dict[str, torch.Tensor]:
        """``weight`` uint8 ``[N * K / 2, 1]`` (high nibble first), absmax and levels, and the state as JSON bytes."""
        if tensor.codebook is None:
            raise ValueError(f"{name}: NF4 codes need their codebook")
        flat = tensor.codes.reshape(-1)
        state: dict[str, Any] = {
            "quant_type": "nf4",
            "blocksize": tensor.group_size,
            "dtype": self.subject.dtype,
            "shape": list(tensor.shape),
        }
        absmax = tensor.scale.float().reshape(-1)
        nested: dict[str, torch.Tensor] = {}
        if scheme.algorithm == NESTED:
            absmax, nested, more = self._nested(name, tensor, scheme)
            state |= more
        return {
            "weight": ((flat[::2] << 4) | flat[1::2]).reshape(-1, 1),
            "weight.absmax": absmax,
            "weight.quant_map": tensor.codebook.float(),
            **nested,
            "weight.quant_state.bitsandbytes__nf4": _as_bytes(state),
        }

    def config(self) -> dict[str, Any]:
        """The keys of transformers' `BitsAndBytesConfig`."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": self.subject.plan.options.scheme.algorithm == NESTED,
            "bnb_4bit_compute_dtype": self.subject.dtype,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self.subject.untouched_modules(),
            "llm_int8_threshold": 6.0,
        }

    def metadata(self) -> dict[str, str]:
        """Nothing."""
        return {}

    def _nested(
        self, name: str, tensor: QuantizedTensor, scheme: QuantScheme
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]]:
        """Scales as 8-bit codes, their own tensors, and their part of the state.

        Made from the weight again: scales that were rounded once have another mean, and cannot be nested again.
        """
        plain = quantize_nf4(self.subject.weights.tensor(name), scheme, name)
        nested = nest_absmax(plain.scale)
        if not torch.equal(nested.dequantize(), tensor.scale):
            raise ValueError(f"{name}: the nested scales are not those of the codes")
        tensors = {"weight.nested_absmax": nested.absmax, "weight.nested_quant_map": nested.codebook}
        state = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": nested.offset.item()}
        return nested.codes.reshape(-1), tensors, state


def _as_bytes(state: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
