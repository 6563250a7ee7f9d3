"""Run the program as a user does, in this process or in a child that can be killed."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbq_export.commands import app
from mbq_export.commands.console import Console, run_guarded
from mbq_export.commands.options import hoist_globals

ROOT = Path(__file__).parents[1]
PROGRAM = (sys.executable, str(ROOT / "cli.py"))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def code(self) -> str:
        """Code of the error, without its prefix."""
        return str(self.document["error"]["code"]).removeprefix("MBQ-")


@contextmanager
def own_logging() -> Iterator[None]:
    """Undo what a console does to the package's logger, which other tests listen to."""
    logger = logging.getLogger("mbq_export")
    before = logger.handlers, logger.propagate, logger.level
    try:
        yield
    finally:
        logger.handlers, logger.propagate, logger.level = before


def run(*arguments: object) -> Outcome:
    """Run one command in this process, in JSON mode."""
    return tell("--json", *arguments)


def tell(*arguments: object) -> Outcome:
    """Run one command in this process, as a person sees it."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), own_logging():
        status = run_guarded(app, hoist_globals([*map(str, arguments)]), Console())
    return Outcome(status=status, out=out.getvalue(), err=err.getvalue())
