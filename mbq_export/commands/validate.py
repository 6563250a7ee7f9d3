"""Check a bundle: files, numbers per layer and modality, tokens, tasks."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console
from mbq_export.errors import GateError

DEFAULT_TIERS = "structure,numeric,tokens"


def command(
    context: typer.Context,
    bundle: options.BundlePath,
    tier: Annotated[
        str, typer.Option("--tier", help="structure, numeric, tokens, task or all; commas join them.")
    ] = DEFAULT_TIERS,
    backend: options.Backend = "ort",
    lowering: options.Lowering = "qdq",
    data: Annotated[
        str | None,
        typer.Option("--data", help="Samples or task questions (JSON Lines); default: generated ones.", show_default=False),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Samples per tier.", min=1, show_default=False)
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens of a free run.", min=1)] = 32,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for validate.json.", show_default=False)
    ] = None,
) -> None:
    """Check a bundle against its own checkpoint.

    mbq-export validate out --tier tokens --json
    """
    from mbq_export.bundle import Bundle
    from mbq_export.evaluate.validate import ValidateRequest, validate

    console: Console = context.obj
    opened = Bundle.open(bundle)
    request = ValidateRequest(
        tiers=tuple(tier.split(",")),
        backend=backend,
        lowering=lowering,
        data=data,
        samples=samples,
        new_tokens=new_tokens,
        seed=console.seed,
    )
    with console.progress("validate") as progress:
        report = validate(opened, request, progress=progress)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report.write(out / "validate.json")
    console.table(("tier", "gate", "modality", "value", "threshold", "verdict"), report.check_rows())
    document: dict[str, Any] = report.as_json()
    if not report.passed:
        failed = next(check for check in report.checks if check.ok is False)
        raise GateError(
            "E1102",
            f"{failed.name} is {failed.value}, limit {failed.threshold}{f', at {failed.place}' if failed.place else ''}.",
            why=failed.why,
            fix=f"mbq-export validate {bundle} --tier numeric --json",
            context={"report": document},
        )
    console.finish(document, what=f"{bundle}  {len(report.checks)} checks")
