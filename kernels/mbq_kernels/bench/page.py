"""The Markdown page of a result: what was found beside what was predicted, and what was not measured by name."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from mbq_kernels.bench.limits import FLOAT, PREDICTED, card_named, predicted_us, traffic
from mbq_kernels.bench.linears import LEAST_DEQUANT_ROWS
from mbq_kernels.bench.protocol import DRIFT_PERCENT, NOISY_PERCENT
from mbq_kernels.bench.shapes import Shape

Document = Mapping[str, Any]
Row = Mapping[str, Any]
NOT_MEASURED: Final = "not measured"
MEGA: Final = 1e6

HEAD: Final = """\
# Kernels: every low-bit linear against its limits

Made by `{command}`, which writes this page and [kernels.json](kernels.json); a test holds the two together.
Times are medians per launch inside a CUDA graph over weights that rotate through more memory than any cache holds; every
answer was checked in the same process before it was timed. *limit* is the time of reading the weights once at the
bandwidth measured at their size; *predicted* is arithmetic on the datasheet, written down before anything was measured.
"""
DRY: Final = """\
**Nothing on this page was timed.** It comes from a dry run on a machine without a GPU: the same code ran once at tiny
sizes with {kernels}, {checked} answers were checked ({wrong} wrong), and every time is *not measured*. On a machine with
an NVIDIA GPU, `make test-gpu` measures and rewrites it.
"""
PARTIAL: Final = "**This run ended early**; what it did not reach is missing or not measured.\n"


def page(document: Document, plots: Mapping[str, str] | None = None) -> str:
    """Return the page.

    Args:
        document: A result.
        plots: Title to file name beside the page, in order.
    """
    dry = document["dry_run"]
    parts = [HEAD.format(command=_command(document))]
    if dry:
        checked = document["rehearsal"]["rows"]
        parts.append(
            DRY.format(
                kernels="the emulated kernels"
                if document["rehearsal"]["kernels"] == "emulated"
                else "the oracle in place of kernels",
                checked=sum(row["correct"] is not None for row in checked),
                wrong=sum(row["correct"] is False for row in checked),
            )
        )
    elif not document["complete"]:
        parts.append(PARTIAL)
    parts += [_setting(document), "## Targets (H100)\n", table(TARGET_HEAD, target_rows(document))]
    parts += [f"![{title}]({file})\n" for title, file in (plots or {}).items()]
    for n, k in document["suite"]["shapes"]:
        own = [row for row in document["rows"] if (row["n"], row["k"]) == (n, k)]
        parts += [f"## {n} x {k}\n", table(ROW_HEAD, map(row_cells, own))]
    parts += ["## One token, all linears of 28 blocks\n", *_chain(document)]
    parts += ["## One token, whole decoder\n", *_decode(document)]
    parts += ["## Ceilings\n", table(("bytes", "GB/s"), ceiling_rows(document))]
    parts += ["## Other cards\n", _others()]
    parts += ["## Not measured\n", _absent(document), LIMITS]
    return "\n".join(parts)


TARGET_HEAD: Final = ("target", "what", "bound", "stretch", "found", "status")
ROW_HEAD: Final = (
    *("M", "kernel", "config", "MB", "predicted us", "limit us", "us", "p10 to p90", "GB/s"),
    *("% of read", "% of datasheet", "over cuBLAS", "remarks"),
)
LIMITS: Final = """\

What no figure here can show: weight-only formats cannot beat fp16 where multiplying is the limit, at best they tie;
at one token, launches and not kernels bound small layers on a fast card; three bits instead of four save a quarter of
the bytes of a block and not of the head. Engines of TensorRT are not what is timed: these are the kernels themselves.
"""


def target_rows(document: Document) -> Iterator[list[str]]:
    """One line per target."""
    for line in document["targets"]:
        sign, unit = (">=" if line["at_least"] else "<="), line["unit"]
        yield [
            line["id"],
            line["text"],
            f"{sign} {line['bound']:g} {unit}",
            "" if line["stretch"] is None else f"{sign} {line['stretch']:g} {unit}",
            NOT_MEASURED if line["value"] is None else f"{line['value']:.3g} {unit}",
            line["status"],
        ]


def row_cells(row: Row) -> list[str]:
    """One line of a shape's table."""
    timing = row["timing"]
    spread = "" if timing is None else f"{timing['p10_us']:.2f} to {timing['p90_us']:.2f}"
    return [
        str(row["m"]),
        row["entrant"],
        "" if row["config"] is None else str(row["config"]),
        f"{row['weight_bytes'] / MEGA:.2f}",
        amount(row["predicted_us"], "{:.2f}", absent=""),
        amount(row["limit_us"], "{:.2f}", absent=""),
        NOT_MEASURED if timing is None else f"{timing['median_us']:.2f}",
        spread,
        amount(row["gb_s"], "{:.0f}", absent=""),
        amount(row["percent_of_read"], "{:.1f}", absent=""),
        amount(row["percent_of_datasheet"], "{:.1f}", absent=""),
        amount(row["speedup"], "{:.2f}", absent=""),
        remarks(row),
    ]


