"""Experts and routers in a trace: which expert runs depends on the data, so one stands for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vlmexport.lower.onnx import neutral
from vlmexport.quantize.fold import Fold
from vlmexport.split.expert_forms import ExpertForm, find_expert_forms
from vlmexport.split.experts import packed_parameters, routers_beside
from vlmexport.split.layers import overridden
from vlmexport.split.names import module_path


def expert_region(module: nn.Module, form: ExpertForm, path: str) -> Callable[..., torch.Tensor]:
    """A ``forward`` for `module`, whose whole-model path is `path`, that emits the neutral operators of one expert.

    Its gate is traced as it is.
    """
    signature = inspect.signature(module.forward)
    between, after = form.middle

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = list(signature.bind(*args, **kwargs).arguments.values())
        rows = neutral.expert_in(given, form.experts)
        rows = form.gate(neutral.expert_linear(rows, f"{path}.{form.up}", form.inputs, between))
        made = neutral.expert_linear(rows, f"{path}.{form.down}", after, form.outputs)
        return neutral.expert_out(made, given, form.experts)

    return run


@dataclass
class ExpertPeaks:
    """The largest magnitudes of what experts' products give, by packed parameter, beside the other `peaks`.

    `folds` are those of the stored weights.
    """

    folds: Mapping[str, Fold]
    peaks: dict[str, float]
    counts: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def watched(self, model: nn.Module, decoder: nn.Module) -> Iterator[None]:
        """Within, the products of all experts that run are looked at."""
        with ExitStack() as stack:
            for module, form in find_expert_forms(decoder).items():
                path = module_path(model, module)
                self.counts |= {f"{path}.{name}": form.experts for name in (form.up, form.down)}
                stack.enter_context(overridden(module, self._forward(module, form, path)))
            yield

    def each(self, names: Iterable[str]) -> frozenset[str]:
        """`names`, with all experts' own in the place of each packed parameter."""
        found: set[str] = set()
        for name in names:
            found |= {f"{name}.{e}" for e in range(self.counts[name])} if name in self.counts else {name}
        return frozenset(found)

    def _forward(self, module: nn.Module, form: ExpertForm, path: str) -> Callable[..., torch.Tensor]:
        signature = inspect.signature(module.forward)
        parameters = dict(module.named_parameters(recurse=False))

        def watch(local: str, expert: int, made: torch.Tensor) -> None:
            name = f"{path}.{local}"
            rows = self.folds[name].of_expert(expert).rows if name in self.folds else None
            peak = float((made if rows is None else made * rows).abs().max())
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)

        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            return form.run(parameters, list(signature.bind(*args, **kwargs).arguments.values()), watch)

        return run


@contextmanager
def float_routers(model: nn.Module, decoder: nn.Module) -> Iterator[None]:
    """Within, routers are in float32, the type that a trace computes in, whatever the checkpoint's is."""
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    for name in routers_beside(model, packed_parameters(model, decoder)):
        owner, _, local = name.rpartition(".")
        module = model.get_submodule(owner)
        before = module.get_parameter(local)
        if before.dtype != torch.float32:
            swapped.append((module, local, before))
            setattr(module, local, nn.Parameter(before.detach().float(), requires_grad=False))
    try:
        yield
    finally:
        for module, local, before in swapped:
            setattr(module, local, before)
