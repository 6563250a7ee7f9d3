"""A report as one offline page, as Markdown, and as CSV.

What comes from files and models is text, never markup: HTML is escaped by the template engine, Markdown and
CSV here. The page has no script, loads nothing, and says so to the browser.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from itertools import groupby
from typing import Any, Final

import jinja2

from mbq_export.evaluate.document import (
    Block,
    Figure,
    Heading,
    Missing,
    Note,
    Table,
    text_of,
)
from mbq_export.evaluate.gathering import Found, Quality, Result
from mbq_export.evaluate.lookup import dig, entries, items, number, words
from mbq_export.evaluate.sections import document
from mbq_export.evaluate.wording import visible
from mbq_export.report import Check

PACKAGE: Final = "mbq_export.evaluate"
TEMPLATE: Final = "report.html.j2"
STYLE: Final = "report.css"

CSV_HEADER: Final = ("source", "subject", "test", "statistic", "unit", "value", "why")
FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")
"""First characters that make spreadsheets run a cell."""

_MARKDOWN: Final = re.compile(r"([\\`*\[\]|~#])")

Cells = tuple[str, str, str, str, str, float | int | None, str]
"""One line of CSV, as in `CSV_HEADER`."""


def as_html(found: Found, *, title: str) -> str:
    """Return one self-contained page.

    Args:
        found: Bundles and results.
        title: Heading.
    """
    return _template().render(document=document(found, title=title))


def as_markdown(found: Found, *, title: str) -> str:
    """Return the same content in Markdown, figures as tables of their numbers."""
    told = document(found, title=title)
    parts = [f"# {_escaped(told.title)}"]
    for verdict in told.verdicts:
        parts.append(f"**{_escaped(verdict.name)}: {_escaped(verdict.headline)}**")
        parts.append("\n".join(f"- {_escaped(line.text)}" for line in verdict.lines))
    for section in told.sections:
        parts.append(f"## {section.title}")
        parts += [_markdown(block) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_csv(found: Found, *, title: str) -> str:  # noqa: ARG001 - the forms share a signature
    """Return one line per test and statistic; cells that a spreadsheet would run begin with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for result in found.results:
        writer.writerows(map(_safe, _lines(result)))
    for quality in found.qualities:
        writer.writerows(map(_safe, _quality_lines(quality)))
    return text.getvalue()


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"### {_escaped(block.text)}"
        case Missing():
            return f"*{_escaped(block.text)}*"
        case Figure():
            return _markdown_figure(block)
        case Table():
            above = f"**{_escaped(block.caption)}**\n\n" if block.caption else ""
            return above + _markdown_table(block)
        case Note():
            return _escaped(block.text)


def _markdown_figure(found: Figure) -> str:
    """The numbers of a figure; its words where a table nearby has the numbers."""
    title, note = f"**{_escaped(found.title)}**", _escaped(found.note)
    if found.numbers is None:
        return f"{title}: {_escaped(found.drawing.text)} {note}".rstrip()
    return "\n\n".join(filter(None, [title, _markdown_table(found.numbers), note]))


def _markdown_table(found: Table) -> str:
    numeric = found.numeric
    marks = ["---:" if column in numeric else "---" for column in range(len(found.header))]
    rows = [
        [_escaped(name) for name in found.header],
        marks,
        *([_escaped(text_of(value)) for value in row] for row in found.rows),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _escaped(text: str) -> str:
    """Text that Markdown takes for text: no markup, no HTML, one line."""
    plain = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", plain)


def _safe(cells: Iterable[str | float | None]) -> list[str | float | None]:
    return [_harmless(visible(cell)) if isinstance(cell, str) else cell for cell in cells]


def _harmless(text: str) -> str:
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text


def _lines(result: Result) -> Iterator[Cells]:
    """Every statistic of every measurement, then every check."""
    about = words(dig(result.report.context, "bundle"))
    for measurement in result.report.measurements:
        first, _, rest = measurement.name.partition("/")
        subject, test = (
            (first, rest) if result.report.kind == "bench" else (about, measurement.name)
        )
        where = (result.name, subject, test)
        spread = measurement.spread
        if spread is None:
            yield *where, "value", measurement.unit, measurement.value, measurement.why
            continue
        for key, value in spread.as_json("").items():
            if not key.endswith("_why"):
                unit = "" if key in {"count", "cov_percent"} else measurement.unit
                why = "" if value is not None else words(spread.as_json("").get(f"{key}_why"))
                yield *where, key, unit, value, why
    for check in result.report.checks:
        yield from _check_lines(result.name, about, check)


def _check_lines(source: str, subject: str, check: Check) -> Iterator[Cells]:
    test = " ".join(filter(None, [check.tier, check.name, check.modality]))
    verdict = None if check.ok is None else int(check.ok)
    yield source, subject, test, "value", "", check.value, check.place
    yield source, subject, test, "threshold", "", check.threshold, ""
    yield source, subject, test, "pass", "", verdict, check.why


def _quality_lines(quality: Quality) -> Iterator[Cells]:
    for row in items(quality.content.get("rows")):
        model = " ".join(
            words(row.get(key)) for key in ("model", "variant", "method", "format", "draw")
        )
        found: dict[tuple[str, str], Any] = {
            ("accuracy", end): dig(row, "accuracy", end) for end in ("value", "low", "high")
        }
        for modality, distance in entries(row.get("kl")).items():
            found |= {
                (f"KL {modality}", end): dig(distance, "mean", end)
                for end in ("value", "low", "high")
            }
        for (test, statistic), value in found.items():
            unit = "nats" if test.startswith("KL") else ""
            yield quality.name, model, test, statistic, unit, number(value), ""


def _runs(blocks: Iterable[Block]) -> list[tuple[str, list[Block]]]:
    """Blocks with their neighbours of the same kind: figures stand side by side."""
    return [(kind.__name__, list(group)) for kind, group in groupby(blocks, key=type)]


@cache
def _template() -> jinja2.Template:
    files = {name: _file(name) for name in (TEMPLATE, STYLE)}
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.DictLoader(files),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"visible": visible, "runs": _runs}
    return environment.get_template(TEMPLATE)


def _file(name: str) -> str:
    return resources.files(PACKAGE).joinpath(name).read_text(encoding="utf-8")
