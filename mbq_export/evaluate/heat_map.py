"""Values by row and column as shades: errors by layer and modality, exponents by unit and layer.

Shades are opacities of one colour, so they work on light and dark pages. Numbers stand in the cells where there
is room and in every tooltip; a cell beyond the limit, or not finite, is framed.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from markupsafe import Markup

from mbq_export.evaluate.svg import CHARACTER, WIDTH, Drawing, drawing, element, label
from mbq_export.evaluate.wording import plain

ROW_HEIGHT: Final = 24.0
WIDEST_CELL: Final = 46.0
CELL_WITH_NUMBER: Final = 35.0
WIDEST_NAME: Final = 130.0
FAINTEST: Final = 0.07
DARK: Final = 0.75
"""Shade above which a number is written in the colour of the page."""

Shade = Callable[[float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Values of a heat map.

    Attributes:
        rows: Their names.
        columns: Their names.
        values: One list per row; None where nothing was measured, NaN is a finding.
        limit: Cells above it are framed.
        log: Shade by the logarithm.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    limit: float | None = None
    log: bool = True


def heat_map(title: str, grid: Grid) -> Drawing:
    """Draw a map, a row of the grid below the other."""
    left = min(max((len(row) for row in grid.rows), default=1) * CHARACTER + 8, WIDEST_NAME)
    width = min(WIDEST_CELL, (WIDTH - left) / max(len(grid.columns), 1))
    found = [value for row in grid.values for value in row if value is not None]
    # Beside a limit a shade says how near a value is to it, not which of many small ones is largest.
    ends = [] if grid.limit is None else [grid.limit]
    shade = shade_of([*ends, *(value for value in found if math.isfinite(value))], log=grid.log)
    shown = []
    for row, (name, values) in enumerate(zip(grid.rows, grid.values, strict=True)):
        shown.append(label(0, row * ROW_HEIGHT + 16, name, room=left - 6))
        for column, value in enumerate(values):
            said = f"{name}, {grid.columns[column]}: {_said(value, grid.limit)}"
            cell = _cell(value, shade, width=width, limit=grid.limit)
            place = f"translate({left + column * width:.2f} {row * ROW_HEIGHT:.0f})"
            shown.append(element("g", element("title", said), cell, transform=place))
    below = len(grid.rows) * ROW_HEIGHT + 15
    names = max((len(column) for column in grid.columns), default=1) * CHARACTER
    for column in range(0, len(grid.columns), max(math.ceil(names / width), 1)):
        middle = left + (column + 0.5) * width
        shown.append(
            label(middle, below, grid.columns[column], text_anchor="middle", class_="axis")
        )
    return drawing(*shown, height=below + 8, title=title, text=_summary(grid, found))


def shade_of(values: Sequence[float], *, log: bool) -> Shade:
    """Return what gives a value its opacity, `FAINTEST` to 1.

    Args:
        values: Finite; the smallest and the largest are the ends.
        log: Shade by the logarithm; what is not positive is faintest.
    """
    ends = [value for value in values if value > 0] if log else list(values)
    scale = math.log if log else float
    low, high = (scale(min(ends)), scale(max(ends))) if ends else (0.0, 0.0)

    def shade(value: float) -> float:
        if not math.isfinite(value):
            return 1.0
        if high == low or (log and value <= 0):
            return FAINTEST
        return round(FAINTEST + (1 - FAINTEST) * (scale(value) - low) / (high - low), 3)

    return shade


def _cell(value: float | None, shade: Shade, *, width: float, limit: float | None) -> Markup:
    size = {"x": 0.5, "y": 0.5, "width": max(width - 1, 0.5), "height": ROW_HEIGHT - 1}
    if value is None:
        return element("rect", **size, class_="empty")
    opacity = shade(value)
    kind = "heat beyond" if _beyond(value, limit) else "heat"
    box = element("rect", **size, class_=kind, fill_opacity=opacity)
    if width < CELL_WITH_NUMBER:
        return box
    tone = "small on" if opacity > DARK else "small"
    return element(
        "g", box, label(width / 2, 16, plain(value, 2), text_anchor="middle", class_=tone)
    )


def _beyond(value: float, limit: float | None) -> bool:
    return not math.isfinite(value) or (limit is not None and value > limit)


def _said(value: float | None, limit: float | None) -> str:
    if value is None:
        return "not measured"
    return plain(value, 4) + (", beyond the limit" if _beyond(value, limit) else "")


def _summary(grid: Grid, found: Sequence[float]) -> str:
    finite = [value for value in found if math.isfinite(value)]
    ends = f"from {plain(min(finite))} to {plain(max(finite))}" if finite else "none of them finite"
    limit = "" if grid.limit is None else f", limit {plain(grid.limit)}"
    return f"{len(found)} values {ends}{limit}{_worst(grid)}."


def _worst(grid: Grid) -> str:
    cells = [
        (value, row, column)
        for row, values in zip(grid.rows, grid.values, strict=True)
        for column, value in zip(grid.columns, values, strict=True)
        if value is not None
    ]
    if not cells:
        return ""
    _, row, column = max(cells, key=lambda cell: math.inf if math.isnan(cell[0]) else cell[0])
    return f", the largest at {row}, {column}"
