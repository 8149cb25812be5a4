"""Pictures given as rows of patches, cut into the grids that a tower takes one by one."""

from __future__ import annotations

import json

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


def test_patches_beside_each_other_are_cut_apart() -> None:
    strip = np.arange(3 * 2 * 12).reshape(1, 3, 2, 12)
    one, two = PATCHES.pictures({"pixel_values": strip, "target_sizes": np.array([[2, 2], [1, 2]])})
    assert (one["pixel_values"].shape, two["pixel_values"].shape) == ((1, 12, 2, 2), (1, 12, 1, 2))
    assert one["pixel_values"][0, :, 1, 0].tolist() == strip[0, :, :, 4:6].ravel().tolist()
    assert two["pixel_values"][0, :, 0, 1].tolist() == strip[0, :, :, 10:].ravel().tolist()
    with pytest.raises(BadInputError, match="pixel_values is 2 x 11, which are no patches of 2 x 2 beside each other"):
        PATCHES.pictures({"pixel_values": strip[..., :11], "target_sizes": np.array([[2, 2]])})
    with pytest.raises(BadInputError, match=r"pixel_values holds 6 patches, target_sizes \[\[1, 2, 2\]\]"):
        PATCHES.pictures({"pixel_values": strip, "target_sizes": np.array([[2, 2]])})


def test_patches_of_several_axes_are_rows() -> None:
    pixels = np.arange(4 * 3 * 2 * 2).reshape(4, 3, 2, 2)
    (one,) = PATCHES.pictures({"pixel_values": pixels, "image_grid_thw": np.array([[1, 2, 2]])})
    assert one["pixel_values"][0, :, 1, 1].tolist() == pixels[3].ravel().tolist()


def test_another_number_than_the_export_was_made_for_is_refused() -> None:
    how = EachPicture(0, patches=True, fixed=(("image_merge_sizes", 2),))
    given = {"pixel_values": np.zeros((4, 3)), "image_grid_thw": np.array([[1, 2, 2]])}
    assert len(how.pictures({**given, "image_merge_sizes": np.array([2])})) == 1
    with pytest.raises(BadInputError, match=r"image_merge_sizes is \[1\]; this export was made for 2 only"):
        how.pictures({**given, "image_merge_sizes": np.array([1])})
    spec = MergeSpec(7, pictures=how)
    assert MergeSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
