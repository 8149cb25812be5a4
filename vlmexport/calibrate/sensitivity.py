"""Sensitivity: what quantizing each decoder module alone does to the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlmexport.calibrate.capture import Batch, capture_batches
from vlmexport.calibrate.dataset import load_samples
from vlmexport.calibrate.judge import Divergence, Judge, exchanged
from vlmexport.calibrate.recipe import CalibrationOptions, resolve_recipe
from vlmexport.errors import BadInputError
from vlmexport.owners import owned_parameters
from vlmexport.plan import check_group_size, head_weight_name, linear_weights
from vlmexport.progress import Progress
from vlmexport.quantize.scheme import QuantScheme
from vlmexport.quantize.weights import DecoderWeights
from vlmexport.split.decoder import DecoderPart
from vlmexport.split.experts import packed_parameters
from vlmexport.split.names import module_path, weight_names
from vlmexport.split.parts import Role

if TYPE_CHECKING:
    from vlmexport.model.load import VLM
    from vlmexport.split.parts import Split

SENSITIVITY_VERSION = 1
DEFAULT_SAMPLES = 64


@dataclass(frozen=True)
class ModuleEffect:
    """What quantizing the weight `name` alone does: `kl` in nats per token, `upper` its 95 % limit.

    `layer` is the decoder layer's index, None outside the layers; `kind` the module's path in its layer
    (``self_attn.q_proj``), or its whole path outside; `elements` the weight's size.
    """

    name: str
    layer: int | None
    kind: str
    elements: int
    kl: float
    upper: float


@dataclass(frozen=True)
class Sensitivity:
    """The effects of all modules under `scheme`, and of all of them together, on held-out samples."""

    model: str
    scheme: QuantScheme
    effects: tuple[ModuleEffect, ...]
    together: Divergence
    notes: tuple[str, ...]

    @property
    def layers(self) -> list[int]:
        """The layers' indices, in order."""
        return sorted({e.layer for e in self.effects if e.layer is not None})

    @property
    def kinds(self) -> list[str]:
        """The module kinds inside the layers, in the order of first appearance."""
        return list(dict.fromkeys(e.kind for e in self.effects if e.layer is not None))

    @property
    def outside(self) -> list[ModuleEffect]:
        """The modules outside the layers: the LM head."""
        return [e for e in self.effects if e.layer is None]

    def cell(self, layer: int, kind: str) -> ModuleEffect | None:
        """The module `kind` of `layer`; None where that layer has none or it stays unquantized."""
        return next((e for e in self.effects if (e.layer, e.kind) == (layer, kind)), None)

    def to_dict(self) -> dict[str, Any]:
        """The measurement as JSON data."""
        return {
            "version": SENSITIVITY_VERSION,
            "model": self.model,
            "scheme": self.scheme.to_dict(),
            "together": asdict(self.together),
            "modules": [asdict(effect) for effect in self.effects],
            "notes": list(self.notes),
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Sensitivity:
        """Read `to_dict`'s data back; raises `BadInputError` for another version or damaged data."""
        if data.get("version") != SENSITIVITY_VERSION:
            raise BadInputError(f"a sensitivity of version {data.get('version')}, expected {SENSITIVITY_VERSION}")
        try:
            effects = tuple(ModuleEffect(**module) for module in data["modules"])
            together, scheme = Divergence(**data["together"]), QuantScheme.from_dict(data["scheme"])
            return Sensitivity(str(data["model"]), scheme, effects, together, tuple(map(str, data["notes"])))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInputError(f"the sensitivity is damaged: {error}") from error


def measure_sensitivity(
    vlm: VLM, split: Split, scheme: QuantScheme, options: CalibrationOptions, progress: Progress
) -> Sensitivity:
    """Quantize each linear weight of the decoder alone by `scheme` (data-free), then all of them together.

    The samples are `options`' own (`DEFAULT_SAMPLES` unless said). The decoder is held in float32 meanwhile. Raises
    `BadInputError` for samples that cannot be used, for a group size that does not divide a weight's input features,
    for a scheme that needs calibration and for a model that is quantized already.
    """
    if vlm.quantized is not None:
        raise BadInputError(
            f"{vlm.source} is quantized already ({vlm.quantized.summary}); sensitivity measures what rounding the "
            "original weights does, so give those"
        )
    if scheme.calibrated:
        raise BadInputError(
            f"sensitivity quantizes one module at a time without calibration; {scheme.algorithm} needs it"
        )
    part = decoder_part(split)
    tensors = weight_names(vlm.model, part)
    names = quantizable(vlm, split, scheme)
    weights = DecoderWeights(tensors, dict.fromkeys(names, scheme))
    with progress.stage("held-out samples"):
        batches, notes = held_out_batches(vlm, options, 0, options.samples or DEFAULT_SAMPLES)
    if experts := packed_parameters(vlm.model, part):
        notes.append(
            f"{len(experts)} parameters of packed experts were left as they are: only linear layers are measured"
        )
    judge = Judge(vlm.model, part, batches)
    with judge.ready():
        effects = module_effects(judge, weights, names, progress)
        together = judge.divergence({name: weights.quantized(name).dequantize() for name in names})
    return Sensitivity(vlm.source, scheme, effects, together, tuple(notes))


def quantizable(vlm: VLM, split: Split, scheme: QuantScheme) -> list[str]:
    """Names of the decoder's linear weights, the LM head's last; `BadInputError` for a group size that does not fit."""
    linear, head = linear_weights(vlm), head_weight_name(vlm)
    names = [o.name for o in owned_parameters(vlm, split) if o.role == Role.DECODER and o.name in linear]
    tensors = weight_names(vlm.model, decoder_part(split))
    for name in names:
        check_group_size(name, tensors[name].shape[-1], scheme)
    return sorted(names, key=lambda name: name == head)


def decoder_part(split: Split) -> DecoderPart:
    """The decoder's module."""
    part = split.parts[Role.DECODER].module
    if not isinstance(part, DecoderPart):
        raise TypeError(f"the decoder part holds a {type(part).__name__}")
    return part


def held_out_batches(vlm: VLM, options: CalibrationOptions, skip: int, count: int) -> tuple[list[Batch], list[str]]:
    """The `count` samples of `options` that follow the first `skip` (those that calibrate), and lines about them.

    Where there are too few, the last ones are taken although they calibrate too, and a line says so.
    """
    recipe = dataclasses.replace(resolve_recipe(options), samples=skip + count)
    found = load_samples(recipe)
    samples = found.samples[skip:]
    notes = [note for note in found.notes if "were asked for" not in note]
    if len(samples) < count:
        samples = found.samples[-count:]
        shared = len(samples) - max(len(found.samples) - skip, 0)
        if shared and skip:
            notes.append(f"{shared} of {len(samples)} held-out samples were calibrated on too: there are no others")
    return list(capture_batches(vlm, samples, recipe, notes)), notes


def module_effects(
    judge: Judge, weights: DecoderWeights, names: Sequence[str], progress: Progress
) -> tuple[ModuleEffect, ...]:
    """The effect of each of `names` alone, in the order of the layers; `judge` must be ready.

    Folds of `weights` are in place throughout: they do not change the function, but the codes were made for them.
    Layers before a module run once, for all of its layer.
    """
    effects: list[ModuleEffect] = []
    head = f"{module_path(judge.model, judge.part.head)}.weight"
    inside = [[n for n in names if n.startswith(f"{path}.")] for path in judge.paths]
    known = {name for layer in inside for name in layer}
    with (
        exchanged(judge.model, {name: weights.tensor(name) for name in weights.folds}),
        progress.stage("sensitivity", total=len(names)) as stage,
    ):
        hidden: list[torch.Tensor | None] = judge.inputs()

        def measure(group: Iterable[str], layer: int | None, first: int) -> None:
            for name in group:
                stage.advance(0, name.removesuffix(".weight"))
                found = judge.divergence({name: weights.quantized(name).dequantize()}, first, hidden)
                kind = name if layer is None else name.removeprefix(f"{judge.paths[layer]}.")
                size = weights.tensors[name].numel()
                effects.append(ModuleEffect(name, layer, kind.removesuffix(".weight"), size, found.kl, found.upper))
                stage.advance()

        measure([name for name in names if name not in known and name != head], None, 0)
        for index, group in enumerate(inside):
            measure(group, index, index)
            hidden = judge.advance(index, hidden)
        measure([name for name in names if name == head], None, len(inside))
    return tuple(effects)
