import numpy as np

from vlmexport.runtime.pictures import without_padding_pictures


def inputs(*values: int) -> dict[str, np.ndarray]:
    """Pictures ``[1, n, 3, 2, 2]`` of one value each, their masks numbered, and an input that is not by picture."""
    pixels = np.stack([np.full((3, 2, 2), v, np.float32) for v in values])[None]
    masks = np.stack([np.full((2, 2), i) for i in range(len(values))])[None]
    return {"pixel_values": pixels, "pixel_attention_mask": masks, "other": np.arange(len(values))}


def test_pictures_of_zeros_go_with_their_masks() -> None:
    found = without_padding_pictures(inputs(1, 0, 2, 0))
    assert found["pixel_values"][0, :, 0, 0, 0].tolist() == [1, 2]
    assert found["pixel_attention_mask"][0, :, 0, 0].tolist() == [0, 2]
    assert found["other"].tolist() == [0, 1, 2, 3]


def test_one_value_that_is_not_zero_makes_a_picture_count() -> None:
    given = inputs(1, 0)
    given["pixel_values"][0, 1, 2, 1, 1] = -1e-6
    assert without_padding_pictures(given)["pixel_values"].shape[1] == 2


def test_the_first_picture_stays_where_all_are_zero() -> None:
    found = without_padding_pictures(inputs(0, 0, 0))
    assert found["pixel_attention_mask"][0, :, 0, 0].tolist() == [0]


def test_pictures_that_are_not_counted_by_prompt_all_stay() -> None:
    rows = {"pixel_values": np.zeros((2, 3, 4, 4), np.float32)}
    tiles = {"pixel_values": np.zeros((2, 5, 3, 4, 4), np.float32)}
    assert without_padding_pictures(rows)["pixel_values"].shape[0] == 2
    assert without_padding_pictures(tiles)["pixel_values"].shape[:2] == (2, 5)
    assert without_padding_pictures({}) == {}
