"""The chapters of a report, one file each, in the order of reading."""

import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from mbq_export.evaluate.document import Document, Section
from mbq_export.evaluate.gathering import Found
from mbq_export.evaluate.sections import (
    accuracy,
    comparison,
    engines,
    latency,
    provenance,
    quantization,
    remarks,
    resources,
    validation,
)
from mbq_export.evaluate.sections.verdict import verdicts
from mbq_export.evaluate.wording import size, visible

SECTIONS: Final[tuple[Callable[[Found], Section], ...]] = (
    provenance.section,
    quantization.section,
    validation.section,
    latency.section,
    resources.roofline,
    resources.memory,
    resources.energy,
    accuracy.section,
    comparison.section,
    engines.section,
    remarks.section,
)

RAW_LIMIT_BYTES: Final = 400_000
"""JSON that one page embeds at most; the rest is left in its files, and the page says so."""


def document(found: Found, *, title: str) -> Document:
    """Tell everything that was found."""
    return Document(
        title=title,
        verdicts=verdicts(found),
        sections=tuple(section(found) for section in SECTIONS),
        raw=tuple(_raw(found)),
    )


def _raw(found: Found) -> Iterator[tuple[str, str]]:
    """The inputs as JSON, one key per line, until the limit is reached."""
    left = RAW_LIMIT_BYTES
    for name, content in _contents(found):
        text = _one_key_per_line(content)
        if len(text) > left:
            yield name, f"left out: {size(len(text))}, see the file"
        else:
            left -= len(text)
            yield name, text


def _contents(found: Found) -> Iterator[tuple[str, dict[str, Any]]]:
    for subject in found.subjects:
        yield f"{subject.name}/manifest.json", dict(subject.manifest)
    for result in found.results:
        yield result.name, result.report.as_json()
    for quality in found.qualities:
        yield quality.name, dict(quality.content)


def _one_key_per_line(content: dict[str, Any]) -> str:
    lines = (
        visible(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False, sort_keys=True)}")
        for key, value in sorted(content.items())
    )
    return "{\n" + ",\n".join(lines) + "\n}"
