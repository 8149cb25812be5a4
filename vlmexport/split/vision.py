"""The generic cut of the vision side: image encoder and projector, found by what they compute and never by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmexport.errors import UnsupportedModelError
from vlmexport.manifest import TensorSpec
from vlmexport.model.anyres import AnyRes
from vlmexport.model.pictures import SIZES, EachPicture
from vlmexport.split.axes import dynamic_dims
from vlmexport.split.decoder import text_decoder
from vlmexport.split.deepstack import deepstack_seen
from vlmexport.split.each import for_one_picture, joined, joining, single_pictures, takes_rows, takes_sizes
from vlmexport.split.features import FeatureCall, find_feature_call
from vlmexport.split.interception import Absorber, ProjectorCall, intercepted
from vlmexport.split.kept_rows import KeptRows, find_kept_rows
from vlmexport.split.names import module_path, weight_names
from vlmexport.split.parts import Part, Role, Signature
from vlmexport.split.tiles import Tiling, find_tiling
from vlmexport.split.usage import parameters_behind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vlmexport.model.load import VLM

Example = dict[str, torch.Tensor]
# Features of the replayed parts may differ from the model's by rounding only (largest difference over largest value).
REPLAY_LIMIT = 1e-6
_FEATURES = "vision_features"


class VisionPart(nn.Module):
    """A module that computes one side of the cut and has the parameters, under their names, of the module it wraps.

    `used` are the whole-model names of the parameters that reach its outputs; `outputs` names what it returns.
    """

    def __init__(self, wrapped: nn.Module, outputs: tuple[str, ...], used: tuple[str, ...]) -> None:
        super().__init__()
        # The very dictionaries of `wrapped`: names are equal, and a parameter swapped for a trace is swapped in both.
        self._parameters, self._buffers, self._modules = wrapped._parameters, wrapped._buffers, wrapped._modules
        self.outputs = outputs
        self.training = wrapped.training
        self.used = used


class VisionEncoder(VisionPart):
    """Processor outputs in (by name), the tensors that reach the projector out."""

    def __init__(
        self,
        model: PreTrainedModel,
        ask: FeatureCall,
        projector: nn.Module,
        outputs: tuple[str, ...],
        used: tuple[str, ...],
    ) -> None:
        super().__init__(model, outputs, used)
        # In tuples, so that they are not registered a second time.
        self._cut = (model, ask, projector)
        self.kept: KeptRows | None = None

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The projector's input tensors: one tensor, or a tuple in the order of `outputs`."""
        model, ask, projector = self._cut
        tensors = _projector_inputs(model, ask, projector, inputs)
        if self.kept is not None:
            tensors = tuple(self.kept.rows(tensor, inputs) for tensor in tensors)
        return tensors[0] if len(tensors) == 1 else tensors


class Projector(VisionPart):
    """The tensors that reach the projector in (by name), features ``[image_tokens, hidden]`` out.

    What comes in beside them are features for early decoder layers, which go out behind each row's own.
    """

    def __init__(
        self, projector: nn.Module, call: ProjectorCall, inputs: tuple[str, ...], used: tuple[str, ...]
    ) -> None:
        super().__init__(projector, ("image_features",), used)
        self.packing: AnyRes | None = None
        self.pictures: EachPicture | None = None
        self._projector = (projector,)
        self._call = call
        self._inputs = inputs

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Feature rows in the order of the image tokens."""
        tensors = [inputs[name] for name in self._inputs]
        args, kwargs = self._call.rebuild(tuple(tensors[: self._call.tensors]))
        features: torch.Tensor = self._projector[0](*args, **kwargs)
        features = features.reshape(-1, features.shape[-1])
        deepstack = tensors[self._call.tensors :]
        return torch.cat([features, *deepstack], dim=1) if deepstack else features

    @property
    def call(self) -> ProjectorCall:
        """How the model calls its own projector."""
        return self._call

    @property
    def wrapped(self) -> nn.Module:
        """The model's own projector."""
        return self._projector[0]


