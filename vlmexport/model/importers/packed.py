"""What importers hand over: packed weights by name, decoded to logical codes one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from vlmexport.errors import BadInputError
from vlmexport.quantize.tensor import QuantizedTensor

_FP16 = torch.finfo(torch.float16)


@dataclass(frozen=True)
class PackedWeight:
    """One quantized matrix of a checkpoint: `name` is the float weight it stands for (``….q_proj.weight``).

    `parts` are the stored tensors that it is made of, `decode` reads them and gives the codes; it raises
    `BadInputError` naming the tensor when they are not a quantized matrix.
    """

    name: str
    parts: tuple[str, ...]
    decode: Callable[[], QuantizedTensor]


@dataclass(frozen=True)
class PackedCheckpoint:
    """All quantized matrices of a checkpoint; `notes` say what of its recipe an export does not carry on."""

    method: str
    weights: tuple[PackedWeight, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class CodeFormat:
    """How a matrix is quantized, known without reading its codes again.

    `group_size` is in input features; `codebook` is the name of uneven levels (``nf4``, ``fp8``), or empty. `stored`
    are the bytes of its tensors in the checkpoint; `wide_scales` says that float16 does not hold its scales.
    """

    bits: int
    group_size: int
    symmetric: bool
    codebook: str
    in_features: int
    stored: int
    wide_scales: bool

    @property
    def whole_rows(self) -> bool:
        """True when every row has one scale."""
        return self.group_size == self.in_features

    def words(self, *, per_channel: bool) -> str:
        """Such as ``4-bit g128 sym``; `per_channel` names a group of a whole row so."""
        kind = self.codebook or f"{self.bits}-bit"
        size = "per channel" if per_channel and self.whole_rows else f"g{self.group_size}"
        return f"{kind} {size}" + ("" if self.codebook else " sym" if self.symmetric else " asym")


class LazyCodes(Mapping[str, QuantizedTensor]):
    """Codes by the weight's name in the PyTorch model, decoded from the files every time they are asked for."""

    def __init__(self, weights: Mapping[str, PackedWeight]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> QuantizedTensor:
        return self._weights[name].decode()

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


@dataclass(frozen=True)
class QuantizedCheckpoint:
    """The quantization that a loaded checkpoint came with; the mappings go by names of the PyTorch model.

    `packed` says which tensors of the files each weight is made of.
    """

    method: str
    formats: Mapping[str, CodeFormat]
    codes: Mapping[str, QuantizedTensor]
    notes: tuple[str, ...] = ()
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """One line, such as ``gptq 4-bit g128 sym``; the most frequent format first."""
        # A group may happen to be as wide as one of the layers: per channel is what holds for all of them.
        per_channel = all(format_.whole_rows for format_ in self.formats.values())
        found = Counter(format_.words(per_channel=per_channel) for format_ in self.formats.values())
        return f"{self.method} " + ", ".join(words for words, _ in found.most_common())


def integers(
    name: str, codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int
) -> QuantizedTensor:
    """The codes of evenly spaced levels: `codes` uint8 ``[N, K]``, `scale` and `zero_point` ``[N, groups]``.

    Zero points that are all in the middle are what symmetric means, so they are left out. Raises `BadInputError` where
    K is not a multiple of the groups or a scale is NaN or infinite.
    """
    middle = 1 << (bits - 1)
    symmetric = bool((zero_point == middle).all())
    zero = None if symmetric else zero_point.to(torch.uint8).contiguous()
    return QuantizedTensor(codes, _checked_scale(name, scale), zero, bits, _group_size(name, codes, scale))


def levels(name: str, codes: torch.Tensor, scale: torch.Tensor, bits: int, codebook: torch.Tensor) -> QuantizedTensor:
    """The codes of a `codebook` (float32 ``[2**bits]``); shapes and errors as those of `integers`."""
    size = _group_size(name, codes, scale)
    wide = _checked_scale(name, scale).float()
    return QuantizedTensor(codes, wide, None, bits, size, codebook=codebook)


def _group_size(name: str, codes: torch.Tensor, scale: torch.Tensor) -> int:
    columns, groups = codes.shape[1], scale.shape[1]
    if groups == 0 or columns % groups:
        raise BadInputError(f"{name}: {columns} input features do not divide into {groups} groups of one size")
    return columns // groups


def _checked_scale(name: str, scale: torch.Tensor) -> torch.Tensor:
    """The scales as float16 where that is exact, else float32 (bfloat16 always fits that)."""
    wide = scale.float().contiguous()
    if not torch.isfinite(wide).all():
        raise BadInputError(f"{name}: a scale is NaN or infinite")
    half = wide.to(torch.float16)
    normal = (wide == 0) | (wide.abs() >= _FP16.tiny)
    return half if bool((normal & (half.float() == wide)).all()) else wide


def expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """`tensor`, after its shape and dtype have been compared; raises `BadInputError` naming it and both."""
    if tuple(tensor.shape) != shape:
        raise BadInputError(
            f"{name} is {_by(tuple(tensor.shape))}, and the other tensors of its layer say {_by(shape)}"
        )
    if tensor.dtype not in dtypes:
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise BadInputError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; the format says {kinds}")
    return tensor


def expect_matrix(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, when it has two axes and is not empty; raises `BadInputError` otherwise."""
    if tensor.ndim != 2 or not tensor.numel():
        raise BadInputError(f"{name} is {_by(tuple(tensor.shape))}; the format says two axes, none of them 0")
    return tensor


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
