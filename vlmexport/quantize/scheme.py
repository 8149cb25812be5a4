"""`QuantScheme`: what to do with a weight, as versioned, strict data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from vlmexport.errors import BadInputError
from vlmexport.quantize.registry import algorithm, check_bits

SCHEME_VERSION = 1
BITS = (2, 3, 4, 8)
PER_CHANNEL = -1
MIN_GROUP, MAX_GROUP = 16, 256
SCALE_BITS = 11  # significant bits of a float16
DEFAULT_ALGORITHM = "awq+gptq"


@dataclass(frozen=True)
class QuantScheme:
    """How a linear layer's weight ``[out_features, in_features]`` becomes integers.

    `bits` is 2, 3, 4 or 8; `group_size` the number of consecutive input features that share a scale (a power of two
    from 16 to 256, or -1 for one group per output row); `symmetric` fixes the zero point to ``2**(bits-1)``;
    `algorithm` a name of `vlmexport.quantize.registry`; `clip` lets it search a smaller range per group before it
    rounds; `scale_bits` makes every scale a float16 of at most that many significant bits (11: all of them), subnormal
    or not, as formats without float32 scales need it (0: float16, or float32 where that overflows or is subnormal);
    `overrides` maps a module name pattern to another scheme (`fnmatch` style), first match wins.

    Raises `BadInputError` for a value outside those, and for one that the algorithm does not take.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int = 32
    algorithm: str = "rtn"
    clip: bool = False
    scale_bits: int = 0
    overrides: dict[str, QuantScheme] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadInputError(f"bits is {self.bits}; choose one of {', '.join(map(str, BITS))}")
        size = self.group_size
        if size != PER_CHANNEL and (not MIN_GROUP <= size <= MAX_GROUP or size & (size - 1)):
            raise BadInputError(f"group size is {size}; choose 16, 32, 64, 128 or 256 (or -1 for one group per row)")
        method = algorithm(self.algorithm)
        check_bits(method, self.bits)
        if method.symmetric is not None and self.symmetric != method.symmetric:
            kind = "symmetric" if method.symmetric else "asymmetric"
            raise BadInputError(f"{method.name} is always {kind}; leave --symmetric/--asymmetric out")
        if method.group_sizes is not None and size not in method.group_sizes:
            sizes = ", ".join(map(str, method.group_sizes))
            raise BadInputError(f"group size is {size}; {method.name} takes {sizes}")
        if self.clip and not method.clips:
            raise BadInputError(f"--clip has no effect with {method.name}")
        if not 0 <= self.scale_bits <= SCALE_BITS:
            raise BadInputError(f"scale bits is {self.scale_bits}; choose 1 to {SCALE_BITS}, or 0 for any scale")
        if self.scale_bits and (method.wide_scales or method.imported):
            raise BadInputError(f"{method.name} makes scales of its own; it takes no scale bits")

    @property
    def calibrated(self) -> bool:
        """True when this scheme or one of its overrides needs the model's activations."""
        return algorithm(self.algorithm).calibrated or any(s.calibrated for s in self.overrides.values())

    def for_weight(self, name: str) -> QuantScheme:
        """The scheme of the weight `name` (``….q_proj.weight``): the first override that matches, or this one."""
        from fnmatch import fnmatchcase

        for pattern, override in self.overrides.items():
            if fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern):
                return override
        return dataclasses.replace(self, overrides={})

    def to_dict(self) -> dict[str, Any]:
        """The scheme as JSON data, with its version."""
        return {"version": SCHEME_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> QuantScheme:
        """Read `to_dict`'s data back; anything else raises `BadInputError`."""
        if not isinstance(data, dict):
            raise BadInputError(f"quantization scheme is {data!r}; it must be an object")
        known = {f.name for f in dataclasses.fields(QuantScheme)}
        unknown = sorted(data.keys() - known - {"version"})
        if unknown:
            raise BadInputError(f"quantization scheme has unknown keys {unknown}; known: {sorted(known)}")
        if data.get("version", SCHEME_VERSION) != SCHEME_VERSION:
            raise BadInputError(
                f"quantization scheme has version {data['version']}; this vlmexport reads {SCHEME_VERSION}"
            )
        values = {k: v for k, v in data.items() if k != "version"}
        _check_types(values)
        overrides = {p: QuantScheme.from_dict(s) for p, s in values.pop("overrides", {}).items()}
        return QuantScheme(**values, overrides=overrides)


def _check_types(values: dict[str, Any]) -> None:
    """Refuse a value of another type than its default, such as ``4.0`` or ``"4"`` bits."""
    defaults = QuantScheme()
    for key, value in values.items():
        wanted = type(getattr(defaults, key))
        if type(value) is not wanted:
            raise BadInputError(f"quantization scheme: {key} is {value!r}; it must be of type {wanted.__name__}")


def make_scheme(
    name: str = DEFAULT_ALGORITHM,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    clip: bool = False,
) -> QuantScheme:
    """A scheme of the algorithm `name`; what is None gets that algorithm's own default.

    Raises `BadInputError` for an unknown name (listing the choices) or a value that the algorithm does not take.
    """
    method = algorithm(name)
    fixed_symmetric = True if method.symmetric is None else method.symmetric
    return QuantScheme(
        bits=method.default_bits if bits is None else bits,
        symmetric=fixed_symmetric if symmetric is None else symmetric,
        group_size=method.default_group if group_size is None else group_size,
        algorithm=name,
        clip=clip,
    )