class TileProjector(Projector):
    """A projector of tiles, which are packed afterwards: with the row that ends a line, when there is one, as the last.

    Its parameters have their whole-model names.
    """

    def __init__(self, model: PreTrainedModel, projector: Projector, tiling: Tiling) -> None:
        super().__init__(projector.wrapped, projector._call, projector._inputs, projector.used)
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.used = (*self.used, *tiling.newline_name(model))
        self.packing = tiling.anyres
        self._tiling = (tiling,)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Feature rows of all tiles, then the row that ends a line."""
        rows, newline = super().forward(**inputs), self._tiling[0].newline
        return rows if newline is None else torch.cat([rows, newline[None].to(rows.dtype)])


def split_vision(vlm: VLM, examples: tuple[Example, ...]) -> tuple[Part, Part]:
    """Cut the vision side of `vlm` into its VISION_ENCODER and PROJECTOR parts, and prove them on all `examples`.

    `examples` are keyword inputs of the whole model. Raises `UnsupportedModelError` naming the family when there is no
    projector to be found, or when encoder and projector do not give the features that the model merges.
    """
    ask = find_feature_call(vlm.model, vlm.facts.image_token_id, examples[0])
    pixels = tuple({name: example[name] for name in ask.arguments} for example in examples)
    if takes_sizes(ask, pixels[0]):
        return _split_each(vlm, ask, pixels)
    packed = ask
    if (tiling := find_tiling(vlm, ask)) is not None:
        ask = tiling.unpacked(ask)
    projector = find_projector(vlm, ask, pixels[0])
    calls = [_record_call(vlm, ask, projector, example) for example in pixels]
    kept = _kept_rows(projector, pixels, calls)
    if kept is not None:
        calls = [_kept_call(kept, call, example) for call, example in zip(calls, pixels, strict=True)]
    names = tuple("vision_features" if i == 0 else f"vision_features_{i}" for i in range(len(calls[0].tensors)))
    _check_same_form(vlm, calls)
    hidden = tuple(dict(zip(names, call.tensors, strict=True)) for call in calls)
    for example, call in zip(hidden, calls, strict=True):
        _check_features(vlm, Projector(projector, call.form, names, ()), example, call.features)
    encoder_names, projector_names = _used_parameters(vlm, ask, projector, pixels[0], calls[0])
    wrapper = Projector(projector, calls[0].form, names, projector_names)
    if tiling is not None:
        wrapper = TileProjector(vlm.model, wrapper, tiling)
        _check_packing(vlm, wrapper, tiling.anyres, packed, (pixels, hidden))
        ask, pixels = tiling.of_tiles(packed), tuple(tiling.tiles(example) for example in pixels)
    encoder = VisionEncoder(vlm.model, ask, projector, names, encoder_names)
    encoder.kept = kept
    # `calls` ran the same encoder on every example; one run of the wrapper (the costly side) checks how it is wired.
    _check_encoder(vlm, encoder, pixels[0], calls[0])
    return _parts(vlm, encoder, wrapper, pixels, hidden)


def _split_each(vlm: VLM, ask: FeatureCall, pixels: tuple[Example, ...]) -> tuple[Part, Part]:
    """`split_vision` for a tower that is run for one picture at a time, and a projector of all pictures' features."""
    one, pictures = for_one_picture(ask, pixels[0]), tuple(single_pictures(example) for example in pixels)
    every = tuple(picture for example in pictures for picture in example)
    projector, calls = _projector_of_each(vlm, one, every, rows=SIZES not in ask.arguments)
    tensors = [call.tensors[0] for call in calls]
    how = joining(tensors, patches=SIZES not in ask.arguments, example=pixels[0])
    if how is None or len(calls[0].tensors) != 1:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: what its image encoder makes of single pictures cannot be joined for the "
            f"projector: shapes {[tuple(t.shape) for t in tensors]}"
        )
    supply, hidden = iter(tensors), []
    for group in pictures:
        hidden.append({_FEATURES: joined([next(supply) for _ in group], how)})
    encoder_names, projector_names = _used_parameters(vlm, one, projector, every[0], calls[0])
    wrapper = Projector(projector, calls[0].form, (_FEATURES,), projector_names)
    wrapper.pictures = how
    for example, inner in zip(pixels, hidden, strict=True):
        with torch.no_grad():
            expected = flat_features(vlm, ask(example))
        _check_features(vlm, wrapper, inner, expected)
    encoder = VisionEncoder(vlm.model, one, projector, (_FEATURES,), encoder_names)
    _check_encoder(vlm, encoder, every[0], calls[0])
    singles = tuple({_FEATURES: tensor} for tensor in tensors)
    vision, _ = _parts(vlm, encoder, wrapper, every, singles)
    _, part = _parts(vlm, encoder, wrapper, tuple(hidden), tuple(hidden))
    return vision, part


