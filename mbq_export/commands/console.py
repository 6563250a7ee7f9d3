"""What a person or a script sees: tables, one result, one last line, one JSON document.

Results go to stdout, everything else to stderr. In JSON mode stdout holds exactly one document, also on
failure. The last line is fixed for scripts: ``OK  <command>  <what>`` or ``FAILED  <command>  <code>  <text>``.
"""

import itertools
import json
import logging
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Final

import typer

from mbq_export import __version__
from mbq_export.commands.bars import open_progress
from mbq_export.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    InternalError,
    MachineError,
    MbqError,
    UsageError,
)
from mbq_export.progress import Progress

PROGRAM: Final = "mbq-export"
RESULT_SCHEMA: Final = "mbq-export/result@1"
SHOWN_CHARACTERS: Final = 400
WARNING_CODE: Final = re.compile(r"^(?:MBQ-)?(W\d{4}):\s*(.*)", re.DOTALL)
CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@dataclass
class Console:
    """The state of one run of the program.

    Attributes:
        as_json: Print one JSON document instead of text.
        quiet: Print the result line and errors only.
        verbose: 0, 1 or 2.
        debug: Add tracebacks to errors.
        progress_mode: ``auto``, ``bar``, ``plain`` or ``none``.
        seed: Every random choice.
        resume: Command that continues an interrupted run, if there is one.
    """

    as_json: bool = False
    quiet: bool = False
    verbose: int = 0
    debug: bool = False
    progress_mode: str = "auto"
    seed: int = 0
    resume: str = ""
    command: str = ""
    warnings: list[dict[str, str]] = field(default_factory=list)
    repeated: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def start(self, command: str) -> None:
        """Begin a command: logs of the library become warnings and details on stderr."""
        self.command = command
        logger = logging.getLogger("mbq_export")
        logger.handlers = [_Listener(self)]
        logger.propagate = False
        logger.setLevel(logging.DEBUG if self.verbose > 1 else logging.INFO)

    def note(self, text: str) -> None:
        """Say on stderr where the work stands."""
        if not self.quiet:
            sys.stderr.write(f"{_shown(text, limit=None)}\n")

    def hint(self, text: str) -> None:
        """Name an option that would change things."""
        self.note(f"hint: {text}")

    def warn(self, code: str, text: str) -> None:
        """Keep a warning for the JSON document and show it; the same once more is only counted."""
        warning = {"code": f"MBQ-{code}", "text": text}
        if warning in self.warnings:
            self.repeated[warning["code"]] += 1
            return
        self.warnings.append(warning)
        self.note(f"warning[MBQ-{code}]: {text}")

    def text(self, text: str = "") -> None:
        """Print a line of the result."""
        if not self.as_json and not self.quiet:
            sys.stdout.write(f"{text}\n")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table, numbers to the right."""
        if self.as_json or self.quiet:
            return
        for line in table_lines(header, rows):
            sys.stdout.write(f"{line}\n")

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress]:
        """Show a bar with an ETA on a terminal, a line per 10 s or 10 % elsewhere."""
        with open_progress(title, mode="none" if self.quiet else self.progress_mode) as report:
            yield report

    def finish(self, result: dict[str, Any], what: str) -> None:
        """Print the result and the last line."""
        self._tell_repeated()
        if self.as_json:
            self._document(ok=True, status=EXIT_OK, result=result, error=None)
        else:
            sys.stdout.write(f"OK  {self.command}  {what}\n")
        sys.stdout.flush()

    def fail(self, error: MbqError, result: dict[str, Any] | None = None) -> int:
        """Print an error with its four parts and the last line; return the exit status."""
        self._tell_repeated()
        message = _shown(error.message)
        if not self.as_json:
            sys.stderr.write(f"error[MBQ-{error.code}]: {message}\n")
            if error.where:
                sys.stderr.write(f"  where   {_shown(', '.join(error.where))}\n")
            if error.why:
                sys.stderr.write(f"  why     {_shown(error.why, limit=None)}\n")
            for fix in error.fix:
                sys.stderr.write(f"  fix     {_shown(fix)}\n")
            sys.stderr.write(f"  more    mbq-export explain MBQ-{error.code}\n")
        if self.debug:
            traceback.print_exception(error)
        if self.as_json:
            described = {
                "code": f"MBQ-{error.code}",
                "class": error.kind,
                "exit": error.exit_status,
                "message": error.message,
                "where": error.where,
                "why": error.why,
                "fix": list(error.fix),
                "context": error.context,
            }
            self._document(ok=False, status=error.exit_status, result=result or {}, error=described)
        sys.stderr.write(f"FAILED  {self.command or PROGRAM}  MBQ-{error.code}  {message}\n")
        return error.exit_status

    def interrupted(self, message: str) -> None:
        """Print the JSON document of a run that was asked to end."""
        error: dict[str, Any] = {
            "code": None,
            "class": "interrupted",
            "exit": EXIT_INTERRUPTED,
            "message": message,
            "where": [],
            "why": "",
            "fix": [self.resume] if self.resume else [],
            "context": {},
        }
        self._document(ok=False, status=EXIT_INTERRUPTED, result={}, error=error)

    def _tell_repeated(self) -> None:
        for code, count in self.repeated.items():
            self.note(f"warning[{code}]: {count} more like one above")
        self.repeated.clear()

    def _document(
        self, *, ok: bool, status: int, result: dict[str, Any], error: dict[str, Any] | None
    ) -> None:
        document = {
            "schema": RESULT_SCHEMA,
            "command": self.command,
            "ok": ok,
            "exit": status,
            "version": __version__,
            "seconds": round(time.monotonic() - self.started, 3),
            "result": result,
            "warnings": self.warnings,
            "error": error,
        }
        sys.stdout.write(json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n")


def run_guarded(app: Callable[..., object], argv: list[str], console: Console) -> int:
    """Run a Typer app and turn whatever happens into one exit status."""
    # Known before the options are read: a wrong one is a document too.
    console.as_json |= "--json" in itertools.takewhile(lambda word: word != "--", argv)
    try:
        outcome = app(argv or ["--help"], prog_name=PROGRAM, standalone_mode=False, obj=console)
    except MbqError as error:
        return console.fail(error)
    except typer.TyperException as error:
        return console.fail(usage_error(error, argv))
    except (KeyboardInterrupt, typer.Abort):
        outcome = EXIT_INTERRUPTED
    except (
        SystemExit
    ):  # Typer's own end: a completion was printed, or the reader of a pipe has gone
        outcome = EXIT_OK
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        outcome = EXIT_OK
    except ModuleNotFoundError as error:
        return console.fail(_not_installed(error) or _crash(error))
    except Exception as error:  # noqa: BLE001 (the one place: a bug must not look like a traceback)
        return console.fail(_crash(error))
    if outcome == EXIT_INTERRUPTED:  # Typer may turn an interrupt into a returned status itself
        _say_interrupted(console)
    return outcome if isinstance(outcome, int) else EXIT_OK


def usage_error(error: typer.TyperException, argv: Sequence[str]) -> UsageError:
    """Turn a wrong option into an error of ours, which names the value and the command's help."""
    context = getattr(error, "ctx", None)
    path = PROGRAM if context is None else context.command_path
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    value = _typed(argv, getattr(getattr(error, "param", None), "opts", ()))
    if value and value not in message:
        message = f"{message} (got {value!r})"
    return UsageError(
        "E2003", message, why="see the options this command takes", fix=f"{path} --help"
    )


