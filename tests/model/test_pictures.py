"""Pictures given as rows of patches, cut into the grids that a tower takes one by one."""

from __future__ import annotations

import numpy as np
import pytest

from vlmexport.errors import BadInputError
from vlmexport.model.merge import MergeSpec
from vlmexport.model.pictures import EachPicture

PATCHES = EachPicture(0, patches=True)


def test_padded_rows_of_patches_are_cut_to_their_grids() -> None:
    pixels = np.arange(2 * 6 * 3).reshape(2, 6, 3)
    one, two = PATCHES.pictures({"pixel_values": pixels, "spatial_shapes": np.array([[2, 3], [1, 2]])})
    assert (one["pixel_values"].shape, two["pixel_values"].shape) == ((1, 3, 2, 3), (1, 3, 1, 2))
    assert one["pixel_values"][0, :, 1, 2].tolist() == pixels[0, 5].tolist()
    assert two["pixel_values"][0, :, 0, 1].tolist() == pixels[1, 1].tolist()
    with pytest.raises(BadInputError, match="spatial_shapes has a picture of 3 x 3 patches, pixel_values 6 of each"):
        PATCHES.pictures({"pixel_values": pixels, "spatial_shapes": np.array([[3, 3], [1, 2]])})
    with pytest.raises(BadInputError, match="pixel_values holds 2 pictures, spatial_shapes 1"):
        PATCHES.pictures({"pixel_values": pixels, "spatial_shapes": np.array([[2, 3]])})


def test_patches_of_all_pictures_in_one_row_are_cut_apart() -> None:
    pixels = np.arange(8 * 3).reshape(8, 3)
    one, two = PATCHES.pictures({"pixel_values": pixels, "image_grid_thw": np.array([[1, 2, 3], [1, 1, 2]])})
    assert one["pixel_values"].shape == (1, 3, 2, 3)
    assert two["pixel_values"][0, :, 0].T.tolist() == pixels[6:].tolist()
    for grid in ([[1, 2, 3]], [[2, 2, 2]]):
        with pytest.raises(BadInputError, match="pixel_values holds 8 patches, image_grid_thw"):
            PATCHES.pictures({"pixel_values": pixels, "image_grid_thw": np.array(grid)})


def test_their_features_are_joined_as_rows() -> None:
    features = [np.ones((1, 2, 3, 4)), np.zeros((1, 1, 2, 4))]
    assert PATCHES.join(features).sum(axis=1).tolist() == [4.0] * 6 + [0.0] * 2
    spec = MergeSpec(7, pictures=PATCHES)
    assert MergeSpec.from_dict(spec.to_dict()) == spec
