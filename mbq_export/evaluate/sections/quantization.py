"""What quantization did: bits, whose gradients counted, exponents, and the error of every linear."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from mbq_export.evaluate.document import (
    Block,
    Figure,
    Heading,
    Missing,
    Note,
    Section,
    Table,
    table,
)
from mbq_export.evaluate.gathering import CALIB, CHECKPOINT, SENSITIVITY, Found, Subject
from mbq_export.evaluate.heat_map import Grid, heat_map
from mbq_export.evaluate.lookup import dig, items, number, words
from mbq_export.evaluate.plots import Bar, Line, lines, stacked_bars
from mbq_export.evaluate.width_table import HEADER, width_rows, width_summary
from mbq_export.evaluate.wording import figure, percent, size
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import group_name

HALVES: Final = {"attention": "self_attn.o_proj", "MLP": "mlp.down_proj"}
"""Half of a block to the linear at whose output its gradients are measured."""

MODALITIES: Final = ("vision", "prompt", "answer")
BITS_PER_BYTE: Final = 8
KEPT: Final = "none"


def section(found: Found) -> Section:
    """Show every bundle's quantization."""
    blocks: list[Block] = []
    for subject in found.subjects:
        if len(found.subjects) > 1:
            blocks.append(Heading(text=subject.name))
        blocks += _subject(subject)
    if not found.subjects:
        blocks.append(Missing(what="Quantization", why="no bundle was given"))
    return Section(key="quantization", title="Quantization", blocks=tuple(blocks))


def _subject(subject: Subject) -> list[Block]:
    linears = items(subject.part(CHECKPOINT, "linears"))
    if not linears:
        if dig(subject.manifest, "quant", "scheme", "name") == KEPT:
            return [Note(text="Not quantized: the full-precision baseline.")]
        return [Missing(what="Quantization", why="weights/mbq.json lists no linears")]
    return [
        _bits(linears),
        *_widths(subject.part(CHECKPOINT, "mixed")),
        *_head(linears),
        _kept(subject),
        _tokens(subject),
        *_gradients(subject),
        _exponents(subject),
        _errors(of_decoder(linears)),
    ]


def _widths(mixed: Any) -> list[Block]:
    """Show the width of every unit, where they differ or were decided one by one."""
    rows = width_rows(mixed)
    told = width_summary(mixed)
    return [table(HEADER, rows, caption=f"Widths of units: {told}")] if rows else []


