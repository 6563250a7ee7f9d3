"""Options that several commands share, and the ones that stand before or after the command's name."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from mbq_export.commands.console import Console
from mbq_export.errors import UsageError
from mbq_export.writing import explained, partial_path, refuse_inside

STATE_FILE: Final = "state.json"
MOST_THREADS: Final = 64
DATA_PANEL: Final = "Calibration data"
GLOBAL_FLAGS: Final = frozenset({"--json", "-q", "--quiet", "-v", "-vv", "--verbose", "--debug"})
GLOBAL_VALUES: Final = frozenset({"--seed", "--progress"})
GLOBAL_HELP: Final = (
    "Also anywhere: --json, -q/--quiet, -v/-vv, --progress auto|bar|plain|none, --seed N, --debug."
)


def hoist_globals(argv: list[str]) -> list[str]:
    """Move global options in front of the command's name, so that they may stand on either side of it."""
    front: list[str] = []
    rest: list[str] = []
    tokens = iter(argv)
    for word in tokens:
        if word == "--":
            rest += [word, *tokens]
        elif word in GLOBAL_FLAGS or (word.partition("=")[0] in GLOBAL_VALUES and "=" in word):
            front.append(word)
        elif word in GLOBAL_VALUES:
            front += [word, *[value for value in [next(tokens, None)] if value is not None]]
        else:
            rest.append(word)
    return front + rest


def _version(value: bool) -> None:
    if value:
        from mbq_export import __version__
        from mbq_export.schemes.layouts import LAYOUTS

        layouts = ", ".join(
            f"{name} {layout.version}" for name, layout in LAYOUTS.members().items()
        )
        typer.echo(f"mbq-export {__version__} (layouts: {layouts})")
        raise typer.Exit


def take_globals(
    context: typer.Context,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document on stdout, also on failure.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("-q", "--quiet", help="Result line and errors only.")
    ] = False,
    verbose: Annotated[
        int, typer.Option("-v", "--verbose", count=True, help="More detail; twice for native logs.")
    ] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Add the traceback to an error.")] = False,
    progress: Annotated[
        str, typer.Option("--progress", help="auto, bar, plain or none.", metavar="MODE")
    ] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Every random choice; recorded.", min=0)] = 0,
    version: Annotated[  # noqa: ARG001 (handled by its callback)
        bool,
        typer.Option(
            "--version", help="Version and layout versions.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """From a vision-language model to a 3-bit TensorRT engine, checked at every step."""
    console: Console = context.obj
    console.as_json, console.quiet, console.verbose = as_json, quiet, verbose
    console.debug, console.progress_mode, console.seed = debug, progress, seed
    if progress not in {"auto", "bar", "plain", "none"}:
        raise typer.BadParameter(
            f"{progress!r} is not one of auto, bar, plain, none", param_hint="--progress"
        )
    console.start(context.invoked_subcommand or "")


Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Folder of a Hugging Face model, or an alias (mbq-export models)."
    ),
]
Out = Annotated[
    Path, typer.Option("-o", "--out", help="Output folder; appears only when complete.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        rich_help_panel=DATA_PANEL,
        help="Calibration manifest (JSON Lines), or builtin:shapes.",
        show_default=False,
    ),
]
Samples = Annotated[
    int, typer.Option("--samples", rich_help_panel=DATA_PANEL, help="Calibration samples.", min=1)
]
TextOnly = Annotated[
    bool,
    typer.Option(
        "--text-only-ok", rich_help_panel=DATA_PANEL, help="Accept calibration data without images."
    ),
]
SkipBad = Annotated[
    int,
    typer.Option(
        "--skip-bad", rich_help_panel=DATA_PANEL, help="Unreadable samples to tolerate.", min=0
    ),
]
IgnoreExtra = Annotated[
    list[str] | None,
    typer.Option(
        "--ignore-extra",
        help="Stored tensors to ignore that belong to no part of the model: a regular expression; repeatable.",
        show_default=False,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace existing output, once the new one is complete.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again instead of resuming.")]
BundlePath = Annotated[Path, typer.Argument(help="A bundle made by build.", metavar="BUNDLE")]
Backend = Annotated[str, typer.Option("--backend", help="ort, or torch for the reference.")]
Runner = Annotated[
    str,
    typer.Option(
        "--backend",
        help="ort; torch for the packed weights on the kernels; rtx or trt for engines, on their device; oracle for "
        "the reference model.",
    ),
]
Lowering = Annotated[
    str | None,
    typer.Option(
        "--lowering",
        help="qdq or reference. Default: qdq, or what the bundle has.",
        show_default=False,
    ),
]


def _sensible(threads: int) -> int:
    """More threads than CPUs wait for each other; thousands of them take the machine down."""
    cpus = os.cpu_count() or 1
    if threads > max(cpus, MOST_THREADS):
        raise typer.BadParameter(f"{threads} threads for {cpus} CPUs")
    return threads


PluginLibraryFile = Annotated[
    Path | None,
    typer.Option(
        "--plugin-lib",
        help="The compiled plugins. Default: the bundle's, else the cache's.",
        show_default=False,
    ),
]
EngineTimeout = Annotated[
    float,
    typer.Option(
        "--engine-timeout",
        help="Of rtx and trt: seconds until an engine that hangs is ended.",
        min=1,
    ),
]
Threads = Annotated[
    int, typer.Option("--threads", help="CPU threads; 0 takes all.", min=0, callback=_sensible)
]


def result_folder(out: Path | None, bundles: Sequence[Path]) -> Path | None:
    """Make the folder for results before the work that leads to them.

    Raises:
        UsageError: E2011 if it lies in a bundle: those are sealed.
        ResourceError: E5008 if it cannot be made.
    """
    if out is not None:
        for bundle in bundles:
            refuse_inside(out, bundle)
        with explained(out):
            out.mkdir(parents=True, exist_ok=True)
    return out


def refuse_unfinished(out: Path) -> None:
    """Refuse a place where a build keeps its finished work: another command would clear it away.

    Raises:
        UsageError: E2011.
    """
    partial = partial_path(out)
    if (partial / STATE_FILE).exists():
        raise UsageError(
            "E2011",
            f"{partial} holds the finished work of a build.",
            why="another command with the same -o would delete it",
            fix=("choose another -o", "finish the build, or delete that folder"),
        )


def patterns(values: list[str] | None, option: str) -> tuple[str, ...]:
    """Check regular expressions.

    Raises:
        BadParameter: If one cannot be read.
    """
    for value in values or ():
        try:
            re.compile(value)
        except re.error as error:
            raise typer.BadParameter(
                f"{value!r} is no regular expression: {error}", param_hint=option
            ) from error
    return tuple(values or ())


def models_folder() -> Path | None:
    """Folder of local models, from the environment."""
    named = os.environ.get("MBQ_EXPORT_MODELS")
    return Path(named).expanduser() if named else None


def numbers(text: str | None, option: str, *, least: int) -> tuple[int, ...]:
    """Read a list such as ``16,64``.

    Raises:
        BadParameter: If a part is no whole number, or too small.
    """
    try:
        found = () if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is no list of whole numbers such as 16,64", param_hint=option
        ) from error
    if found and min(found) < least:
        raise typer.BadParameter(f"{min(found)} is less than {least}", param_hint=option)
    return found
