"""`QuantPlan`: a choice of bits per weight for one model, as a versioned, strict JSON file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vlmexport.errors import BadInputError
from vlmexport.manifest import file_sha256
from vlmexport.quantize.scheme import QuantScheme

if TYPE_CHECKING:
    from vlmexport.model.load import VLM

PLAN_VERSION = 1
PLAN_KIND = "vlmexport-quantization-plan"
PLAN_NAME = "quantization_plan.json"
# What a plan says of itself (`QuantPlan.lines`).
_MEASURED = {"kl", "upper", "answer_kl", "samples", "bytes", "weights_by_choice"}


class _Options(Protocol):
    """The options of any export that quantizes."""

    @property
    def keep(self) -> tuple[str, ...]: ...


_O = TypeVar("_O", bound=_Options)


@dataclass(frozen=True)
class AutoLimit:
    """What ``--quant auto`` has to meet: `max_kl` nats per token or `max_size` bytes of all weights, one of the two.

    Raises `BadInputError` when both or none are given, or one is not positive.
    """

    max_kl: float | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.max_kl, self.max_size) if value is not None]
        if len(given) != 1:
            raise BadInputError("--quant auto needs a limit: --max-kl (nats per token) or --max-size (1.2GB), not both")
        if not 0 < given[0] < math.inf:
            raise BadInputError(f"--quant auto: the limit is {given[0]}; it must be a number above 0")

    def to_dict(self) -> dict[str, float]:
        """The limit that is set, by name."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class QuantPlan:
    """Which weights are quantized how.

    `scheme` has an override for each weight that differs from it, under the weight's exact name; `keep` are names (and
    the user's own patterns) of weights that stay unquantized. `architecture` and `fingerprint` say for which model it
    was made; `limit` what was asked for; `estimated` and `measured` divergence (nats per token on held-out samples) and
    bytes, in `measured` also the number of weights by choice (``4 bits g32``) and bytes and divergence of the uniform
    schemes that were tried for comparison; `samples` what it was measured on.
    """

    architecture: str
    fingerprint: str
    scheme: QuantScheme
    keep: tuple[str, ...]
    limit: dict[str, float] = field(default_factory=dict)
    estimated: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON data, with its kind and version."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "kind": PLAN_KIND,
            "version": PLAN_VERSION,
            **values,
            "scheme": self.scheme.to_dict(),
            "keep": list(self.keep),
        }

    def lines(self) -> list[str]:
        """For people: how many weights got how many bits, and what was measured."""
        found = self.measured
        counts = ", ".join(f"{choice} ({n})" for choice, n in found["weights_by_choice"].items())
        return [
            f"decoder weights: {counts}; {found['bytes'] / 1e6:.2f} MB of all weights",
            f"divergence {found['kl']:.2e} nats per token (95 % limit {found['upper']:.2e}) on {found['samples']} "
            f"held-out samples ({found['answer_kl']:.2e} on answer tokens alone)",
        ]

    def check(self, vlm: VLM) -> None:
        """Raise `BadInputError` unless the plan was made for `vlm`."""
        if vlm.facts.architecture != self.architecture:
            raise BadInputError(
                f"the plan was made for a {self.architecture}, {vlm.source} is a {vlm.facts.architecture}; "
                "make one for it with --quant auto"
            )
        if model_fingerprint(vlm.path, vlm.adapter_files) != self.fingerprint:
            raise BadInputError(
                f"the plan was made for other weights than those of {vlm.source}; make one for them with --quant auto"
            )

    def apply(self, options: _O) -> _O:
        """`options` of an export with this plan's scheme, and its weights kept besides those kept already."""
        keep = dict.fromkeys((*options.keep, *self.keep))
        changed: Any = options
        applied: _O = dataclasses.replace(changed, scheme=self.scheme, keep=tuple(keep))
        return applied

    def write(self, path: Path) -> None:
        """Write the plan to `path`; raises OSError when it cannot be."""
        path.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def load_plan_file(path: Path) -> QuantPlan:
    """Read a plan file strictly.

    Raises `BadInputError` naming the file when it is missing, not such a plan, of another version, or has unknown or
    missing keys.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"--plan {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BadInputError(f"--plan {path} is not valid JSON: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != PLAN_KIND:
        raise BadInputError(f"--plan {path} is not a quantization plan; `--quant auto` writes one")
    if data.get("version") != PLAN_VERSION:
        raise BadInputError(f"--plan {path} has version {data.get('version')}; this vlmexport reads {PLAN_VERSION}")
    fields = {f.name for f in dataclasses.fields(QuantPlan)}
    given = data.keys() - {"kind", "version"}
    if given != fields:
        missing, unknown = sorted(fields - given), sorted(given - fields)
        raise BadInputError(f"--plan {path}: missing keys {missing}, unknown keys {unknown}")
    return _parse(data, path)


def _parse(data: dict[str, Any], path: Path) -> QuantPlan:
    texts = (data["architecture"], data["fingerprint"])
    dicts = (data["scheme"], data["limit"], data["estimated"], data["measured"], data["samples"])
    keep = data["keep"]
    if not all(isinstance(t, str) for t in texts) or not all(isinstance(d, dict) for d in dicts):
        raise BadInputError(f"--plan {path}: architecture and fingerprint must be texts, the numbers objects")
    if not isinstance(keep, list) or not all(isinstance(name, str) for name in keep):
        raise BadInputError(f"--plan {path}: keep must be a list of weight names")
    lacking = sorted(_MEASURED - data["measured"].keys())
    if lacking:
        raise BadInputError(f"--plan {path}: measured lacks {lacking}")
    counts, *numbers = (data["measured"][key] for key in sorted(_MEASURED, reverse=True))
    if not isinstance(counts, dict) or not all(isinstance(number, int | float) for number in numbers):
        raise BadInputError(f"--plan {path}: measured holds other things than numbers and weights_by_choice")
    values = {f.name: data[f.name] for f in dataclasses.fields(QuantPlan)}
    try:
        scheme = QuantScheme.from_dict(data["scheme"])
    except TypeError as error:
        raise BadInputError(f"--plan {path}: the scheme has a value of the wrong type: {error}") from error
    return QuantPlan(**{**values, "scheme": scheme, "keep": tuple(keep)})


def model_fingerprint(folder: Path, adapter: tuple[Path, ...] = ()) -> str:
    """SHA-256 over the config and weight files of a model's folder, and the files of an `adapter` merged into it."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("config.json")])
    digests = {file.name: file_sha256(file) for file in files} | {f"lora/{f.name}": file_sha256(f) for f in adapter}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
