"""What a report says, before anybody decides whether it becomes HTML or Markdown.

    Document ── Verdict ...            the box on top
             └─ Section ── block ...   Note | Table | Figure | Missing

Sections hold plain text, as files and models spell it: whoever writes a form escapes it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from mbq_export.evaluate.svg import Drawing

GOOD: Final = "good"
BAD: Final = "bad"
UNSURE: Final = "unsure"
NEUTRAL: Final = ""

_NUMBER: Final = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ?[a-zA-Z%/]{1,6})?x?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Text that stands for a judgement: the tone repeats in colour what the text says."""

    text: str
    tone: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under a header.

    Attributes:
        header: Column names.
        rows: One cell per column.
        caption: What the table shows.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        """Refuse a row that does not fit the header (ValueError)."""
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{len(row)} cells under {len(self.header)} columns: {row}")

    @property
    def numeric(self) -> frozenset[int]:
        """Columns of numbers, which are set to the right."""
        return frozenset(
            column
            for column in range(len(self.header))
            if all(_is_number(row[column]) for row in self.rows)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing.

    Attributes:
        title: Above it.
        drawing: The drawing, with its words.
        numbers: What it shows, for those who want to copy it; also what Markdown shows. None where a table
            beside the figure has them.
        note: Below it: how to read it.
    """

    title: str
    drawing: Drawing
    numbers: Table | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A sentence."""

    text: str
    tone: str = NEUTRAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Something a reader may look for in vain."""

    what: str
    why: str

    @property
    def text(self) -> str:
        """The sentence that stands in its place."""
        return f"{self.what}: not measured: {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """Whom the following blocks of a section are about."""

    text: str


Block = Note | Table | Figure | Missing | Heading


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One chapter.

    Attributes:
        key: Anchor.
        title: Heading.
        blocks: Content, in order.
    """

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found about one input, in one line and a few more.

    Attributes:
        name: Bundle or result.
        headline: The judgement.
        tone: Its colour.
        lines: Reasons and limits.
    """

    name: str
    headline: str
    tone: str
    lines: tuple[Note, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A whole report.

    Attributes:
        title: Heading.
        verdicts: One per bundle and result.
        sections: In the order of reading.
        raw: File name to its JSON text, or to the reason why it is left out.
    """

    title: str
    verdicts: tuple[Verdict, ...]
    sections: tuple[Section, ...]
    raw: tuple[tuple[str, str], ...] = field(default=())


def table(
    header: Sequence[str], rows: Sequence[Sequence[str | Cell]], *, caption: str = ""
) -> Table:
    """Make a table of sequences."""
    return Table(header=tuple(header), rows=tuple(tuple(row) for row in rows), caption=caption)


def text_of(cell: str | Cell) -> str:
    """Text of a cell, whatever its tone."""
    return cell.text if isinstance(cell, Cell) else cell


def _is_number(cell: str | Cell) -> bool:
    text = text_of(cell)
    return not text or text in {"nan", "inf", "-inf"} or _NUMBER.fullmatch(text) is not None
