"""Time bundles against each other."""

from pathlib import Path
from typing import Annotated

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console


def command(
    context: typer.Context,
    bundles: Annotated[
        list[Path], typer.Argument(help="One bundle, or several to compare.", metavar="BUNDLE...")
    ],
    backend: options.Backend = "ort",
    lowering: options.Lowering = "qdq",
    threads: options.Threads = 0,
) -> None:
    """Time bundles against each other, interleaved in one run."""
    del bundles, backend, lowering, threads
    console: Console = context.obj
    raise NotImplementedError(console.command)
