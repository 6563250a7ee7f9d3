"""Plots of a report: stacked bars, intervals, lines; maps are in `heat_map`.

Every one fits a column 400 pixels wide, prints on paper, and can be read without colour: parts carry their
numbers, lines differ in dashes and marks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from markupsafe import Markup

from mbq_export.evaluate.svg import (
    CHARACTER,
    WIDTH,
    Drawing,
    Scale,
    drawing,
    element,
    label,
    legend,
    span_of,
)
from mbq_export.evaluate.wording import plain

COLOURS: Final = 6
DASHES: Final = ("", "6 3", "2 3", "8 3 2 3", "10 4", "1 4")
MARKS: Final = ("M-3-3h6v6h-6z", "M0-4L4 3H-4z", "M-3.5 0L0-3.5 3.5 0 0 3.5z", "M-3-3L3 3M3-3L-3 3")
MOST_MARKS: Final = 30
SAID: Final = 24
"""Values that the words for a plot list before they point to the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        label: Above it.
        parts: Name to size, none negative.
        note: Behind it, in place of the sum.
    """

    label: str
    parts: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """A value with the interval it may lie in."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve.

    Attributes:
        label: In the legend.
        points: (x, y), from left to right; a y of None leaves a gap.
        band: (x, low, high) around it; may be empty.
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float, float, float]] = ()


def stacked_bars(title: str, bars: Sequence[Bar], *, unit: str) -> Drawing:
    """Draw parts of a whole, one bar below the other."""
    names = list(dict.fromkeys(name for bar in bars for name in bar.parts))
    colours = {name: f"fill{index % COLOURS}" for index, name in enumerate(names)}
    shown, y = (
        legend({name: _square(colours[name]) for name in names}, y=12)
        if len(names) > 1
        else ([], 0.0)
    )
    sums = [sum(bar.parts.values()) for bar in bars]
    notes = [bar.note or f"{plain(total)} {unit}" for bar, total in zip(bars, sums, strict=True)]
    room = max((len(note) for note in notes), default=0) * CHARACTER + 8
    scale = Scale(low=0.0, high=max([*sums, 0.0]) or 1.0, start=0.0, end=WIDTH - room)
    for bar, note in zip(bars, notes, strict=True):
        shown.append(label(0, y + 14, bar.label, room=WIDTH))
        shown.append(_bar(bar, scale, colours, y=y + 19, unit=unit))
        shown.append(label(scale(sum(bar.parts.values())) + 6, y + 33, note, class_="strong"))
        y += 48
    said = [
        f"{bar.label}: {', '.join(f'{name} {plain(value)}' for name, value in bar.parts.items())}"
        for bar in bars
    ]
    return drawing(*shown, height=y, title=title, text=_words(said, unit))


def _bar(bar: Bar, scale: Scale, colours: Mapping[str, str], *, y: float, unit: str) -> Markup:
    drawn, start = [], 0.0
    for name, value in bar.parts.items():
        left, right = scale(start), scale(start + value)
        start += value
        tooltip = element("title", f"{name}: {plain(value, 4)} {unit}")
        box = element(
            "rect",
            tooltip,
            x=left,
            y=y,
            width=max(right - left, 0.5) if value else 0,
            height=19,
            class_=colours[name],
        )
        drawn.append(box)
        text = plain(value)
        if len(bar.parts) > 1 and right - left > len(text) * CHARACTER + 6:
            middle = (left + right) / 2
            drawn.append(
                label(middle, y + 14, text, text_anchor="middle", class_=f"on {colours[name]}")
            )
    return element("g", *drawn)


def intervals(
    title: str,
    ranges: Sequence[Range],
    *,
    unit: str,
    reference: float | None = None,
    log: bool = False,
) -> Drawing:
    """Draw values with their intervals, one below the other.

    Args:
        title: For the words.
        ranges: From top to bottom.
        unit: Of the values.
        reference: A value to compare with, drawn as a line; None draws none.
        log: For ratios: half and double are equally far from one. All values are positive then.
    """
    left, top, step = 150.0, 6.0, 21.0
    bottom = top + step * len(ranges)
    ends = [end for r in ranges for end in (r.low, r.high, r.value)]
    ends += [] if reference is None else [reference]
    low, high = (min(ends) / 1.2, max(ends) * 1.2) if log else span_of(ends)
    scale = Scale(low=low, high=high, start=left, end=WIDTH - 12.0, log=log)
    shown = _bottom_axis(scale, top=top, bottom=bottom, title=unit)
    if reference is not None:
        x = scale(reference)
        shown.append(element("line", x1=x, x2=x, y1=top, y2=bottom, class_="reference"))
    for index, each in enumerate(ranges):
        y = top + step * (index + 0.5)
        words = f"{plain(each.value, 4)} ({plain(each.low, 4)} to {plain(each.high, 4)})"
        shown += [
            label(0, y + 4, each.label, room=left - 10),
            element(
                "path",
                d=f"M{scale(each.low):.1f} {y:.1f}H{scale(each.high):.1f}",
                class_="line0 whisker",
            ),
            element(
                "circle",
                element("title", f"{each.label}: {words}"),
                cx=scale(each.value),
                cy=y,
                r=4.5,
                class_="fill0",
            ),
        ]
    said = [
        f"{r.label}: {plain(r.value, 4)}, from {plain(r.low, 4)} to {plain(r.high, 4)}"
        for r in ranges
    ]
    return drawing(*shown, height=bottom + 36, title=title, text=_words(said, unit))


