"""Elements escape what they are given; scales put values where they belong."""

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from mbq_export.evaluate.svg import (
    WIDTH,
    Scale,
    drawing,
    element,
    label,
    legend,
    shortened,
    span_of,
)
from tests.evaluate.reported import HOSTILE


def test_text_and_attributes_are_escaped() -> None:
    written = element("text", HOSTILE, aria_label=HOSTILE, x=1.0)
    parsed = ET.fromstring(written)
    assert parsed.text == HOSTILE
    assert parsed.attrib == {"aria-label": HOSTILE, "x": "1"}
    assert "<script" not in written


def test_elements_inside_elements_are_kept() -> None:
    assert element("g", element("title", "a & b")) == "<g><title>a &amp; b</title></g>"


def test_attributes_without_a_value_are_left_out() -> None:
    assert (
        element("path", d=None, class_="line0", width=2.50001)
        == '<path class="line0" width="2.5"></path>'
    )


def test_characters_that_no_document_may_hold_are_blanked() -> None:
    assert element("text", "a\x00\ud800b") == "<text>a b</text>"


def test_a_drawing_is_labelled_and_scales_with_its_column() -> None:
    found = drawing(Markup("<g></g>"), height=10.2, title="Times", text="a: 1.")
    parsed = ET.fromstring(found.svg)
    assert parsed.attrib == {
        "viewBox": f"0 0 {WIDTH} 11",
        "role": "img",
        "aria-label": "Times. a: 1.",
    }
    assert found.text == "a: 1."


def test_a_long_label_is_cut_in_the_middle_and_whole_in_its_tooltip() -> None:
    parsed = ET.fromstring(label(0, 0, "model.language_model.layers", room=67))
    assert parsed.text == "mode…ayers"
    assert parsed.findtext("title") == "model.language_model.layers"


@given(st.text(max_size=60), st.floats(0, 300))
def test_cut_text_fits_its_room(text: str, room: float) -> None:
    assert len(shortened(text, room)) <= max(3, room / 6.7)


def test_a_scale_maps_its_ends() -> None:
    scale = Scale(low=2.0, high=4.0, start=100.0, end=0.0)
    assert [scale(2.0), scale(3.0), scale(4.0)] == [100.0, 50.0, 0.0]
    assert Scale(low=0.0, high=10.0, start=0.0, end=1.0).ticks() == [0, 2, 4, 6, 8, 10]


def test_half_and_double_are_equally_far_from_one_on_a_logarithmic_scale() -> None:
    scale = Scale(low=0.5, high=2.0, start=0.0, end=100.0, log=True)
    assert scale(1.0) == pytest.approx(50.0)
    assert scale.ticks() == [0.5, 1.0, 2.0]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low: float, span: float) -> None:
    scale = Scale(low=low, high=low + max(span, abs(low) * 1e-6), start=0.0, end=1.0)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 6
    assert all(-1e-6 <= scale(tick) <= 1 + 1e-6 for tick in ticks)


@given(st.floats(1e-6, 1e6), st.floats(1.2, 1e6))
def test_logarithmic_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    scale = Scale(low=low, high=low * ratio, start=0.0, end=1.0, log=True)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 5
    assert all(-1e-6 <= scale(tick) <= 1 + 1e-6 for tick in ticks)


@pytest.mark.parametrize("values", [[], [0.0], [3.0, 3.0], [-1.0, 5.0]], ids=str)
def test_an_axis_is_never_empty_and_holds_its_values(values: list[float]) -> None:
    low, high = span_of(values)
    assert low < high
    assert all(low <= value <= high for value in values)
    assert span_of(values, zero=True)[0] <= 0


def test_a_legend_breaks_its_lines() -> None:
    shown, below = legend({f"a rather long name {i}": Markup("<g></g>") for i in range(5)}, y=12)
    assert len(shown) == 10
    assert below > 12 + 4 * 8
