"""Right answers with their intervals, and the distance to full precision."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mbq_export.evaluate.document import Block, Figure, Heading, Missing, Note, Section, table
from mbq_export.evaluate.gathering import VALIDATE, Found, Quality, Result
from mbq_export.evaluate.lookup import dig, entries, items, number, words
from mbq_export.evaluate.plots import Range, intervals
from mbq_export.evaluate.wording import figure, percent, percents

FULL: Final = "fp"
VARIANTS: Final = {"plain": "sample model", "stress": "stress variant (synthetic outliers)"}
HINT: Final = "mbq-export validate BUNDLE --tier task -o DIR"
TASK: Final = "task/accuracy"


def section(found: Found) -> Section:
    """Show task results of validations and tables of task quality."""
    blocks = [block for result in found.of_kind(VALIDATE) for block in _task(result)]
    for quality in found.qualities:
        blocks += _quality(quality)
    if not blocks:
        blocks = [Missing(what="Accuracy", why=f"no task was run: {HINT}")]
    return Section(key="accuracy", title="Accuracy", blocks=tuple(blocks))


def _task(result: Result) -> list[Block]:
    values = {m.name: m.value for m in result.report.measurements}
    value, low, high = (values.get(f"{TASK}{end}") for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return []
    title = f"Exact match, {words(dig(result.report.context, 'bundle'))}"
    asked = f"{figure(values.get('task/questions'))} questions about {figure(values.get('task/pictures'))} pictures"
    kinds = [
        (name.removeprefix(f"{TASK}/"), percent(share))
        for name, share in values.items()
        if name.startswith(f"{TASK}/")
    ]
    ranges = [Range(label="all", value=100 * value, low=100 * low, high=100 * high)]
    interval = percents(low, high)
    return [
        Figure(
            title=title,
            drawing=intervals(title, ranges, unit="%"),
            numbers=table(
                ("questions", "right", "95 % interval"),
                [("all", percent(value), interval), *((*kind, "") for kind in kinds)],
            ),
            note=f"{asked}; the interval resamples pictures.",
        )
    ]


def _quality(quality: Quality) -> list[Block]:
    rows = items(quality.content.get("rows"))
    pairs = items(quality.content.get("pairs"))
    if not rows:
        return [Missing(what="Accuracy", why=f"{quality.name} holds no rows")]
    blocks: list[Block] = [Note(text=_setup(quality.content.get("setup"), rows[0]))]
    for variant in dict.fromkeys(words(row.get("variant")) for row in rows):
        own = [row for row in rows if words(row.get("variant")) == variant]
        # Training seeds and draws of the calibration data differ less than methods do; one of each is shown, all are in
        # the file.
        shown = rows[0].get("model")
        first = [row for row in own if _is_shown(row, shown)]
        paired = [p for p in pairs if words(p.get("variant")) == variant and _is_shown(p, shown)]
        name = VARIANTS.get(variant, variant)
        blocks += [Heading(text=name), *_figures(first, name), _table(first)]
        if paired:
            blocks.append(_pairs(paired))
    return blocks


def _setup(setup: Any, row: Mapping[str, Any]) -> str:
    model, device = words(dig(setup, "model")), words(dig(setup, "device"))
    blind = percent(dig(setup, "blind_accuracy"))
    return (
        f"{model}, {device}: exact match on {words(row.get('questions'))} questions about "
        f"{words(row.get('pictures'))} pictures, 95 % intervals resample pictures. "
        f"Answering without looking gives {blind or 'not recorded'}. Calibration draw 0."
    )


def _is_shown(row: Mapping[str, Any], model: object) -> bool:
    return row.get("model") == model and row.get("draw") in (0, None)


def _label(row: Mapping[str, Any]) -> str:
    method = words(row.get("method"))
    return "full precision" if method == FULL else f"{method} {words(row.get('title'))}"


def _figures(rows: Sequence[Mapping[str, Any]], variant: str) -> list[Figure]:
    """Draw accuracy, and the distance at answers, of the models of one variant."""
    title, kl_title = f"Exact match, {variant}", f"KL to full precision at answers, {variant}"
    accuracy = [r for row in rows if (r := _range(row, row.get("accuracy"), factor=100))]
    full = next((r.value for r in accuracy if r.label == "full precision"), None)
    distance = [
        found
        for row in rows
        if row.get("method") != FULL and (found := _range(row, dig(row, "kl", "answer", "mean")))
    ]
    figures = []
    if accuracy:
        drawn = intervals(title, accuracy, unit="%", reference=full)
        note = "Lines: 95 %. Upright: full precision." if full is not None else "Lines: 95 %."
        figures.append(Figure(title=title, drawing=drawn, note=note))
    if distance:
        drawn = intervals(kl_title, distance, unit="nats")
        figures.append(Figure(title=kl_title, drawing=drawn, note="Lower is better. Lines: 95 %."))
    return figures


def _range(row: Mapping[str, Any], found: Any, *, factor: float = 1.0) -> Range | None:
    value, low, high = (number(dig(found, key)) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return None
    return Range(label=_label(row), value=factor * value, low=factor * low, high=factor * high)


def _table(rows: Sequence[Mapping[str, Any]]) -> Block:
    kinds = list(dict.fromkeys(k for row in rows for k in entries(row.get("kinds"))))
    shown = [
        (
            _label(row),
            percent(dig(row, "accuracy", "value")),
            percents(dig(row, "accuracy", "low"), dig(row, "accuracy", "high")),
            *(
                figure(dig(row, "kl", m, "mean", "value"), 3)
                for m in ("answer", "vision", "prompt")
            ),
            *(percent(dig(row, "kinds", kind, "accuracy")) for kind in kinds),
        )
        for row in rows
    ]
    header = ("model", "exact match", "95 % interval", "KL answer", "KL vision", "KL prompt")
    return table((*header, *kinds), shown, caption="Accuracy, distance, and accuracy by kind")


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> Block:
    rows = [
        (
            f"{_label(pair)} against {_label({**pair, 'method': pair.get('against')})}",
            *(figure(number_times(dig(pair, "accuracy", end), 100), 3) for end in ENDS),
            *(figure(dig(pair, "kl", end), 3) for end in ENDS),
            figure(dig(pair, "mcnemar", "p"), 2),
        )
        for pair in pairs
    ]
    header = ("pair", "points", "low", "high", "KL", "low", "high", "McNemar p")
    return table(header, rows, caption="Paired differences on the same questions")


ENDS: Final = ("value", "low", "high")


def number_times(value: Any, factor: float) -> float | None:
    """A number times another; None for what is no number."""
    found = number(value)
    return None if found is None else factor * found
