"""Experts that are packed in one parameter, and the routers beside them: found by running the decoder, not by names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.split.matrices import PACKED_AXES, LinearObserver, Matrix, matrices_of
from vlmexport.split.names import module_path

if TYPE_CHECKING:
    from vlmexport.split.parts import Part

# Every expert layer sends at least one of these tokens to at least one expert, which shows how it multiplies.
_TOKENS = 8
_TOKEN_DIMS = ("sequence_length", "total_sequence_length")


@dataclass(frozen=True)
class Experts:
    """The packed experts of a decoder, by whole-model parameter name.

    `packed` are parameters ``[E, N, K]`` whose slices are the weights of linear products; `other` have three axes and
    are used in another way (transposed, or multiplied as one). `routers` are the small matrices beside them, of one
    row per expert or a single one: they decide which expert runs, or by how much a shared one counts.
    """

    packed: frozenset[str] = field(default_factory=frozenset)
    other: frozenset[str] = field(default_factory=frozenset)
    routers: frozenset[str] = field(default_factory=frozenset)


def packed_parameters(model: nn.Module, decoder: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters of `decoder` with three axes that are no convolution's, by name in `model`."""
    return {
        f"{module_path(model, module)}.{name}": parameter.detach()
        for module in decoder.modules()
        if not type(module).__module__.startswith("torch.nn.")
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == PACKED_AXES
    }


def find_experts(model: nn.Module, part: Part) -> Experts:
    """The packed experts of the decoder `part`, which lives inside `model`; it runs on a few tokens if it may have any.

    The rule is that of the layer loop (`vlmexport.calibrate.sites`): what ``linear`` multiplies by can be quantized.
    """
    parameters = packed_parameters(model, part.module)
    if not parameters:
        return Experts()
    seen: set[str] = set()

    def take(matrix: Matrix, _inputs: torch.Tensor) -> None:
        seen.add(matrix.parameter)

    observer = LinearObserver(matrices_of(parameters.items()), parameters, take)
    with eager_experts(part.module), torch.no_grad(), observer:
        part.module(**_first_tokens(part))
    return Experts(frozenset(seen), frozenset(parameters.keys() - seen), routers_beside(model, parameters))


def _first_tokens(part: Part) -> dict[str, torch.Tensor]:
    """The first `_TOKENS` tokens of the part's first example: every input is cut on the axes that count tokens."""
    cut = dict(part.examples[0])
    for spec in part.signature.inputs:
        for axis, dim in enumerate(spec.dims):
            if dim in _TOKEN_DIMS:
                cut[spec.name] = cut[spec.name].narrow(axis, 0, min(_TOKENS, cut[spec.name].shape[axis]))
    return cut


def routers_beside(model: nn.Module, packed: dict[str, torch.Tensor]) -> frozenset[str]:
    """Matrices with one row per expert, or one row, in the module around each packed parameter's own.

    Those of a shared expert that is as wide as there are experts are none: a matrix beside them takes what they make.
    """
    found: set[str] = set()
    for name, experts in packed.items():
        around = name.rpartition(".")[0].rpartition(".")[0]
        parameters = model.get_submodule(around).named_parameters()
        shapes = {local: p.shape for local, p in parameters if p.ndim == PACKED_AXES - 1}
        for local, shape in shapes.items():
            if shape[0] in (1, experts.shape[0]) and not _taken_beside(local, shapes):
                found.add(f"{around}.{local}")
    return frozenset(found)


def _taken_beside(local: str, shapes: dict[str, torch.Size]) -> bool:
    """Does a matrix of the same inner module read as many values as the matrix `local` makes?"""
    inner = local.rpartition(".")[0].rpartition(".")[0]
    return bool(inner) and any(
        shape[1] == shapes[local][0] for other, shape in shapes.items() if other.startswith(f"{inner}.")
    )


@contextmanager
def eager_experts(decoder: Any) -> Iterator[None]:
    """Within, packed experts run one after the other, each by its own linear product that can be observed."""
    configs = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}.values()
    before = [(c, c._experts_implementation) for c in configs if getattr(c, "_experts_implementation", None)]
    for config, _ in before:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, name in before:
            config._experts_implementation = name
