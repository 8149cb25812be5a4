"""What an ONNX export has to know of mixture-of-experts layers before any work is done, and what it refuses of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmexport.errors import BadInputError, UnsupportedModelError

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.plan import OnnxOptions
    from vlmexport.split.parts import Split
    from vlmexport.target import Target


@dataclass(frozen=True)
class PlannedExperts:
    """The experts of a decoder by whole-model parameter name; everything is empty where there are none.

    `shapes` are ``[E, N, K]`` of the packed parameters, whichever way they are stored; `routers` the small matrices
    that decide which expert runs, or how much a shared one counts.
    """

    shapes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    routers: frozenset[str] = field(default_factory=frozenset)


def plan_experts(vlm: VLM, split: Split, target: Target, options: OnnxOptions) -> PlannedExperts:
    """Look at the decoder's packed experts.

    Raises `UnsupportedModelError` for experts that have no form, or none on `target`, and `BadInputError` for options
    that do not go with experts.
    """
    from vlmexport.split.expert_forms import expert_shapes, find_expert_forms, transposed_parameters
    from vlmexport.split.experts import packed_parameters, routers_beside
    from vlmexport.split.parts import Role

    decoder = split.parts[Role.DECODER].module
    packed = packed_parameters(vlm.model, decoder)
    if not packed:
        return PlannedExperts()
    name, tensor = next(iter(packed.items()))
    if target.onnx.dialect == "tensorrt":
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: mixture-of-experts layers have no form in the tensorrt layout yet ({name} holds "
            f"{tensor.shape[0]} experts); `vlmexport onnx` writes a form of this model for ONNX Runtime"
        )
    if options.prefill != "same":
        raise BadInputError(
            f"--prefill {options.prefill} has no form for mixture-of-experts layers ({name}); choose --prefill same"
        )
    forms = find_expert_forms(decoder)
    turned = transposed_parameters(vlm.model, forms)
    scheme = options.scheme
    if turned and scheme is not None and any(s.calibrated for s in (scheme, *scheme.overrides.values())):
        raise BadInputError(
            f"--quant {scheme.algorithm} calibrates no experts that are stored as [inputs, outputs] ({min(turned)}); "
            "choose --quant rtn or hqq"
        )
    return PlannedExperts(expert_shapes(vlm.model, forms), routers_beside(vlm.model, packed))
