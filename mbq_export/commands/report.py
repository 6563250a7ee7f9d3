"""Turn bundles and results into one page."""

from pathlib import Path
from typing import Annotated

import typer

from mbq_export.commands.console import Console


def command(
    context: typer.Context,
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Bundles, result files, or folders of results, in any mix.", metavar="INPUT..."
        ),
    ],
    html: Annotated[
        Path | None, typer.Option("--html", help="One offline page with plots.", show_default=False)
    ] = None,
    md: Annotated[Path | None, typer.Option("--md", help="Markdown.", show_default=False)] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="One row per test and statistic.", show_default=False),
    ] = None,
    title: Annotated[str, typer.Option("--title", help="Heading.")] = "mbq-export report",
) -> None:
    """Turn bundles and results into one page; without an option, Markdown on stdout.

    mbq-export report out bench.json --html report.html
    """
    from mbq_export.evaluate.gathering import gather
    from mbq_export.evaluate.render import as_csv, as_html, as_markdown
    from mbq_export.evaluate.sections.verdict import verdicts
    from mbq_export.writing import write_file

    console: Console = context.obj
    found = gather(inputs)
    written = []
    for path, form in ((html, as_html), (md, as_markdown), (csv, as_csv)):
        if path is not None:
            write_file(path, form(found, title=title).encode())
            written.append(str(path))
    if not written:
        console.text(as_markdown(found, title=title))
    result = {
        "inputs": [str(path) for path in inputs],
        "written": written,
        "verdicts": [
            {"name": verdict.name, "headline": verdict.headline, "tone": verdict.tone}
            for verdict in verdicts(found)
        ],
    }
    console.finish(result, what=", ".join(written) or "stdout")
