from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.tiny import make_tiny
from vlmexport.errors import UnsupportedModelError
from vlmexport.model.load import VLM, load_vlm
from vlmexport.split.axes import dynamic_dims
from vlmexport.split.examples import processor_examples
from vlmexport.split.parts import Part, Role
from vlmexport.split.vision import (
    flat_features,
    part_parameter_names,
    split_vision,
    unused_parameter_names,
    vision_inputs,
)

FAMILIES = ["tiny_idefics3", "tiny_llava", "tiny_vipllava"]


def _split(vlm: VLM) -> tuple[Part, Part, tuple[dict[str, torch.Tensor], ...]]:
    examples = processor_examples(vlm)
    return *split_vision(vlm, examples), examples


def _assert_exact(vlm: VLM, vision: Part, projector: Part, examples: tuple[dict[str, torch.Tensor], ...]) -> None:
    for example in examples:
        inputs = vision_inputs(vlm, example)
        with torch.no_grad():
            expected = flat_features(vlm, vlm.model.get_image_features(**inputs))
            rows = projector.module(vision_features=vision.module(**inputs))
        assert torch.equal(rows, expected)
        assert rows.shape[0] == int((example["input_ids"] == vlm.facts.image_token_id).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_then_projector_gives_the_models_features(family: str, request: pytest.FixtureRequest) -> None:
    vlm = load_vlm(str(request.getfixturevalue(family)))
    vision, projector, examples = _split(vlm)
    assert (vision.role, projector.role) == (Role.VISION_ENCODER, Role.PROJECTOR)
    assert [t.name for t in projector.signature.outputs] == ["image_features"]
    assert vision.signature.outputs == projector.signature.inputs
    _assert_exact(vlm, vision, projector, examples)


def test_a_bfloat16_checkpoint_splits_exactly(tmp_path: Path) -> None:
    vlm = load_vlm(str(make_tiny("idefics3", tmp_path / "m", dtype="bfloat16")))
    vision, projector, examples = _split(vlm)
    assert vision.signature.outputs[0].dtype == "float32"
    _assert_exact(vlm, vision, projector, examples)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_vision_parameter_is_in_one_part_or_unused(family: str, request: pytest.FixtureRequest) -> None:
    vlm = load_vlm(str(request.getfixturevalue(family)))
    vision, projector, _ = _split(vlm)
    groups = [
        part_parameter_names(vision),
        part_parameter_names(projector),
        unused_parameter_names(vlm, vision, projector),
    ]
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))
    language = {id(p) for p in vlm.model.get_decoder().parameters()}
    language |= {id(p) for p in vlm.model.get_output_embeddings().parameters()}
    expected = {name for name, p in vlm.model.named_parameters() if id(p) not in language}
    assert set(names) == expected
    for part in (vision, projector):
        inside = {part.prefix + name for name, _ in part.module.named_parameters()}
        assert set(part_parameter_names(part)) <= inside


def test_parameters_that_reach_no_feature_are_listed(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    vision, projector, _ = _split(vlm)
    unused = unused_parameter_names(vlm, vision, projector)
    assert "model.vision_tower.post_layernorm.weight" in unused
    assert "model.vision_tower.encoder.layers.2.mlp.fc1.weight" in unused
    assert not any(".layers.1." in name for name in unused)


def test_parameters_found_are_those_that_matter(tiny_vipllava: Path) -> None:
    vlm = load_vlm(str(tiny_vipllava))
    vision, projector, _ = _split(vlm)
    inputs = vision.examples[0]
    parameters = dict(vlm.model.named_parameters())
    with torch.no_grad():
        before = projector.module(vision_features=vision.module(**inputs))
        for name in unused_parameter_names(vlm, vision, projector):
            parameters[name].add_(1.0)
        assert torch.equal(before, projector.module(vision_features=vision.module(**inputs)))
        for name in (*part_parameter_names(vision), *part_parameter_names(projector)):
            # A bias on the keys adds the same to all scores of a query, which softmax takes away again.
            if name.endswith("k_proj.bias"):
                continue
            parameters[name].mul_(1.5)
            assert not torch.equal(before, projector.module(vision_features=vision.module(**inputs))), name
            parameters[name].div_(1.5)


def test_renamed_modules_still_split(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    base = vlm.model.base_model
    base.add_module("eyes", base._modules.pop("vision_tower"))
    base.add_module("glue", base._modules.pop("multi_modal_projector"))
    # The model's own code keeps working through properties, which are no modules.
    type(base).vision_tower = property(lambda self: self.eyes)
    type(base).multi_modal_projector = property(lambda self: self.glue)
    try:
        vision, projector, examples = _split(vlm)
        _assert_exact(vlm, vision, projector, examples)
        assert projector.prefix == "model.glue."
    finally:
        del type(base).vision_tower, type(base).multi_modal_projector


def test_features_packed_after_the_projector_are_refused(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load_vlm(str(tiny_llava))
    original = vlm.model.base_model.get_image_features

    def packed(pixel_values: torch.Tensor, **_: object) -> list[torch.Tensor]:
        rows = original(pixel_values).pooler_output
        return [torch.cat([r, r.new_zeros(1, r.shape[-1])]) for r in rows]

    monkeypatch.setattr(vlm.model.base_model, "get_image_features", packed)
    with pytest.raises(UnsupportedModelError, match="llava: no module computes the image features"):
        _split(vlm)


def test_features_changed_for_some_pictures_only_are_refused(tiny_llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load_vlm(str(tiny_llava))
    original = vlm.model.base_model.get_image_features

    def scaled(pixel_values: torch.Tensor, **_: object) -> torch.Tensor:
        rows = torch.cat(list(original(pixel_values).pooler_output))
        return rows if len(pixel_values) == 1 else rows * 1.5

    monkeypatch.setattr(vlm.model.base_model, "get_image_features", scaled)
    with pytest.raises(UnsupportedModelError, match=r"llava: the replayed projector differs .* by 3\.3"):
        _split(vlm)


def test_a_model_without_image_features_is_refused(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    blind = VLM(vlm.source, vlm.path, vlm.config, vlm.model.get_decoder(), vlm.facts)
    with pytest.raises(UnsupportedModelError, match="get_image_features"):
        vision_inputs(blind, {"pixel_values": torch.zeros(1)})


def test_axes_are_named_only_where_examples_differ() -> None:
    def example(images: int, height: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(images, 3, height, 32), "grid": torch.zeros(images, 2)}

    dims = dynamic_dims([example(1, 8), example(2, 8), example(3, 16)])
    assert dims == {"pixel_values": ("num_images", 3, "height", 32), "grid": ("num_images", 2)}
    assert dynamic_dims([example(1, 8)] * 2)["pixel_values"] == (1, 3, 8, 32)


def test_axes_of_another_rank_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="same rank"):
        dynamic_dims([{"x": torch.zeros(1, 2)}, {"x": torch.zeros(2)}])


def test_a_frozen_model_is_left_frozen(tiny_llava: Path) -> None:
    vlm = load_vlm(str(tiny_llava))
    vlm.model.requires_grad_(False)
    vision, _, _ = _split(vlm)
    assert part_parameter_names(vision)
    assert not any(p.requires_grad for p in vlm.model.parameters())
    assert isinstance(vision.module, nn.Module)
