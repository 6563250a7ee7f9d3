"""Layout of pictures in tiles, with numbers a reader can check."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.image_processing_utils import select_best_resolution

from mbq_export.families.anyres import AnyResolution, best_resolution, bilinear, pack_grid

CANVASES = [[24, 24], [24, 48], [48, 24], [48, 48], [24, 72], [72, 24]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((24, 24), (24, 24)),
        ((100, 100), (48, 48)),
        ((10, 40), (24, 48)),
        ((10, 60), (24, 72)),
        ((60, 10), (72, 24)),
    ],
)
def test_canvas_keeps_most_of_the_picture_and_wastes_least(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert best_resolution(size, CANVASES) == expected


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), data=st.data())
def test_canvas_equals_the_choice_of_transformers(
    height: int, width: int, data: st.DataObject
) -> None:
    side = st.integers(1, 40).map(lambda n: 24 * n)
    canvases = data.draw(st.lists(st.tuples(side, side).map(list), min_size=1, max_size=12))
    assert best_resolution((height, width), canvases) == select_best_resolution(
        (height, width), canvases
    )


def test_tiles_become_one_picture_in_reading_order_with_a_newline_after_each_row() -> None:
    # Two tiles of 2 x 2 patches side by side: the picture's first row is 0 1 4 5.
    tiles = np.arange(8, dtype=np.float32).reshape(2, 4, 1)
    layout = AnyResolution(side=2, tile=16, pinpoints=[[16, 32]], most_tiles=9)
    rows = pack_grid(tiles, (16, 32), np.array([-1.0]), layout)
    assert rows[:, 0].tolist() == [0, 1, 4, 5, -1, 2, 3, 6, 7, -1]


def test_padding_is_cut_on_both_sides() -> None:
    # Half as high as wide, so of 4 rows of patches on a square canvas the first and the last are padding.
    tiles = np.arange(16, dtype=np.float32).reshape(1, 16, 1)
    layout = AnyResolution(side=4, tile=32, pinpoints=[[32, 32]], most_tiles=9)
    rows = pack_grid(tiles, (16, 32), np.array([-1.0]), layout)
    assert rows[:, 0].tolist() == [4, 5, 6, 7, -1, 8, 9, 10, 11, -1]


def test_a_grid_with_too_many_tokens_is_shrunk_to_about_the_limit() -> None:
    tiles = np.zeros((9, 16, 1), np.float32)
    layout = AnyResolution(side=4, tile=32, pinpoints=[[96, 96]], most_tiles=4)
    rows = pack_grid(tiles, (96, 96), np.array([0.0]), layout)
    assert len(rows) == 8 * (8 + 1)


def test_bilinear_halves_a_ramp_at_pixel_centres() -> None:
    ramp = np.arange(4, dtype=np.float32).reshape(1, 4, 1)
    assert bilinear(ramp, (1, 2))[0, :, 0].tolist() == [0.5, 2.5]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_bilinear_equals_torch(high: int, wide: int, to_high: int, to_wide: int) -> None:
    picture = np.random.default_rng(high).standard_normal((high, wide, 3)).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(picture).permute(2, 0, 1)[None], [to_high, to_wide], mode="bilinear"
    )
    found = bilinear(picture, (to_high, to_wide))
    np.testing.assert_allclose(found, expected[0].permute(1, 2, 0).numpy(), rtol=0, atol=3e-5)
