"""Options that give units of the decoder widths of their own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbq_export.commands.memory_options import size
from mbq_export.commands.number_options import PANEL

if TYPE_CHECKING:
    from mbq_export.quantize.widths import MixedBits

AvgBits = Annotated[
    float | None,
    typer.Option(
        "--avg-bits",
        rich_help_panel=PANEL,
        help="From 3 to 4: units get 3 or 4 bits, where predicted errors want them. Counts the bits of codes per "
        "weight over the decoder's linears, without scales, zero points, head and biases.",
        show_default=False,
    ),
]
Bits = Annotated[
    list[str] | None,
    typer.Option(
        "--bits",
        rich_help_panel=PANEL,
        metavar="PATTERN=N",
        help="3 or 4 bits for the linears that a glob matches, from any dot of the module path on: 'layers.0.*=4', "
        "'mlp.down_proj=4'. q, k, v have one width, and so have gate and up. Repeatable, the last counts.",
        show_default=False,
    ),
]
BytesBudget = Annotated[
    str | None,
    typer.Option(
        "--bytes-budget",
        rich_help_panel=PANEL,
        help="As --avg-bits, by size: most bytes of codes, scales and zero points of the decoder's linears. A number, "
        "or 3.5MiB, 2GB.",
        show_default=False,
    ),
]
LatencyTable = Annotated[
    Path | None,
    typer.Option(
        "--latency-table",
        rich_help_panel=PANEL,
        help="With --avg-bits: kernels.json of bench --kernels, measured on the device. What is spent is then time: "
        "3.3 allows three tenths of the way from all units at 3 bits to all at 4.",
        show_default=False,
    ),
]


def mixed_bits(
    *,
    avg_bits: float | None,
    bits: list[str] | None,
    bytes_budget: str | None,
    latency_table: Path | None,
) -> "MixedBits":
    """Widths as the user typed them.

    Raises:
        BadParameter: For a pattern without a number, or a size that is none.
    """
    from mbq_export.quantize.widths import MixedBits

    return MixedBits(
        patterns=tuple(_pattern(text) for text in bits or ()),
        avg_bits=avg_bits,
        bytes_budget=None if bytes_budget is None else size(bytes_budget, option="--bytes-budget"),
        latency_table=latency_table,
    )


def _pattern(text: str) -> tuple[str, int]:
    pattern, equals, number = text.rpartition("=")
    if not equals or not pattern or not number.isdecimal():
        raise typer.BadParameter(f"{text!r} is not PATTERN=N", param_hint="--bits")
    return pattern, int(number)