def of_decoder(linears: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the blocks that the first one belongs to; the head and linears of a tower are left out."""
    first = _blocks_of(words(linears[0].get("name"))) if linears else ""
    return [each for each in linears if _blocks_of(words(each.get("name"))) == first]


def _blocks_of(name: str) -> str:
    """Module path before a block's number; the whole path where it has none."""
    layer, linear = layer_and_linear(name)
    return name if layer < 0 else name.removesuffix(f".{layer}.{linear}")


def _head(linears: Sequence[Mapping[str, Any]]) -> list[Note]:
    """What the head alone costs answers, where it is codes."""
    return [
        Note(
            text=f"{words(each.get('name'))} alone adds "
            f"{figure(number(dig(each, 'kl', 'answers')))} nats at answers in full precision; "
            f"up to {figure(number(dig(each, 'kl', 'limit')))} no warning is given."
        )
        for each in linears
        if number(dig(each, "kl", "answers")) is not None
    ]


def layer_and_linear(name: str) -> tuple[int, str]:
    """Split a module path at its block's number; -1 and the path where it has none."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[place + 1 :])
    return -1, name


def _bits(linears: Sequence[Mapping[str, Any]]) -> Table:
    """Count linears and bytes by kind and number format."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    decoder = {words(linear.get("name")) for linear in of_decoder(linears)}
    for linear in linears:
        name = words(linear.get("name"))
        layer, kind = layer_and_linear(name)
        if name not in decoder and layer >= 0:
            kind = f"{_blocks_of(name)}.*.{kind}"
        key = kind, words(linear.get("scheme")), words(linear.get("group_size"))
        groups.setdefault(key, []).append(
            (number(linear.get("n")) or 0) * (number(linear.get("k")) or 0)
        )
    rows = []
    for (kind, scheme, group), weights in groups.items():
        bits = bits_per_weight(scheme, group)
        rows.append(
            (
                kind,
                str(len(weights)),
                f"{int(sum(weights)):,}",
                f"{scheme} {group_name(int(group)) if group.isdecimal() else group}",
                figure(bits),
                "" if bits is None else size(sum(weights) * bits / BITS_PER_BYTE),
            )
        )
    return table(
        ("linear", "count", "weights", "format", "bits per weight", "bytes"),
        rows,
        caption="What is quantized; bits include scales and zero points",
    )


def bits_per_weight(scheme: str, group_size: str) -> float | None:
    """Bits of a weight with its share of scale and zero point; None for a scheme nobody knows."""
    known = SCHEMES.members().get(scheme)
    if known is None or not group_size.isdecimal() or int(group_size) not in known.group_sizes:
        return None
    return known.bits_per_weight(int(group_size))


def _kept(subject: Subject) -> Table:
    rows = [
        (words(row.get("pattern")), words(row.get("modules")), words(row.get("why")))
        for row in items(subject.part(CHECKPOINT, "skipped"))
    ]
    return table(("modules", "count", "why"), rows, caption="What stays in 16 bits")


def _tokens(subject: Subject) -> Block:
    counts = {
        kind: number(subject.part(CALIB, "data", "tokens", kind)) or 0.0 for kind in MODALITIES
    }
    total = sum(counts.values())
    if not total:
        return Missing(what="Token shares", why="the calibration counted no tokens")
    samples = words(subject.part(CALIB, "data", "samples"))
    title = "Tokens of the calibration data"
    bar = Bar(label=f"{samples} samples", parts=counts, note=f"{int(total):,}")
    rows = [(kind, f"{int(n):,}", percent(n / total)) for kind, n in counts.items()]
    return Figure(
        title=title,
        drawing=stacked_bars(title, [bar], unit="tokens"),
        numbers=table(("modality", "tokens", "share"), rows),
    )


def _gradients(subject: Subject) -> list[Block]:
    """Draw the gradient ratios of vision and of prompt tokens, a line per half of a block."""
    layers = items(subject.part(SENSITIVITY, "layers"))
    if not layers:
        return [
            Missing(
                what="Gradient ratios",
                why="the method needs none, or calibration/sensitivity.json is empty",
            )
        ]
    return [_ratio_figure(layers, modality) for modality in ("vision", "prompt")]


def _ratio_figure(layers: Sequence[Mapping[str, Any]], modality: str) -> Figure:
    curves, rows = [], []
    for half, linear in HALVES.items():
        points, band = [], []
        for layer in layers:
            index = number(layer.get("layer")) or 0.0
            value, low, high = (
                number(dig(layer, "linears", linear, "ratio", modality, place))
                for place in range(3)
            )
            points.append((index, value))
            rows.append((words(layer.get("layer")), half, *map(figure, (value, low, high))))
            if low is not None and high is not None:
                band.append((index, low, high))
        curves.append(Line(label=half, points=points, band=band))
    title = f"Gradient of {modality} tokens, relative to answers"
    return Figure(
        title=title,
        drawing=lines(title, curves, x_title="layer", y_title="ratio"),
        numbers=table(
            ("layer", "half", "ratio", "low", "high"),
            rows,
        ),
        note="Mean absolute gradient at the outputs of o_proj and down_proj; bands hold 90 % of resampled data.",
    )


def _exponents(subject: Subject) -> Block:
    units = items(subject.part(CALIB, "units"))
    found = {
        (words(unit.get("unit")), int(number(unit.get("layer")) or 0)): number(unit.get("alpha"))
        for unit in units
    }
    if not any(value is not None for value in found.values()):
        return Missing(what="Exponents", why="the method searches no scales")
    title = "Exponent of the channel scales"
    return _by_layer(
        title, found, log=False, note="0 leaves a unit as it is; empty cells were not searched."
    )


def _errors(linears: Iterable[Mapping[str, Any]]) -> Block:
    found: dict[tuple[str, int], float | None] = {}
    for linear in linears:
        layer, kind = layer_and_linear(words(linear.get("name")))
        found[kind.rpartition(".")[2], layer] = number(dig(linear, "error", "weight"))
    if not any(value is not None for value in found.values()):
        return Missing(what="Error per linear", why="weights/mbq.json records no errors")
    title = "Relative error of the weights"
    note = "Of the folded weights, in Frobenius norm, against the codes."
    return _by_layer(title, found, log=False, note=note)


def _by_layer(
    title: str, found: Mapping[tuple[str, int], float | None], *, log: bool, note: str
) -> Figure:
    rows = list(dict.fromkeys(row for row, _ in found))
    columns = sorted({column for _, column in found})
    values = [[found.get((row, column)) for column in columns] for row in rows]
    grid = Grid(rows=rows, columns=[str(column) for column in columns], values=values, log=log)
    shown = [(row, *map(figure, line)) for row, line in zip(rows, values, strict=True)]
    return Figure(
        title=title,
        drawing=heat_map(title, grid),
        numbers=table(("layer", *map(str, columns)), shown),
        note=note,
    )
