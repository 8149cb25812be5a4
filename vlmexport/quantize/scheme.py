"""`QuantScheme`: what to do with a weight, as versioned, strict data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from vlmexport.errors import BadInputError

SCHEME_VERSION = 1
BITS = (2, 3, 4, 8)
ALGORITHMS = ("rtn",)
MIN_GROUP, MAX_GROUP = 16, 256


@dataclass(frozen=True)
class QuantScheme:
    """How a linear layer's weight ``[out_features, in_features]`` becomes integers.

    `bits` is 2, 3, 4 or 8; `group_size` the number of consecutive input features that share a scale (a power of two
    from 16 to 256, or -1 for one group per output row); `symmetric` fixes the zero point to ``2**(bits-1)``;
    `overrides` maps a module name pattern to another scheme (`fnmatch` style), first match wins.

    Raises `BadInputError` for a value outside those.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int = 32
    algorithm: str = "rtn"
    overrides: dict[str, QuantScheme] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadInputError(f"bits is {self.bits}; choose one of {', '.join(map(str, BITS))}")
        if self.algorithm not in ALGORITHMS:
            raise BadInputError(f"algorithm is {self.algorithm!r}; choose one of {', '.join(ALGORITHMS)}")
        size = self.group_size
        if size != -1 and (not MIN_GROUP <= size <= MAX_GROUP or size & (size - 1)):
            raise BadInputError(f"group size is {size}; choose 16, 32, 64, 128 or 256 (or -1 for one group per row)")

    def to_dict(self) -> dict[str, Any]:
        """The scheme as JSON data, with its version."""
        return {"version": SCHEME_VERSION, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> QuantScheme:
        """Read `to_dict`'s data back; unknown keys and versions raise `BadInputError`."""
        known = {f.name for f in dataclasses.fields(QuantScheme)}
        unknown = sorted(data.keys() - known - {"version"})
        if unknown:
            raise BadInputError(f"quantization scheme has unknown keys {unknown}; known: {sorted(known)}")
        if data.get("version", SCHEME_VERSION) != SCHEME_VERSION:
            raise BadInputError(
                f"quantization scheme has version {data['version']}; this vlmexport reads {SCHEME_VERSION}"
            )
        values = {k: v for k, v in data.items() if k != "version"}
        overrides = {p: QuantScheme.from_dict(s) for p, s in values.pop("overrides", {}).items()}
        return QuantScheme(**values, overrides=overrides)
