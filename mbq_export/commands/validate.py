"""Check a bundle: files, numbers per layer and modality, tokens, tasks."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console, counted
from mbq_export.errors import UsageError
from mbq_export.native import CALL_SECONDS

if TYPE_CHECKING:
    from mbq_export.report import Report

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
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            help="Tasks of lmms-eval for the task tier; commas join them. Runs their own Python: name those you trust.",
            show_default=False,
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path",
            help="Folder of task files (YAML) of your own, where --tasks are then looked up.",
            show_default=False,
        ),
    ] = None,
    questions: Annotated[
        int,
        typer.Option("--questions", help="Most questions of the task tier, of each task.", min=1),
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
    tiers = tuple((ALL_TIERS if tier == "all" else tier).split(","))
    names = _task_names(tasks, include_path, data=data, tiers=tiers)
    opened = Bundle.open(bundle)
    results = options.result_folder(out, [bundle])
    validation = Validation(
        tiers=tiers,
        backend=backend,
        lowering=lowering or default_lowering(opened),
        full_precision=model,
        kv_bits=kv_bits,
        data=data,
        questions=questions,
        tasks=names,
        task_folder=include_path,
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
    if rows := _task_rows(report):
        console.table(("measured", "value"), rows)
    error = failure(report)
    if error is not None:
        error.context["result"] = report.as_json()
        raise error
    console.finish(report.as_json(), what=f"{bundle}  {counted(report.checks, 'check')}")


def _task_names(
    tasks: list[str] | None, include_path: Path | None, *, data: Path | None, tiers: tuple[str, ...]
) -> tuple[str, ...]:
    """Split --tasks at commas.

    Raises:
        UsageError: E2002 for options that contradict it, E2003 for an empty name.
    """
    names = tuple(name.strip() for given in tasks or () for name in given.split(","))
    if not names and include_path is not None:
        raise UsageError(
            "E2002",
            "--include-path is given without --tasks.",
            why="it is the folder where tasks are looked up",
            fix="--tasks NAME",
        )
    if names and "task" not in tiers:
        raise UsageError(
            "E2002",
            f"--tasks is given with --tier {','.join(tiers)}.",
            why="only the task tier asks questions",
            fix=("--tier task", "leave out --tasks"),
        )
    if names and data is not None:
        raise UsageError(
            "E2002",
            "--tasks and --data are both given.",
            why="a task of lmms-eval brings its own questions",
            fix="one after the other",
        )
    if "" in names:
        raise UsageError("E2003", "--tasks has an empty name.", fix="--tasks NAME,NAME")
    return names


def _task_rows(report: "Report") -> list[tuple[str, float | None]]:
    """What the task tier measured: no gate shows it."""
    return [(one.name, one.value) for one in report.measurements if one.name.startswith("task/")]