def _projector_of_each(
    vlm: VLM, ask: FeatureCall, pictures: tuple[Example, ...], *, rows: bool
) -> tuple[nn.Module, list[_Call]]:
    """The outermost module that can be the projector of every picture, and how it is called for each.

    One that is told the picture's size cannot: it belongs to the encoder, but for what it calls last. With `rows` it
    must also take features as rows, which have lost the picture's shape.
    """
    refusal: UnsupportedModelError | None = None
    for projector in reversed(_projectors(vlm, ask, pictures[0])):
        if rows and not takes_rows(projector, _record_call(vlm, ask, projector, pictures[0]).tensors):
            continue
        calls = [_record_call(vlm, ask, projector, picture) for picture in pictures]
        try:
            _check_same_form(vlm, calls)
        except UnsupportedModelError as error:
            refusal = refusal or error
        else:
            return projector, calls
    raise refusal or UnsupportedModelError(f"{vlm.facts.model_type}: no module makes the features of every picture")


def part_parameter_names(part: Part) -> tuple[str, ...]:
    """Whole-model names of the parameters that a vision-side part computes with, in the model's order."""
    return _vision_part(part).used


def unused_parameter_names(vlm: VLM, vision: Part, projector: Part) -> tuple[str, ...]:
    """Parameters that reach no feature of a picture, so that no graph holds them.

    Those of the image encoder and the projector, and of children of the model that have nothing of its text: towers
    for videos or sounds, and what makes pictures.
    """
    used = {*part_parameter_names(vision), *part_parameter_names(projector)}
    encoder = _image_encoder(vlm.model)
    inside = {} if encoder is None else weight_names(vlm.model, encoder)
    if isinstance(projector.module, Projector):
        inside |= weight_names(vlm.model, projector.module.wrapped)
    inside |= _other_towers(vlm.model)
    return tuple(name for name in inside if name not in used)


def _other_towers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters by name of those children of `model` and its base model in which nothing serves text."""
    of_text: set[int] = set()
    for module in (text_decoder(model), model.get_input_embeddings(), model.get_output_embeddings()):
        of_text |= {id(p) for p in module.parameters()}
    children = [child for owner in (model.base_model, model) for child in owner.children()]
    strangers = [child for child in children if not any(id(p) in of_text for p in child.parameters())]
    return {name: tensor for child in strangers for name, tensor in weight_names(model, child).items()}


def vision_inputs(vlm: VLM, example: Example) -> Example:
    """Those of the whole model's inputs that ``get_image_features`` is given."""
    ask = find_feature_call(vlm.model, vlm.facts.image_token_id, example)
    return {name: example[name] for name in ask.arguments}


def flat_features(vlm: VLM, result: Any) -> torch.Tensor:
    """The features that ``get_image_features`` returned, as rows ``[image_tokens, hidden]``."""
    features = result if isinstance(result, torch.Tensor | list | tuple) else getattr(result, "pooler_output", None)
    rows = [features] if isinstance(features, torch.Tensor) else features
    if not rows or not all(isinstance(r, torch.Tensor) and r.shape[-1] == vlm.facts.hidden_size for r in rows):
        where = "in pooler_output" if features is None else f"of the text width {vlm.facts.hidden_size}"
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: get_image_features gives no rows {where}; such models are not supported yet"
        )
    return torch.cat([r.reshape(-1, r.shape[-1]) for r in rows])


def find_projector(vlm: VLM, ask: FeatureCall, inputs: Example) -> nn.Module:
    """The outermost module below the image encoder's side whose output is the features, row for row."""
    return _projectors(vlm, ask, inputs)[-1]


def _projectors(vlm: VLM, ask: FeatureCall, inputs: Example) -> list[nn.Module]:
    """All modules whose output is the features; of nested ones the outermost is the last."""
    seen: list[tuple[nn.Module, torch.Tensor]] = []

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.shape[-1:] == (vlm.facts.hidden_size,):
            seen.append((module, output))

    handles = [module.register_forward_hook(keep) for module in vlm.model.modules()]
    try:
        with torch.no_grad():
            features = flat_features(vlm, ask(inputs))
    finally:
        for handle in handles:
            handle.remove()
    encoder = _image_encoder(vlm.model)
    around_encoder = {id(m) for m in vlm.model.modules() if encoder is not None and encoder in set(m.modules())}
    exact = [m for m, out in seen if id(m) not in around_encoder and _same_rows(out, features)]
    # Hooks fire on the way out.
    if not exact:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: no module computes the image features that get_image_features returns (they are "
            "packed or changed after the projector); this family needs a family module"
        )
    return exact