def _typed(argv: Sequence[str], names: Sequence[str]) -> str:
    """Return what was typed behind an option, or nothing."""
    for word, following in itertools.pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return ""


def counted(things: Sized, noun: str) -> str:
    """Write ``1 bundle`` or ``3 bundles``."""
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


def table_lines(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lay out a table: columns two spaces apart, numbers to the right with four digits, - for nothing."""
    cells = [[_shown(_cell(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    right = [
        any(isinstance(row[column], int | float) for row in rows)
        and all(isinstance(row[column], int | float | None) for row in rows)
        for column in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _say_interrupted(console: Console) -> None:
    message = "interrupted, finished work is kept"
    sys.stderr.write(f"\n{message}\n")
    if console.resume:
        sys.stderr.write(f"resume with: {console.resume}\n")
    if console.as_json:
        console.interrupted(message)
    sys.stderr.write(f"FAILED  {console.command or PROGRAM}  {EXIT_INTERRUPTED}  interrupted\n")


def _not_installed(error: ModuleNotFoundError) -> MachineError | None:
    """Name the package of somebody else that is missing; None if the module is one of ours."""
    package = (error.name or "").partition(".")[0]
    if package in {"", "mbq_export"}:
        return None
    return MachineError(
        "E3007",
        f"The Python package {package} is not installed.",
        why=f"mbq-export needs it, and this is {sys.executable}",
        fix=('pip install "mbq-export[cpu]"', "mbq-export doctor"),
    )


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _crash(error: Exception) -> InternalError:
    """Write versions and traceback, no content, to a file the user can send."""
    path = Path(gettempdir()) / f"mbq-export-crash-{os.getpid()}.txt"
    versions = [f"{name} {_version_of(name)}" for name in ("torch", "onnx", "numpy")]
    trace = "".join(traceback.format_exception(error))
    path.write_text(f"mbq-export {__version__}\n{'; '.join(versions)}\n{trace}")
    crash = InternalError(
        "E9001",
        f"{type(error).__name__}: {error}",
        why="this is a bug of ours, not of your input",
        fix=f"report it with {path}",
    )
    crash.__cause__ = error
    return crash


def _shown(text: str, limit: int | None = SHOWN_CHARACTERS) -> str:
    """Escape control characters and cut long values, so that input cannot drive the terminal."""
    escaped = CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
    return escaped if limit is None or len(escaped) <= limit else escaped[: limit - 1] + "…"


class _Listener(logging.Handler):
    """Sends the library's log to the console: coded warnings are kept for the JSON document."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        coded = WARNING_CODE.match(text)
        if coded:
            self.console.warn(coded.group(1), coded.group(2))
        elif record.levelno >= logging.WARNING or self.console.verbose:
            self.console.note(text)
