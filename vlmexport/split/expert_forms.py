"""How modules of packed experts compute, shown by value: which matrix comes first, and what is between the two."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.split.experts import eager_experts, packed_parameters
from vlmexport.split.matrices import PACKED_AXES
from vlmexport.split.names import module_path

_LIMIT = 1e-5
# Every expert gets rows of each of these sizes: a clamp shows only on large ones.
_SIZES = (1.0, 1e2, 1e4)
_ROUTED_INPUTS, _MATRICES = 3, 2
Gate = Callable[[torch.Tensor], torch.Tensor]
Watch = Callable[[str, int, torch.Tensor], None]


@dataclass(frozen=True)
class ExpertForm:
    """What a module of packed experts does with its rows: ``down(gate(up(x)))`` of the expert that each goes to.

    `up` and `down` are its parameters ``[E, N, K]``, or ``[E, K, N]`` where `transposed`; `inputs` and `outputs` are K
    of `up` and N of `down`, `middle` N of `up` and K of `down`. `routed`: it is called with rows ``[T, H]``, the
    experts of each ``[T, k]`` and their weights ``[T, k]``, and gives the weighted sums ``[T, H]``. Else it is called
    with all experts' rows ``[E * T, H]``, and rows of zeros give zeros.
    """

    up: str
    down: str
    transposed: bool
    routed: bool
    gate: Gate
    experts: int
    inputs: int
    middle: tuple[int, int]
    outputs: int

    def run(
        self,
        parameters: Mapping[str, torch.Tensor],
        given: Sequence[torch.Tensor],
        watch: Watch | None = None,
    ) -> torch.Tensor:
        """What the module computes for the arguments `given` to it, expert by expert.

        `watch` sees every product: the parameter's local name, the expert and the result.
        """
        count = parameters[self.up].shape[0]
        rows, *routing = given
        if not self.routed:
            each = rows.reshape(count, -1, rows.shape[-1])
            return torch.cat([self._one(parameters, e, each[e], watch) for e in range(count)])
        chosen, weights = routing
        out = torch.zeros(rows.shape[0], self.outputs, dtype=rows.dtype)
        for expert in sorted(set(chosen.flatten().tolist())):
            token, place = torch.where(chosen == expert)
            made = self._one(parameters, expert, rows[token], watch) * weights[token, place, None]
            out.index_add_(0, token, made.to(out.dtype))
        return out

    def _one(
        self,
        parameters: Mapping[str, torch.Tensor],
        expert: int,
        rows: torch.Tensor,
        watch: Watch | None,
    ) -> torch.Tensor:
        for name, then in ((self.up, self.gate), (self.down, None)):
            weight = parameters[name][expert]
            rows = rows @ (weight if self.transposed else weight.t())
            if watch is not None and rows.numel():
                watch(name, expert, rows)
            rows = rows if then is None else then(rows)
        return rows


def find_expert_forms(decoder: nn.Module, among: Collection[nn.Module] | None = None) -> dict[nn.Module, ExpertForm]:
    """The modules of `decoder` that own packed experts, each with what it was shown to compute.

    `among`: look at these modules alone (None: all).

    Raises `UnsupportedModelError` naming the first whose numbers no known form reproduces.
    """
    found: dict[nn.Module, ExpertForm] = {}
    with torch.no_grad(), eager_experts(decoder):
        for path, module in decoder.named_modules():
            if _packed(module) and (among is None or module in among):
                found[module] = _form(path, module)
    return found


def expert_shapes(model: nn.Module, forms: Mapping[nn.Module, ExpertForm]) -> dict[str, tuple[int, int, int]]:
    """``[E, N, K]`` of every packed parameter of `forms` by its whole-model name, whichever way it is stored."""
    shapes = {}
    for module, form in forms.items():
        path = module_path(model, module)
        shapes[f"{path}.{form.up}"] = (form.experts, form.middle[0], form.inputs)
        shapes[f"{path}.{form.down}"] = (form.experts, form.outputs, form.middle[1])
    return shapes


def transposed_parameters(model: nn.Module, forms: Mapping[nn.Module, ExpertForm]) -> frozenset[str]:
    """Whole-model names of the packed parameters that are stored ``[E, K, N]``."""
    return frozenset(
        f"{module_path(model, module)}.{name}"
        for module, form in forms.items()
        if form.transposed
        for name in (form.up, form.down)
    )


def with_packed_experts(
    model: nn.Module, decoder: nn.Module, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`weights` by parameter name: experts' matrices ``[N, K]`` under ``<parameter>.<expert>`` go into their parameter.

    Experts that are not in `weights` stay as they are.
    """
    packed = packed_parameters(model, decoder)
    split = {name: name.rpartition(".") for name in weights}
    given = {parameter for parameter, _, number in split.values() if parameter in packed and number.isdecimal()}
    if not given:
        return dict(weights)
    owners = {model.get_submodule(parameter.rpartition(".")[0]) for parameter in given}
    turned = transposed_parameters(model, find_expert_forms(decoder, owners))
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        parameter, _, number = split[name]
        if parameter not in given or not number.isdecimal():
            found[name] = tensor
            continue
        whole = found.setdefault(parameter, packed[parameter].clone())
        whole[int(number)] = tensor.t() if parameter in turned else tensor
    return found


