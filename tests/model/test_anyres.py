"""Packing of tiles, against the functions of transformers that it stands for."""

import numpy as np
import pytest
import torch
from transformers.models.llava_next import modeling_llava_next as reference

from vlmexport.errors import BadInputError
from vlmexport.model.anyres import AnyRes, _resized
from vlmexport.model.merge import MergeSpec
from vlmexport.model.pictures import EachPicture

RESOLUTIONS = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
ANYRES = AnyRes(RESOLUTIONS, tile=32, grid=4, newline=True)
SIZES = [(40, 80), (80, 40), (60, 60), (10, 90), (91, 13), (32, 64), (500, 333), (7, 7)]


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers(size: tuple[int, int]) -> None:
    wanted = reference.image_size_to_num_patches(list(size), [list(r) for r in RESOLUTIONS], 32)
    assert ANYRES.counts({"image_sizes": np.array([size])}) == [wanted]


def test_pictures_that_share_a_prompt_have_no_tiles_of_their_own() -> None:
    inputs = {"image_sizes": np.array([SIZES[0]] * 3), "batch_num_images": np.array([1, 2])}
    assert ANYRES.counts(inputs) == [3, 1, 1]


@pytest.mark.parametrize("shape", [(5, 9), (3, 4), (7, 2)])
def test_shrinking_is_torchs_bilinear(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).standard_normal((8, 10, 3)).astype(np.float32)
    chw = torch.from_numpy(picture).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(chw, shape, mode="bilinear")[0].permute(1, 2, 0).numpy()
    assert np.allclose(_resized(picture, *shape), wanted, atol=1e-6)


def test_padding_tiles_are_left_out_and_rows_must_fit() -> None:
    inputs = {"pixel_values": np.ones((2, 5, 3, 32, 32), np.float32), "image_sizes": np.array([SIZES[2], SIZES[0]])}
    assert ANYRES.tiles(inputs)["pixel_values"].shape == (8, 3, 32, 32)
    packed = ANYRES.pack(np.ones((8 * 16 + 1, 6), np.float32), inputs)
    assert packed.shape[1] == 6
    with pytest.raises(BadInputError, match="8 tiles of 16 features"):
        ANYRES.pack(np.ones((8 * 16, 6), np.float32), inputs)


def test_each_picture_is_cut_out_of_its_padding() -> None:
    inputs = {"pixel_values": np.ones((2, 3, 64, 48), np.float32), "image_sizes": np.array([[32, 48], [64, 16]])}
    shapes = [picture["pixel_values"].shape for picture in EachPicture(1).pictures(inputs)]
    assert shapes == [(1, 3, 32, 48), (1, 3, 64, 16)]
    with pytest.raises(BadInputError, match="2 pictures, image_sizes 1"):
        EachPicture(1).pictures({**inputs, "image_sizes": np.array([[32, 48]])})


def test_both_come_back_from_the_manifest() -> None:
    for spec in (MergeSpec(7, packing=ANYRES), MergeSpec(7, pictures=EachPicture(1))):
        assert MergeSpec.from_dict(spec.to_dict()) == spec