def lines(
    title: str, curves: Sequence[Line], *, x_title: str, y_title: str, zero: bool = True
) -> Drawing:
    """Draw curves over a common axis, with bands around them.

    Args:
        title: For the words.
        curves: At least one point in all.
        x_title: Below the axis.
        y_title: Above the axis.
        zero: Begin the upright axis at zero.
    """
    marks = {curve.label: _sample(index) for index, curve in enumerate(curves)}
    shown, y = legend(marks, y=12)
    top, bottom, left = y + 22, y + 190, 44.0
    heights = [v for c in curves for _, v in c.points if v is not None]
    heights += [end for c in curves for _, low, high in c.band for end in (low, high)]
    places = [x for c in curves for x, _ in c.points]
    low, high = span_of(heights, zero=zero)
    up = Scale(low=low, high=high, start=bottom, end=top)
    first, last = (min(places), max(places)) if places else (0.0, 1.0)
    across = Scale(
        low=first, high=last if last > first else first + 1, start=left, end=WIDTH - 12.0
    )
    shown.append(label(0, y + 10, y_title, class_="axis"))
    for tick in up.ticks():
        shown.append(element("line", x1=left, x2=WIDTH, y1=up(tick), y2=up(tick), class_="grid"))
        shown.append(label(left - 6, up(tick) + 4, plain(tick), text_anchor="end", class_="axis"))
    shown += _bottom_axis(across, top=bottom, bottom=bottom, title=x_title)
    for index, curve in enumerate(curves):
        shown.append(_curve(curve, across, up, index))
    said = [f"{c.label}: {_course(c)}" for c in curves]
    return drawing(*shown, height=bottom + 36, title=title, text=_words(said, ""))


def _curve(curve: Line, across: Scale, up: Scale, index: int) -> Markup:
    colour = index % COLOURS
    drawn = []
    if curve.band:
        there = [f"{across(x):.1f} {up(high):.1f}" for x, _, high in curve.band]
        back = [f"{across(x):.1f} {up(low):.1f}" for x, low, _ in reversed(curve.band)]
        drawn.append(element("path", d=f"M{'L'.join(there + back)}z", class_=f"fill{colour} band"))
    for missing, piece in groupby(curve.points, key=lambda point: point[1] is None):
        if not missing:
            places = "L".join(f"{across(x):.1f} {up(y or 0.0):.1f}" for x, y in piece)
            drawn.append(
                element(
                    "path",
                    d=f"M{places}",
                    class_=f"line{colour}",
                    stroke_dasharray=DASHES[index % len(DASHES)] or None,
                )
            )
    points = [(x, y) for x, y in curve.points if y is not None]
    if len(points) <= MOST_MARKS:
        drawn += [
            element(
                "path",
                element("title", f"{curve.label}, {plain(x)}: {plain(y, 4)}"),
                d=MARKS[index % len(MARKS)],
                transform=f"translate({across(x):.1f} {up(y):.1f})",
                class_=f"mark{colour}",
            )
            for x, y in points
        ]
    return element("g", *drawn)


def _bottom_axis(scale: Scale, *, top: float, bottom: float, title: str) -> list[Markup]:
    drawn = [element("line", x1=scale.start, x2=scale.end, y1=bottom, y2=bottom, class_="grid")]
    for tick in scale.ticks():
        x = scale(tick)
        drawn.append(element("line", x1=x, x2=x, y1=top, y2=bottom + 4, class_="grid"))
        drawn.append(label(x, bottom + 16, plain(tick), text_anchor="middle", class_="axis"))
    middle = (scale.start + scale.end) / 2
    drawn.append(label(middle, bottom + 31, title, text_anchor="middle", class_="axis"))
    return drawn


def _square(colour: str) -> Markup:
    return element("rect", x=1, y=-6, width=12, height=12, rx=2, class_=colour)


def _sample(index: int) -> Markup:
    dashes = DASHES[index % len(DASHES)] or None
    stroke = element("path", d="M0 0H16", class_=f"line{index % COLOURS}", stroke_dasharray=dashes)
    mark = element(
        "path",
        d=MARKS[index % len(MARKS)],
        transform="translate(8 0)",
        class_=f"mark{index % COLOURS}",
    )
    return element("g", stroke, mark)


def _course(curve: Line) -> str:
    points = [(x, y) for x, y in curve.points if y is not None]
    if not points:
        return "no values"
    if len(points) <= SAID // 2:
        return ", ".join(f"{plain(y)} at {plain(x)}" for x, y in points)
    (_, least), (_, most) = (pick(points, key=lambda p: p[1]) for pick in (min, max))
    return f"{len(points)} values from {plain(least)} to {plain(most)}"


def _words(said: Sequence[str], unit: str) -> str:
    more = f"; {len(said) - SAID} more are in the table" if len(said) > SAID else ""
    return f"{f'In {unit}. ' if unit else ''}{'; '.join(said[:SAID])}{more}."