def _packed(module: nn.Module) -> dict[str, torch.Tensor]:
    """The packed parameters that `module` itself owns, by local name."""
    if type(module).__module__.startswith("torch.nn."):
        return {}
    return {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == PACKED_AXES}


def _form(path: str, module: nn.Module) -> ExpertForm:
    own, packed = dict(module.named_parameters(recurse=False)), _packed(module)
    count = next(iter(packed.values())).shape[0]
    routed = len(inspect.signature(module.forward).parameters) == _ROUTED_INPUTS
    if len(own) == len(packed) == _MATRICES:
        numbers = {name: _numbers(p.shape) for name, p in packed.items()}
        for form in _candidates(module, packed, count, routed):
            if _matches(module, numbers, form):
                return form
    raise UnsupportedModelError(
        f"{path} ({type(module).__name__}, {count} experts) computes something else than two products with a gate or "
        "an activation between them, so these mixture-of-experts layers have no ONNX form"
    )


def _candidates(
    module: nn.Module, packed: Mapping[str, torch.Tensor], count: int, routed: bool
) -> Iterator[ExpertForm]:
    for (up, down), transposed in itertools.product(itertools.permutations(packed), (False, True)):
        first, second = ((p.shape[2], p.shape[1]) if transposed else p.shape[1:] for p in (packed[up], packed[down]))
        if first[1] != second[0]:
            continue
        for gate, times in _gates(module):
            if first[0] == times * second[1]:
                middle = (int(first[0]), int(second[1]))
                yield ExpertForm(up, down, transposed, routed, gate, count, int(first[1]), middle, int(second[0]))


def _gates(module: nn.Module) -> Iterator[tuple[Gate, int]]:
    """What may stand between the two products, and how many times narrower it makes its rows."""
    own = getattr(module, "_apply_gate", None)
    if own is not None:
        yield own, 2
    beside = [v for v in vars(module).values() if inspect.isroutine(v)]
    for act in [*(m for m in module.children() if not any(True for _ in m.parameters())), *beside]:
        yield _halves(act), 2
        yield _neighbours(act), 2
        yield act, 1


def _halves(act: Gate) -> Gate:
    def gate(rows: torch.Tensor) -> torch.Tensor:
        gated, plain = rows.chunk(2, dim=-1)
        return act(gated) * plain

    return gate


def _neighbours(act: Gate) -> Gate:
    return lambda rows: act(rows[..., ::2]) * rows[..., 1::2]


def _numbers(shape: torch.Size) -> torch.Tensor:
    """Random matrices of `shape` ``[E, N, K]``, unlike each other, in the memory of one: each starts a value later."""
    experts, rows, columns = shape
    generator = torch.Generator().manual_seed(rows + columns)
    values: torch.Tensor = torch.randn(rows * columns + experts, generator=generator) / columns**0.5
    return values.as_strided((experts, rows, columns), (1, columns, 1))


def _matches(module: nn.Module, numbers: dict[str, torch.Tensor], form: ExpertForm) -> bool:
    """Does `form` give the module's numbers on random rows of every size, in all of its experts?"""
    generator = torch.Generator().manual_seed(0)
    count, repeats = form.experts, len(_SIZES)
    # Experts that take all rows have theirs in a run; routed rows go to each expert and the next one.
    sizes = torch.tensor(_SIZES).repeat_interleave(count) if form.routed else torch.tensor(_SIZES).repeat(count)
    rows = torch.randn(len(sizes), form.inputs, generator=generator) * sizes[:, None]
    given: tuple[torch.Tensor, ...] = (rows,)
    if form.routed:
        first = torch.arange(count).repeat(repeats)
        chosen = torch.stack([(first + more) % count for more in range(min(2, count))], dim=1)
        given = (rows, chosen, torch.rand(chosen.shape, generator=generator) + 0.1)
    try:
        wanted = torch.func.functional_call(module, numbers, given)
        got = form.run(numbers, given)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    if got.shape != wanted.shape or not all(_close(got[sizes == size], wanted[sizes == size]) for size in _SIZES):
        return False
    return form.routed or not bool(form.run(numbers, (torch.zeros_like(rows),)).any())


def _close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    scale = wanted.abs().max().clamp_min(1e-30)
    return bool((got - wanted).abs().max() <= _LIMIT * scale)
