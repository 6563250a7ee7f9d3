"""The box on top: passed or not, valid or noisy, and where anything ran."""

from collections.abc import Sequence
from typing import Any, Final

from mbq_export.evaluate.document import BAD, GOOD, NEUTRAL, UNSURE, Note, Verdict
from mbq_export.evaluate.gathering import BENCH, VALIDATE, Found, Result, Subject
from mbq_export.evaluate.lookup import dig, entries, items, texts, words
from mbq_export.report import Check, Report
from mbq_export.schemes.base import group_name

SHOWN_FAILURES: Final = 4
SHOWN_REASONS: Final = 2


def verdicts(found: Found) -> tuple[Verdict, ...]:
    """Judge every bundle, every validation of a bundle that is not here, and every benchmark."""
    told = [result for subject in found.subjects for result in found.validations_of(subject)]
    alone = [result for result in found.of_kind(VALIDATE) if result not in told]
    return (
        *(_subject(subject, found) for subject in found.subjects),
        *(_validation(result) for result in alone),
        *(_benchmark(result) for result in found.of_kind(BENCH)),
    )


def _subject(subject: Subject, found: Found) -> Verdict:
    validations = found.validations_of(subject)
    gates = [
        (str(gate.get("name")), bool(gate.get("pass")), bool(gate.get("run", True)))
        for gate in items(subject.manifest.get("gates"))
    ]
    for result in validations:
        if not result.subject:
            gates += [_answer(check) for check in result.report.checks]
    headline, tone = _judged(gates)
    override = subject.manifest.get("gate_override")
    lines = [Note(text=_what(subject))]
    if override:
        tone = BAD if tone == BAD else UNSURE
        lines.append(
            Note(
                text=f"Published with --gate {words(dig(override, 'gate'))}: {words(dig(override, 'reason'))}",
                tone=UNSURE,
            )
        )
    lines += [note for result in validations for note in _where(result.report)]
    return Verdict(
        name=subject.name,
        headline=headline,
        tone=tone,
        lines=(*lines, *_failures(gates), *_engines(subject)),
    )


def _validation(result: Result) -> Verdict:
    answers = [_answer(check) for check in result.report.checks]
    headline, tone = _judged(answers)
    about = Note(text=f"Validation of {words(dig(result.report.context, 'bundle'))}")
    return Verdict(
        name=result.name,
        headline=headline,
        tone=tone,
        lines=(about, *_where(result.report), *_failures(answers)),
    )


def _benchmark(result: Result) -> Verdict:
    details = result.report.details
    reasons = dig(details, "noise", "reasons")
    cpu = words(dig(details, "env", "cpu")) or "an unnamed machine"
    bundles = words(dig(result.report.context, "bundles"))
    lines = [Note(text=f"Timed {bundles} on {cpu}, {words(dig(details, 'env', 'cpus'))} CPUs")]
    if not result.report.valid:
        told = texts(reasons) or ["no reason was recorded"]
        lines += [Note(text=reason, tone=UNSURE) for reason in told[:SHOWN_REASONS]]
        if len(told) > SHOWN_REASONS:
            lines.append(Note(text=f"{len(told) - SHOWN_REASONS} more reasons below", tone=UNSURE))
    return Verdict(
        name=result.name,
        headline="Timings are valid" if result.report.valid else "Timings are noisy",
        tone=GOOD if result.report.valid else UNSURE,
        lines=tuple(lines),
    )


def _answer(check: Check) -> tuple[str, bool, bool]:
    return check.name, bool(check.ok), check.ok is not None


def _judged(gates: Sequence[tuple[str, bool, bool]]) -> tuple[str, str]:
    run = [passed for _, passed, ran in gates if ran]
    skipped = len(gates) - len(run)
    rest = f", {skipped} not run" if skipped else ""
    if not run:
        return "Not checked", UNSURE
    if all(run):
        return f"All {len(run)} checks passed{rest}", GOOD
    return f"{run.count(False)} of {len(run)} checks failed{rest}", BAD


def _failures(gates: Sequence[tuple[str, bool, bool]]) -> list[Note]:
    names = list(dict.fromkeys(name for name, passed, ran in gates if ran and not passed))
    more = f" and {len(names) - SHOWN_FAILURES} more" if len(names) > SHOWN_FAILURES else ""
    return (
        [Note(text=f"Failed: {', '.join(names[:SHOWN_FAILURES])}{more}", tone=BAD)] if names else []
    )


def _what(subject: Subject) -> str:
    model = words(dig(subject.manifest, "source", "model")) or "a model that is not named"
    return f"{model}, {scheme_of(subject)}"


def scheme_of(subject: Subject) -> str:
    """Number format, group size and method of a bundle, in a few words."""
    quant = subject.manifest.get("quant")
    name, group = dig(quant, "scheme", "name"), dig(quant, "scheme", "group_size")
    if name in (None, "none"):
        return "not quantized" if name else "scheme not recorded"
    method = dig(quant, "method", "name") or dig(quant, "method", "method")
    named = group_name(group) if isinstance(group, int) else ""
    head = dig(quant, "lm_head", "scheme")
    outside = "" if head is None else f"with a head of {words(head)}"
    return " ".join(filter(None, [words(name), named, words(method), outside]))


def _where(report: Report) -> list[Note]:
    bad = dig(report.details, "first_bad")
    backend, lowering = (words(dig(report.context, key)) for key in ("backend", "lowering"))
    notes = [Note(text=f"Checked with backend {backend}, lowering {lowering}")]
    if bad:
        notes.append(Note(text=f"First bad place: {place(bad)}", tone=BAD))
    return notes


def place(bad: Any) -> str:
    """Name the first bad place in a few words."""
    layer = "" if dig(bad, "layer") is None else f"layer {words(dig(bad, 'layer'))} "
    column = "" if dig(bad, "column") is None else f" column {words(dig(bad, 'column'))}"
    return f"{layer}{words(dig(bad, 'op'))}{column}, {words(dig(bad, 'modality'))} positions"


def _engines(subject: Subject) -> list[Note]:
    notes = []
    for built in subject.engines:
        verified = dig(built.record, "verified") is True
        reason = words(dig(built.record, "why")) or "no reason was recorded"
        ran = "verified on a device" if verified else f"not verified: {reason}"
        notes.append(
            Note(text=f"Engine {built.folder} {ran}", tone=NEUTRAL if verified else UNSURE)
        )
    skipped = entries(subject.manifest.get("skipped_engines"))
    return notes + [
        Note(text=f"Engine {target} was not built: {words(why)}", tone=UNSURE)
        for target, why in skipped.items()
    ]
