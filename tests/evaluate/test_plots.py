"""Plots show what they are told: sizes in proportion, gaps left open, nothing outside the sheet."""

import re
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_export.evaluate.plots import Bar, Line, Range, intervals, lines, stacked_bars
from mbq_export.evaluate.svg import WIDTH, Drawing

FINITE = st.floats(0, 1e12, allow_nan=False)


def parsed(found: Drawing) -> ET.Element:
    return ET.fromstring(found.svg)


def rectangles(found: Drawing) -> list[tuple[float, float]]:
    """Left edge and width of every bar, legend left out."""
    return [
        (float(r.attrib["x"]), float(r.attrib["width"]))
        for r in parsed(found).iter("rect")
        if "rx" not in r.attrib
    ]


def texts(found: Drawing) -> list[str]:
    return [text.text or "" for text in parsed(found).iter("text")]


def test_parts_of_a_bar_lie_one_behind_the_other_in_proportion() -> None:
    found = stacked_bars("Times", [Bar(label="w3", parts={"vit": 1.0, "decode": 3.0})], unit="ms")
    (first, width), (second, rest) = rectangles(found)
    assert first == 0
    assert second == pytest.approx(width, abs=0.01)
    assert rest == pytest.approx(3 * width, abs=0.05)
    assert "4 ms" in texts(found)
    assert found.text == "In ms. w3: vit 1, decode 3."


def test_the_longest_bar_and_its_number_fit_the_sheet() -> None:
    bars = [
        Bar(label="a", parts={"x": 5.0}, note="5,000,000 tokens"),
        Bar(label="b", parts={"x": 1.0}),
    ]
    found = stacked_bars("Tokens", bars, unit="")
    right = max(left + width for left, width in rectangles(found))
    assert right + 6 + 6.7 * len("5,000,000 tokens") <= WIDTH + 2


def test_a_single_part_needs_no_legend() -> None:
    found = stacked_bars("Share", [Bar(label="w3", parts={"share": 7.0})], unit="%")
    assert texts(found) == ["w3", "7 %"]


def test_bars_of_nothing_are_drawn() -> None:
    assert rectangles(stacked_bars("x", [Bar(label="a", parts={"b": 0.0})], unit="")) == [(0, 0)]
    assert stacked_bars("x", [], unit="").svg


def test_an_interval_reaches_from_its_low_to_its_high_end() -> None:
    ranges = [Range(label="a", value=2.0, low=1.0, high=3.0)]
    svg = parsed(intervals("Ratio", ranges, unit="x", reference=1.0))
    whisker = next(p for p in svg.iter("path") if "whisker" in p.attrib["class"])
    low, high = map(float, re.findall(r"M([\d.]+) [\d.]+H([\d.]+)", whisker.attrib["d"])[0])
    (circle,) = svg.iter("circle")
    assert float(circle.attrib["cx"]) == pytest.approx((low + high) / 2, abs=0.1)
    reference = next(line for line in svg.iter("line") if line.attrib["class"] == "reference")
    assert float(reference.attrib["x1"]) == pytest.approx(low, abs=0.1)


def test_half_and_double_are_drawn_equally_far_from_one() -> None:
    ranges = [Range(label=str(v), value=v, low=v, high=v) for v in (0.5, 1.0, 2.0)]
    svg = parsed(intervals("Ratio", ranges, unit="x", log=True))
    half, one, double = (float(c.attrib["cx"]) for c in svg.iter("circle"))
    assert one - half == pytest.approx(double - one, abs=0.1)


def test_a_missing_value_leaves_a_gap_in_its_line() -> None:
    curve = Line(label="a", points=[(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 2.0)])
    svg = parsed(lines("Ratio", [curve], x_title="layer", y_title=""))
    drawn = [
        p
        for p in svg.iter("path")
        if p.attrib["d"].count("L") == 1 and p.attrib["class"] == "line0"
    ]
    assert len(drawn) == 2
    assert (
        len(
            [p for p in svg.iter("path") if "transform" in p.attrib and p.find("title") is not None]
        )
        == 4
    )


def test_lines_differ_without_colour() -> None:
    curves = [Line(label=name, points=[(0, 1.0), (1, 2.0)]) for name in ("a", "b")]
    svg = parsed(lines("Ratio", curves, x_title="", y_title=""))
    dashes = {
        p.attrib.get("stroke-dasharray") for p in svg.iter("path") if "line" in p.attrib["class"]
    }
    assert len(dashes) == 2


def test_a_band_goes_there_and_back() -> None:
    curve = Line(label="a", points=[(0, 1.0), (1, 1.0)], band=[(0, 0.5, 1.5), (1, 0.8, 1.2)])
    svg = parsed(lines("Ratio", [curve], x_title="", y_title=""))
    (band,) = [p for p in svg.iter("path") if "band" in p.attrib["class"]]
    assert band.attrib["d"].count("L") == 3
    assert band.attrib["d"].endswith("z")


def test_long_courses_are_summed_up_in_words() -> None:
    curve = Line(label="itl", points=[(float(x), float(x * x)) for x in range(40)])
    assert lines("x", [curve], x_title="", y_title="").text == "itl: 40 values from 0 to 1,520."


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(FINITE, FINITE, FINITE), min_size=1, max_size=12))
def test_nothing_is_drawn_outside_the_sheet(numbers: list[tuple[float, float, float]]) -> None:
    bars = [Bar(label="b", parts={"x": a, "y": b, "z": c}) for a, b, c in numbers]
    ranges = [Range(label="r", value=sorted(n)[1], low=min(n), high=max(n)) for n in numbers]
    curve = Line(label="l", points=[(float(i), n[0]) for i, n in enumerate(numbers)])
    for found in (
        stacked_bars("t", bars, unit="ms"),
        intervals("t", ranges, unit="ms"),
        lines("t", [curve], x_title="x", y_title="y"),
    ):
        for mark in parsed(found).iter():
            for name in ("x", "x1", "x2", "cx"):
                assert -1 <= float(mark.attrib.get(name, 0)) <= WIDTH + 1
