"""Say what an error or warning code means, offline."""

import difflib
import tomllib
from importlib import resources
from typing import Annotated, Any

import typer

from mbq_export.commands.console import Console
from mbq_export.errors import UsageError


def command(
    context: typer.Context,
    code: Annotated[str, typer.Argument(help="For example MBQ-E2004.", metavar="CODE")],
) -> None:
    """Explain an error code: its cause, how people met it, and what to type."""
    console: Console = context.obj
    entry = entry_of(code)
    console.text(f"{code.upper().removeprefix('MBQ-')}  {entry['cause']}")
    for title in ("triggers", "fix"):
        console.text(f"\n{title}")
        for line in entry[title]:
            console.text(f"  - {line}")
    console.finish({"code": code, **entry}, what=code)


def known_codes() -> dict[str, Any]:
    """Every code with its cause, triggers and fixes, from the package's data."""
    return tomllib.loads(resources.files("mbq_export").joinpath("codes.toml").read_text("utf-8"))


def entry_of(code: str) -> dict[str, Any]:
    """Find one code.

    Raises:
        UsageError: E2001 with the nearest known code.
    """
    codes = known_codes()
    wanted = code.upper().removeprefix("MBQ-")
    if wanted in codes:
        entry: dict[str, Any] = codes[wanted]
        return entry
    near = difflib.get_close_matches(wanted, codes, n=1)
    raise UsageError(
        "E2001",
        f"Unknown code {code!r}.",
        why=f"codes look like MBQ-E2004; {len(codes)} are known",
        fix=f"mbq-export explain MBQ-{near[0]}" if near else "copy the code from the error",
    )
