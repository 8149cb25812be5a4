"""Which part of the export every parameter of a model goes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmexport.errors import UnsupportedModelError

if TYPE_CHECKING:
    import torch

    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split


@dataclass(frozen=True)
class OwnedParameter:
    """One parameter and the part it goes to; `used` is False when no graph needs it."""

    name: str
    role: str
    tensor: torch.Tensor
    used: bool = True


def owned_parameters(vlm: VLM, split: Split) -> list[OwnedParameter]:
    """Every parameter in the order of the parts; the embedding claims its table before the decoder around it."""
    from vlmexport.split.names import weight_names
    from vlmexport.split.parts import Role
    from vlmexport.split.vision import part_parameter_names, unused_parameter_names

    everything = dict(vlm.model.named_parameters(remove_duplicate=False))
    vision, projector = split.parts[Role.VISION_ENCODER], split.parts[Role.PROJECTOR]
    tables = weight_names(vlm.model, split.parts[Role.EMBEDDING].module)
    claims: list[tuple[Role, Iterable[str], bool]] = [
        (Role.VISION_ENCODER, part_parameter_names(vision), True),
        (Role.VISION_ENCODER, unused_parameter_names(vlm, vision, projector), False),
        (Role.PROJECTOR, (name for name in part_parameter_names(projector) if name not in tables), True),
        (Role.EMBEDDING, tables, True),
        *((role, part_parameter_names(part), True) for role, part in split.parts.items() if role is Role.ENCODER),
        (Role.DECODER, weight_names(vlm.model, split.parts[Role.DECODER].module), True),
    ]
    owned: dict[str, OwnedParameter] = {}
    for role, names, used in claims:
        for name in names:
            owned.setdefault(name, OwnedParameter(name, str(role), everything[name], used))
    identities = {id(o.tensor) for o in owned.values()}
    lost = [name for name, parameter in everything.items() if id(parameter) not in identities]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: weights that belong to no part, so an export would lose them: {lost[0]}{more}"
        )
    return list(owned.values())
