"""GPTQ's layout: words along the input features, zero points along the output features.

Version 1 stores ``zero_point - 1`` and so cannot hold a zero point of 0 (some readers wrap to the largest code, some
take it for 16: ModelCloud/GPTQModel#2350, AutoGPTQ#640); version 2 stores the zero point as it is. Symmetric weights
are written as version 1, which every reader knows, asymmetric ones as version 2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from vlmexport import __version__
from vlmexport.errors import BadInputError
from vlmexport.lower.checkpoint.bits import pack_words
from vlmexport.lower.checkpoint.layout import Layout, Subject, check_packable, zero_points
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.tensor import QuantizedTensor

V1, V2 = "gptq", "gptq_v2"
_MULTIPLE = {2: 16, 3: 32, 4: 8, 8: 4}


def layout(subject: Subject) -> Layout:
    """The GPTQ layout for `subject`: version 1 for symmetric schemes, version 2 for asymmetric ones."""
    return Gptq(subject, V1 if subject.plan.options.scheme.symmetric else V2)


@dataclass(frozen=True)
class Gptq:
    """See the module."""

    subject: Subject
    version: str

    def pack(self, name: str, tensor: QuantizedTensor, scheme: QuantScheme) -> dict[str, torch.Tensor]:
        """``qweight`` ``[K * bits / 32, N]``, ``qzeros`` ``[K / g, N * bits / 32]``, ``scales`` and ``g_idx``.

        Groups are consecutive columns (act-order used static groups), so ``g_idx`` is ``i // group_size``.
        """
        rows, columns = tensor.shape
        check_packable(name, rows, "output", _MULTIPLE[tensor.bits], "GPTQ", scheme)
        check_packable(name, columns, "input", _MULTIPLE[tensor.bits], "GPTQ", scheme)
        zeros = zero_points(tensor)
        if self.version == V1:
            if bool((zeros == 0).any()):
                raise BadInputError(
                    f"{name} has a zero point of 0, which GPTQ's version 1 cannot hold; use --symmetric or "
                    "--format compressed-tensors"
                )
            zeros = zeros - 1
        return {
            "qweight": pack_words(tensor.codes, tensor.bits).t(),
            "qzeros": pack_words(zeros.t(), tensor.bits),
            "scales": tensor.scale.t(),
            "g_idx": torch.arange(columns, dtype=torch.int32) // tensor.group_size,
        }

    def config(self) -> dict[str, Any]:
        """The keys of gptqmodel, vLLM and transformers' `GPTQConfig`.

        ``modules_in_block_to_quantize`` holds whole names: vLLM takes a layer whose name contains one of them, optimum
        one that ends with it, and the usual short ones (``self_attn.q_proj``) would mean the vision tower's as well.
        ``dynamic`` names every other linear layer for gptqmodel.
        """
        plan = self.subject.plan
        modules = self.subject.names.modules(plan.schemes)
        return {
            "quant_method": "gptq",
            "bits": plan.options.scheme.bits,
            "group_size": plan.options.scheme.group_size,
            "sym": plan.options.scheme.symmetric,
            "desc_act": False,
            "checkpoint_format": self.version,
            "pack_dtype": "int32",
            "lm_head": False,
            "block_name_to_quantize": _common_block([name.removesuffix(".weight") for name in plan.schemes]),
            "modules_in_block_to_quantize": [modules],
            "dynamic": {f"-:{pattern}": {} for pattern in _patterns(self.subject.untouched_modules(), modules)},
            "meta": {"quantizer": [f"vlmexport:{__version__}"]},
        }

    def metadata(self) -> dict[str, str]:
        """Nothing."""
        return {}


def _common_block(modules: list[str]) -> str | None:
    """The longest dotted name that all modules begin with (``model.text_model.layers``)."""
    common = []
    for parts in zip(*(name.split(".") for name in modules), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or None


def _patterns(untouched: list[str], quantized: list[str]) -> list[str]:
    """Regular expressions of `untouched`, with any prefix where that means no quantized module too.

    Runtimes put modules under prefixes of their own (vLLM drops or adds ``model.``).
    """
    patterns = []
    for name in untouched:
        pattern = rf"(?:.*\.)?{re.escape(name.removeprefix('model.'))}$"
        clash = any(re.match(pattern, module) for module in quantized)
        patterns.append(rf"^{re.escape(name)}$" if clash else pattern)
    return patterns
