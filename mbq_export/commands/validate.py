"""Check a bundle: files, numbers per layer and modality, tokens, tasks."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console, counted
from mbq_export.errors import UsageError
from mbq_export.native import CALL_SECONDS

ALL_TIERS = "structure,numeric,tokens,task"


def command(
    context: typer.Context,
    bundle: options.BundlePath,
    tier: Annotated[
        str,
        typer.Option("--tier", help="structure, numeric, tokens, task or all; commas join them."),
    ] = "structure,numeric,tokens",
    backend: options.Backend = "ort",
    lowering: options.Lowering = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", help="Full-precision model: adds the quality checks.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Samples or questions (JSON Lines). Default: generated ones.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            help="Samples of the numeric tier, prompts of the tokens tier.",
            min=1,
            show_default=False,
        ),
    ] = None,
    kv_bits: Annotated[
        int,
        typer.Option(
            "--kv-bits",
            help="8: also tell what keys and values of vision, prompt and answer tokens in 8 bits would cost answers. "
            "A measurement on the reference model: no graph or engine here has such a cache.",
        ),
    ] = 16,
    questions: Annotated[
        int, typer.Option("--questions", help="Most questions of the task tier.", min=1)
    ] = 500,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", help="Longest free answer.", min=1)
    ] = 32,
    threads: options.Threads = 0,
    engine_timeout: options.EngineTimeout = CALL_SECONDS,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Folder for validate.json and the tensors at the first bad place.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check a bundle against its own checkpoint, layer by layer and modality by modality.

    mbq-export validate out --tier tokens --json
    """
    from mbq_export.bundle import Bundle
    from mbq_export.evaluate.validate import Validation, failure, validate
    from mbq_export.runtime import default_lowering

    console: Console = context.obj
    if kv_bits not in {8, 16}:
        raise UsageError(
            "E2001",
            f"Unknown --kv-bits {kv_bits}.",
            why="known: 16, 8",
            fix="--kv-bits 8",
        )
    opened = Bundle.open(bundle)
    results = options.result_folder(out, [bundle])
    validation = Validation(
        tiers=tuple((ALL_TIERS if tier == "all" else tier).split(",")),
        backend=backend,
        lowering=lowering or default_lowering(opened),
        full_precision=model,
        kv_bits=kv_bits,
        data=data,
        questions=questions,
        new_tokens=new_tokens,
        threads=threads,
        engine_timeout_s=engine_timeout,
        tensors=results,
    )
    if samples is not None:
        validation = replace(validation, samples=samples, prompts=samples)
    with console.progress("validate") as progress:
        report = validate(opened, validation, progress=progress)
    if results is not None:
        report.write(results / "validate.json")
    console.table(
        ("tier", "gate", "modality", "value", "threshold", "verdict"), report.check_rows()
    )
    error = failure(report)
    if error is not None:
        error.context["result"] = report.as_json()
        raise error
    console.finish(report.as_json(), what=f"{bundle}  {counted(report.checks, 'check')}")
