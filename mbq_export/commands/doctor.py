"""Check what this machine can do."""

from pathlib import Path
from typing import Annotated

import typer

from mbq_export.commands.console import Console


def command(
    context: typer.Context,
    use: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="build, build:rtx, validate, run or bench: fail if it cannot work.",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option("--bundle", help="A bundle that should work here.", show_default=False),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where output would go.")] = Path(),
) -> None:
    """Check what this machine can do, and what would mend it. Nothing is written."""
    from mbq_export.errors import UsageError
    from mbq_export.evaluate.doctor import USES, advice, demand, examine, report_rows, uses

    console: Console = context.obj
    if use is not None and use not in USES:
        raise UsageError(
            "E2001", f"Unknown use {use!r}.", why=f"known: {', '.join(USES)}", fix="--for build"
        )
    rows = examine(output=out, bundle=bundle)
    console.table(("check", "status", "found"), report_rows(rows))
    for line in advice(rows):
        console.text(line)
    if use is not None:
        demand(rows, use)
    possible = uses(rows)
    console.finish(
        {"checks": [row.as_json() for row in rows], "can": possible},
        what=", ".join(f"{name} {'yes' if can else 'no'}" for name, can in possible.items()),
    )