def _same_rows(output: torch.Tensor, features: torch.Tensor) -> bool:
    return output.numel() == features.numel() and torch.equal(output.reshape(features.shape), features)


def _image_encoder(model: PreTrainedModel) -> nn.Module | None:
    encoder: nn.Module = model.get_encoder("image")
    return None if encoder in (model, model.base_model) else encoder


@dataclass(frozen=True)
class _Call:
    form: ProjectorCall
    tensors: tuple[torch.Tensor, ...]
    features: torch.Tensor


def _record_call(vlm: VLM, ask: FeatureCall, projector: nn.Module, inputs: Example) -> _Call:
    """Run the vision side once and keep what reached the projector and what the model made of it."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    handle = projector.register_forward_hook(lambda _m, a, k, out: seen.append((a, k, out)), with_kwargs=True)
    try:
        with torch.no_grad(), deepstack_seen(vlm.model) as deepstack:
            features = flat_features(vlm, ask(inputs))
    finally:
        handle.remove()
    # A table of features may be read again for something else, which has rows of its own.
    made = [isinstance(out, torch.Tensor) and _same_rows(out, features) for _, _, out in seen]
    if len(seen) != 1 and made != [True, *(False for _ in seen[1:])]:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the projector ran {len(seen)} times for one prompt, expected 1"
        )
    form, tensors = ProjectorCall.of(*seen[0][:2])
    return _Call(form, (*tensors, *deepstack), torch.cat([features, *deepstack], dim=1) if deepstack else features)


def _kept_rows(projector: nn.Module, pixels: tuple[Example, ...], calls: list[_Call]) -> KeptRows | None:
    """What `find_kept_rows` finds for a projector of one tensor with rows for all patches; None for others."""
    if any(len(call.tensors) != 1 or call.tensors[0].ndim != len("NPW") for call in calls):
        return None
    made = []
    for call in calls:
        args, kwargs = call.form.rebuild(call.tensors)
        with torch.no_grad():
            made.append(projector(*args, **kwargs))
    return find_kept_rows(pixels, made, [call.features for call in calls])


def _kept_call(kept: KeptRows, call: _Call, example: Example) -> _Call:
    return dataclasses.replace(call, tensors=tuple(kept.rows(tensor, example) for tensor in call.tensors))


def _projector_inputs(
    model: PreTrainedModel, ask: FeatureCall, projector: nn.Module, inputs: Example
) -> tuple[torch.Tensor, ...]:
    """The tensors that reach the projector, and what the encoder gives for early decoder layers."""
    with intercepted(projector) as calls, deepstack_seen(model, Absorber()) as deepstack:
        ask(inputs)
    return (*ProjectorCall.of(*calls[0])[1], *deepstack)


def _used_parameters(
    vlm: VLM, ask: FeatureCall, projector: nn.Module, inputs: Example, call: _Call
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Whole-model names of the parameters behind the projector's inputs, and of those it adds itself."""
    model = vlm.model

    def encode() -> tuple[torch.Tensor, ...]:
        return _projector_inputs(model, ask, projector, inputs)

    def project() -> tuple[torch.Tensor, ...]:
        args, kwargs = call.form.rebuild(call.tensors[: call.form.tensors])
        return (projector(*args, **kwargs),)

    encoder_names, projector_names = parameters_behind(model, encode), parameters_behind(model, project)
    if both := sorted(set(encoder_names) & set(projector_names)):
        raise UnsupportedModelError(f"{vlm.facts.model_type}: encoder and projector share the parameters {both}")
    return encoder_names, projector_names


def _check_same_form(vlm: VLM, calls: list[_Call]) -> None:
    for call in calls[1:]:
        if call.form != calls[0].form:
            raise UnsupportedModelError(
                f"{vlm.facts.model_type}: the projector is called with {call.form.leaves} for one picture and "
                f"{calls[0].form.leaves} for another; arguments that depend on the picture must be tensors"
            )


