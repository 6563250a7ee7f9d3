"""Show what a file or folder contains."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mbq_export.commands.console import Console

SHOWN_ROWS = 12


def command(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            help="A bundle, checkpoint, calibration, model folder, .safetensors or .onnx.",
            metavar="PATH",
        ),
    ],
    verify: Annotated[bool, typer.Option("--verify", help="Compare every recorded hash.")] = False,
    full: Annotated[bool, typer.Option("--all", help="Print whole tables.")] = False,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Print the layer table of each engine, recorded at build time."
        ),
    ] = False,
) -> None:
    """Show what a file or folder contains, running nothing in it.

    mbq-export inspect out --verify
    """
    from mbq_export.evaluate.describe import describe

    console: Console = context.obj
    with console.progress("inspect") as progress:
        found = describe(path, verify=verify, layers=layers, progress=progress)
    console.text(f"{path}: {found.kind}")
    width = max(map(len, found.facts), default=0)
    for name, value in found.facts.items():
        console.text(f"  {name:<{width}}  {_plain(value)}")
    for table in found.tables:
        console.text(f"\n{table.title}")
        console.table(table.header, table.rows if full or layers else table.rows[:SHOWN_ROWS])
        if len(table.rows) > SHOWN_ROWS and not (full or layers):
            console.text(f"... {len(table.rows) - SHOWN_ROWS} more, --all shows them")
    console.finish(found.as_json(), what=f"{path}  {found.kind}")


def _plain(value: Any) -> str:
    """Write a fact as words: nothing is -, lists and mappings are joined."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "-"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
