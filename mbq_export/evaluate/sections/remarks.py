"""What the sections above do not show: warnings, checks that were not run, inputs that were not used."""

from mbq_export.evaluate.document import Block, Note, Section, table
from mbq_export.evaluate.gathering import VALIDATE, Found
from mbq_export.evaluate.lookup import dig, entries, items, texts, words


def section(found: Found) -> Section:
    """List warnings and skipped things with their reasons."""
    rows: list[tuple[str, str, str]] = []
    for result in found.results:
        rows += [
            (result.name, words(warning.get("code")) or "warning", words(warning.get("text")))
            for warning in items(dig(result.report.details, "warnings"))
        ]
        rows += [
            (result.name, "noise", reason)
            for reason in texts(dig(result.report.details, "noise", "reasons"))
        ]
    for result in found.of_kind(VALIDATE):
        rows += [
            (
                result.name,
                "not run",
                " ".join(filter(None, [check.name, check.modality, check.why])),
            )
            for check in result.report.checks
            if check.ok is None
        ]
    for subject in found.subjects:
        for target, why in entries(subject.manifest.get("skipped_engines")).items():
            rows.append((subject.name, "engine skipped", f"{target}: {words(why)}"))
    rows += [(remark.name, "not shown", remark.why) for remark in found.remarks]
    block: Block = (
        table(("where", "what", "reason"), rows) if rows else Note(text="Nothing to report.")
    )
    return Section(key="remarks", title="Warnings and skipped", blocks=(block,))
