"""Shades grow with values; what is missing, not finite or beyond the limit can be told apart."""

import math
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbq_export.evaluate.heat_map import FAINTEST, Grid, heat_map, shade_of
from mbq_export.evaluate.svg import WIDTH

GRID = Grid(
    rows=["vision", "answer"],
    columns=["0", "1", "2"],
    values=[[1e-6, 1e-4, None], [0.0, math.nan, 2e-3]],
    limit=1e-3,
)


def cells(grid: Grid) -> dict[str, str]:
    """What a tooltip says, up to the colon, to the classes of its cell."""
    svg = ET.fromstring(heat_map("Errors", grid).svg)
    return {
        title.partition(":")[0]: rect.attrib["class"]
        for group in svg.iter("g")
        if (title := group.findtext("title"))
        and (rect := next(group.iter("rect"), None)) is not None
    }


def test_cells_tell_missing_values_and_those_beyond_the_limit_apart() -> None:
    assert cells(GRID) == {
        "vision, 0": "heat",
        "vision, 1": "heat",
        "vision, 2": "empty",
        "answer, 0": "heat",
        "answer, 1": "heat beyond",
        "answer, 2": "heat beyond",
    }


def test_the_words_name_the_ends_the_limit_and_the_worst_place() -> None:
    assert heat_map("Errors", GRID).text == (
        "5 values from 0 to 0.002, limit 0.001, the largest at answer, 1."
    )


def test_values_far_below_the_limit_are_faint() -> None:
    values = [[1e-6, 2e-6]]
    alone = heat_map("x", Grid(rows=["a"], columns=["0", "1"], values=values))
    gated = heat_map("x", Grid(rows=["a"], columns=["0", "1"], values=values, limit=1.0))
    assert 'fill-opacity="1"' in alone.svg
    assert 'fill-opacity="1"' not in gated.svg


def test_numbers_stand_in_cells_with_room_and_not_in_others() -> None:
    def written(columns: int) -> int:
        names = [str(column) for column in range(columns)]
        grid = Grid(rows=["a"], columns=names, values=[[0.5] * columns])
        return heat_map("x", grid).svg.count(">0.5</text>")

    assert written(3) == 3
    assert written(80) == 0


def test_a_map_of_eighty_layers_fits_the_sheet_and_names_some_columns() -> None:
    names = [str(column) for column in range(80)]
    svg = ET.fromstring(heat_map("x", Grid(rows=["a"], columns=names, values=[[1.0] * 80])).svg)
    places = [float(text.attrib["x"]) for text in svg.iter("text")]
    assert max(places) <= WIDTH
    assert 5 <= len(places) <= 40


def test_an_empty_map_is_drawn() -> None:
    assert (
        heat_map("x", Grid(rows=[], columns=[], values=[])).text == "0 values none of them finite."
    )


@pytest.mark.parametrize("log", [True, False])
@given(values=st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=10))
def test_a_larger_value_is_never_fainter(log: bool, values: list[float]) -> None:
    shade = shade_of(values, log=log)
    shades = [shade(value) for value in sorted(values)]
    assert shades == sorted(shades)
    assert all(FAINTEST <= each <= 1 for each in shades)


def test_what_is_not_finite_is_darkest() -> None:
    assert shade_of([1.0, 2.0], log=True)(math.nan) == 1.0
