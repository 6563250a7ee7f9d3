"""SVG as text: elements that escape what they are given, and scales from values to places.

Colours are classes (``fill0``, ``line0``, ``heat``), so that one drawing fits light and dark pages.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup, escape

from mbq_export.evaluate.wording import visible

WIDTH: Final = 380
"""Units across every drawing: on a narrow screen one unit is about one pixel."""

CHARACTER: Final = 6.7
"""Width of a character of a label, at most, for the usual sans-serif fonts."""

STEPS: Final = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One drawing with what it says in words.

    Attributes:
        svg: The ``svg`` element.
        text: The same for those who cannot see it.
    """

    svg: Markup
    text: str


def element(name: str, *inner: object, **attributes: object) -> Markup:
    """Write one element.

    Args:
        name: Its tag.
        inner: Text, which is escaped, and elements.
        attributes: ``class_`` stands for class, ``_`` for ``-``; numbers are rounded, None is left out.
    """
    written = Markup("").join(
        Markup('{}{}="{}"').format(" ", key.rstrip("_").replace("_", "-"), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    content = Markup("").join(
        part if isinstance(part, Markup) else escape(visible(str(part))) for part in inner
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, written, content)


def drawing(*inner: Markup, height: float, title: str, text: str) -> Drawing:
    """Put elements on a sheet `WIDTH` wide, labelled for screen readers."""
    svg = element(
        "svg",
        *inner,
        viewBox=f"0 0 {WIDTH} {math.ceil(height)}",
        role="img",
        aria_label=f"{title}. {text}",
    )
    return Drawing(svg=svg, text=text)


def label(
    x: float, y: float, text: str, *, room: float | None = None, **attributes: object
) -> Markup:
    """Write text, cut to the room it has; the whole text is its tooltip then."""
    cut = shortened(text, room)
    tooltip = (element("title", text),) if cut != text else ()
    return element("text", cut, *tooltip, x=x, y=y, **attributes)


def shortened(text: str, room: float | None) -> str:
    """Cut text in the middle, where names differ least, so that it is at most ``room`` wide."""
    fits = len(text) if room is None else max(3, int(room / CHARACTER))
    if len(text) <= fits:
        return text
    head = (fits - 1) // 2
    return f"{text[:head]}…{text[len(text) - (fits - 1 - head) :]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """From values to places along an axis.

    Attributes:
        low: Value at ``start``; positive on a logarithmic axis.
        high: Value at ``end``, more than ``low``.
        start: Place of ``low``.
        end: Place of ``high``.
        log: Equal ratios, not differences, are equally far apart.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Return round values within the scale, about ``most`` of them."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            round_ones = [step * 10.0**power for power in powers for step in (1, 2, 5)]
            inside = [value for value in round_ones if self.low <= value <= self.high]
            return inside[:: math.ceil(len(inside) / most)] if inside else [self.low]
        span = self.high - self.low
        unit = 10.0 ** math.floor(math.log10(span / most))
        step = next(unit * step for step in STEPS if span / (unit * step) <= most)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def span_of(values: list[float], *, zero: bool = False) -> tuple[float, float]:
    """Return the ends of an axis that shows values: a little more than they need, never empty.

    Args:
        values: Finite numbers; may be empty.
        zero: Begin at zero.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if zero:
        low = min(low, 0.0)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - margin), high + margin


def legend(names: Mapping[str, Markup], *, y: float) -> tuple[list[Markup], float]:
    """Write names with their marks, as many in a line as fit.

    Args:
        names: Name to its mark, drawn around (0, 0) and 14 wide.
        y: Base line of the first line.

    Returns:
        Elements, and the place below the last line.
    """
    found, x = [], 0.0
    for name, mark in names.items():
        room = min(len(name), 40) * CHARACTER + 34
        if x and x + room > WIDTH:
            x, y = 0.0, y + 17
        found.append(element("g", mark, transform=f"translate({_value(x)} {_value(y - 4)})"))
        found.append(label(x + 20, y, name, room=WIDTH - 30))
        x += room
    return found, y + 8


def _value(value: object) -> str:
    return (
        f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else visible(str(value))
    )