def _check_features(vlm: VLM, projector: Projector, hidden: Example, expected: torch.Tensor) -> None:
    with torch.no_grad():
        got = projector(**hidden)
    if got.shape != expected.shape:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the projector gives {got.shape[0]} rows, the model's features have "
            f"{expected.shape[0]} (they are packed after the projector); this family needs a family module"
        )
    _refuse_difference(vlm, "projector", got, expected)


def projector_packing(projector: Part) -> AnyRes | None:
    """How the rows of a PROJECTOR part are packed; None for rows that are merged as they are."""
    return projector.module.packing if isinstance(projector.module, Projector) else None


def projector_pictures(projector: Part) -> EachPicture | None:
    """How features of single pictures are joined for a PROJECTOR part; None when the encoder takes all at once."""
    return projector.module.pictures if isinstance(projector.module, Projector) else None


def packed_features(projector: Part, rows: torch.Tensor, example: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The projector's `rows` as they are merged; `example` is what the processor made. Packed ones are float32."""
    packing = projector_packing(projector)
    return rows if packing is None else _pack(packing, rows, example)


def _pack(packing: AnyRes, rows: torch.Tensor, example: Mapping[str, torch.Tensor]) -> torch.Tensor:
    arrays = {name: tensor.numpy() for name, tensor in example.items() if not tensor.is_floating_point()}
    return torch.from_numpy(packing.pack(rows.float().numpy(), arrays))


def _check_packing(
    vlm: VLM,
    projector: Projector,
    packing: AnyRes,
    ask: FeatureCall,
    examples: tuple[tuple[Example, ...], tuple[Example, ...]],
) -> None:
    """`examples` are the processor's outputs, and what reaches the projector of them."""
    with torch.no_grad():
        for example, inner in zip(*examples, strict=True):
            wanted, got = flat_features(vlm, ask(example)), _pack(packing, projector(**inner), example)
            if got.shape != wanted.shape:
                raise UnsupportedModelError(
                    f"{vlm.facts.model_type}: {len(got)} packed feature rows, the model makes {len(wanted)}"
                )
            _refuse_difference(vlm, "packing", got, wanted)


def _check_encoder(vlm: VLM, encoder: VisionEncoder, inputs: Example, call: _Call) -> None:
    with torch.no_grad():
        got = encoder(**inputs)
    for one, expected in zip(got if isinstance(got, tuple) else (got,), call.tensors, strict=True):
        _refuse_difference(vlm, "image encoder", one, expected)


def _refuse_difference(vlm: VLM, what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = expected.float().abs().max().clamp_min(1e-12)
    difference = float((got.float() - expected.float()).abs().max() / scale)
    if not difference <= REPLAY_LIMIT:
        raise UnsupportedModelError(
            f"{vlm.facts.model_type}: the replayed {what} differs from the model's own features by {difference:.2e} "
            f"(limit {REPLAY_LIMIT:.0e}); this family needs a family module"
        )


def _parts(
    vlm: VLM, encoder: VisionEncoder, projector: Projector, pixels: tuple[Example, ...], hidden: tuple[Example, ...]
) -> tuple[Part, Part]:
    input_dims = dynamic_dims(pixels)
    dims = dynamic_dims([{**p, **h} for p, h in zip(pixels, hidden, strict=True)], input_dims)
    inputs = tuple(TensorSpec(name, _dtype(t), input_dims[name]) for name, t in pixels[0].items())
    middle = tuple(TensorSpec(name, _dtype(t), dims[name]) for name, t in hidden[0].items())
    levels = 1 + len(hidden[0]) - projector.call.tensors
    features = TensorSpec("image_features", "float32", ("image_tokens", levels * vlm.facts.hidden_size))
    prefix = "" if projector.packing is not None else module_path(vlm.model, projector.wrapped) + "."
    return (
        Part(Role.VISION_ENCODER, encoder, "", Signature(inputs, middle), pixels),
        Part(Role.PROJECTOR, projector, prefix, Signature(middle, (features,)), hidden),
    )


def _dtype(tensor: torch.Tensor) -> str:
    """The graph's dtype of a tensor: every float is float32, whatever the checkpoint computes in."""
    return "float32" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def _vision_part(part: Part) -> VisionPart:
    if not isinstance(part.module, VisionPart):
        raise TypeError(f"{part.role} is not a part of the vision side")
    return part.module