def remarks(row: Row) -> str:
    """What a reader must know before believing a row."""
    timing = row["timing"]
    if timing is None:
        return str(row["timing_why"]).replace("|", "/")
    marks = []
    if timing["noisy"]:
        marks.append(f"noisy: replays differ by more than {NOISY_PERCENT:g} %")
    if timing["drifting"]:
        marks.append(f"base drifted {timing['drift_percent']:.1f} % (more than {DRIFT_PERCENT:g})")
    return "; ".join(marks)


def amount(value: float | None, form: str, *, absent: str = NOT_MEASURED) -> str:
    """A number, or that it was not measured."""
    return absent if value is None else form.format(value)


def _chain(document: Document) -> list[str]:
    predicted = {
        line["format"]: line["chain_ms"]
        for line in document["predictions"]
        if line["card"] == PREDICTED[0]
    }
    head = ("kernel", "GB", "predicted ms (H100)", "ms", "GB/s", "over cuBLAS", "remarks")
    if not document["chain"]:
        plain = (
            [name, "", f"{ms:.2f}", NOT_MEASURED, "", "", ""] for name, ms in predicted.items()
        )
        return [table(head, plain)]
    return [
        table(
            head,
            (
                [
                    row["entrant"],
                    f"{row['weight_bytes'] / 1e9:.2f}",
                    amount(row["predicted_ms"], "{:.2f}", absent=""),
                    amount(row["token_ms"], "{:.3f}"),
                    amount(row["gb_s"], "{:.0f}", absent=""),
                    amount(row["speedup"], "{:.2f}", absent=""),
                    remarks(row),
                ]
                for row in document["chain"]
            ),
        )
    ]


def _decode(document: Document) -> list[str]:
    if document["decode"] is None:
        return [
            "LLaVA-OV-7B class, random weights, at 0, 2048 and 8192 tokens of context: not measured.\n"
        ]
    head = ("context", "decoder", "GB", "limit ms", "ms", "over fp16", "remarks")
    return [
        table(
            head,
            (
                [
                    str(row["context"]),
                    row["entrant"],
                    f"{row['bytes_per_token'] / 1e9:.2f}",
                    amount(row["limit_ms"], "{:.2f}", absent=""),
                    amount(row["token_ms"], "{:.3f}"),
                    amount(row["speedup"], "{:.2f}", absent=""),
                    remarks(row),
                ]
                for row in document["decode"]["rows"]
            ),
        )
    ]


def ceiling_rows(document: Document) -> Iterator[list[str]]:
    """Copy, then reads by size."""
    ceilings = document["ceilings"]
    if ceilings is None:
        return
    yield [f"{ceilings['copy']['bytes']} (copy)", amount(ceilings["copy"]["gb_s"], "{:.0f}")]
    for read in ceilings["read"]:
        yield [str(read["bytes"]), amount(read["gb_s"], "{:.0f}")]


def _others() -> str:
    """What the model predicts for W3 at M = 1, on cards that may never be measured."""
    head = ("N x K", *(f"{name}: W3 us (over fp16)" for name in PREDICTED))
    sizes = ((3584, 3584), (4608, 3584), (18944, 3584), (37888, 3584), (3584, 18944))
    body = []
    for n, k in sizes:
        moved = [
            (
                predicted_us(traffic(Shape(n=n, k=k), 1, scheme="w3a16"), card_named(name)),
                predicted_us(traffic(Shape(n=n, k=k), 1, scheme=FLOAT), card_named(name)),
            )
            for name in PREDICTED
        ]
        body.append([f"{n} x {k}", *(f"{w3:.1f} ({fp16 / w3:.1f}x)" for w3, fp16 in moved)])
    return "Predictions of the model, not measurements.\n\n" + table(head, body)


def _absent(document: Document) -> str:
    if not document["absent"]:
        return "Everyone took part.\n"
    lines = [f"- {line['entrant']}: not measured: {line['why']}" for line in document["absent"]]
    return "\n".join(lines) + "\n"


def _setting(document: Document) -> str:
    device, made = document["device"], document["software"]
    versions = ", ".join(f"{n} {made[n]}" for n in ("torch", "triton", "numpy") if made[n])
    library = made["library_sha256"]
    return (
        f"Device: {device['name']}; driver {made['driver'] or 'none'}; CUDA {made['cuda'] or 'none'}; {versions}. "
        f"Revision `{(made['revision'] or 'unknown')[:12]}`, device sources `{(made['sources_sha256'] or '')[:12]}`, "
        f"library `{library[:12] if library else 'none'}`. Suite `{document['suite']['name']}`; dequantized weights enter "
        f"from M = {LEAST_DEQUANT_ROWS} on.\n"
    )


def _command(document: Document) -> str:
    dry = " --dry-run" if document["dry_run"] else ""
    name = document["suite"]["name"].partition(",")[0]
    return f"mbq-export bench --kernels --suite {name}{dry} -o docs/benchmarks"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
