"""The option that says how much memory a calibration may take, and how sizes are typed."""

import re
from typing import Annotated, Final

import typer

from mbq_export.commands.options import DATA_PANEL

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

MaxRam = Annotated[
    str | None,
    typer.Option(
        "--max-ram",
        rich_help_panel=DATA_PANEL,
        help="Memory that calibration may take, for example 12GiB; where its plan exceeds that, rows of the blocks wait "
        "on disk beside the output. Default: what the machine or its container has left.",
        show_default=False,
    ),
]


def max_ram(text: str | None) -> int | None:
    """Bytes that the user typed; None where the option was left out.

    Raises:
        BadParameter: If it is no size.
    """
    if text is None:
        return None
    return size(text, option="--max-ram")


def size(text: str, *, option: str) -> int:
    """Bytes as a user typed them.

    Args:
        text: A number, with or without a unit.
        option: Where it was typed.

    Raises:
        BadParameter: If it is no size.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise typer.BadParameter(
            f"{text!r} is no size such as 500MB, 12GiB or 2000000000", param_hint=option
        )
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[prefix.lower()])
