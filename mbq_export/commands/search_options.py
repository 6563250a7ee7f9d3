"""Options of the search for channel scales: what a candidate is made of, and what its error is weighed by."""

from pathlib import Path
from typing import Annotated, Final

import typer

PANEL: Final = "Search"
MEASURED: Final = "auto"

Stat = Annotated[
    str | None,
    typer.Option(
        "--stat",
        rich_help_panel=PANEL,
        help="What the size of a channel is: the mean over all tokens (mixed), over answer tokens, over vision tokens, "
        "or balanced: both, vision by its ratio. Default: by method.",
        show_default=False,
    ),
]
Loss = Annotated[
    str | None,
    typer.Option(
        "--loss",
        rich_help_panel=PANEL,
        help="Error of a module's output: mae or mse. Default: by method.",
        show_default=False,
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(
        "--grid",
        rich_help_panel=PANEL,
        help="Exponents: 21 from 0 to 1, 20 without 1, as published, or auto: 11 where plain rounding costs least, "
        "else 21. Default: by method.",
        show_default=False,
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        rich_help_panel=PANEL,
        help="Inputs of the search: fp, or quantized, as blocks before leave them once rounded. Default: fp.",
        show_default=False,
    ),
]
GqaOScale = Annotated[
    bool | None,
    typer.Option(
        "--gqa-o-scale/--no-gqa-o-scale",
        rich_help_panel=PANEL,
        help="Scale attention outputs where query heads share a value head, too. Default: by method.",
        show_default=False,
    ),
]
RatioFloor = Annotated[
    str | None,
    typer.Option(
        "--r-floor",
        rich_help_panel=PANEL,
        help="Least ratio of a layer: median over the layers, none, or a number. Default: median.",
        show_default=False,
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        rich_help_panel=PANEL,
        help="Tokens of each class that every candidate is scored on: a number, or all. Default: 512.",
        show_default=False,
    ),
]
PromptWeight = Annotated[
    str | None,
    typer.Option(
        "--search-prompt-weight",
        rich_help_panel=PANEL,
        help="Weight of prompt tokens: 0, or measured. Default: 0.",
        show_default=False,
    ),
]
ModalityWeight = Annotated[
    str | None,
    typer.Option(
        "--modality-weight",
        rich_help_panel=PANEL,
        help="Weight of vision tokens in every layer: a number, or auto for the measured ratios. Default: auto.",
        show_default=False,
    ),
]
Ratios = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        rich_help_panel=PANEL,
        help="An edited sensitivity.json to use in place of a measurement.",
        show_default=False,
    ),
]


def switches(
    *,
    r_floor: str | None,
    tokens: str | None,
    modality_weight: str | None,
    **chosen: str | bool | None,
) -> dict[str, str | float | bool]:
    """Switches of the search that the user replaced.

    Args:
        r_floor: As typed, like all others: None where the option was left out.
        tokens: A number or ``all``.
        modality_weight: A number or ``auto``, which is no choice.
        chosen: Switches that are one of some words, by name; whoever resolves them knows the words.

    Raises:
        BadParameter: For a number that is none.
    """
    found: dict[str, str | float | bool] = {
        name: value for name, value in chosen.items() if value is not None
    }
    if tokens is not None:
        found["tokens"] = (
            tokens if tokens == "all" else int(_number(tokens, "--tokens", whole=True))
        )
    if r_floor is not None:
        words = {"median", "none"}
        found["r_floor"] = r_floor if r_floor in words else _number(r_floor, "--r-floor")
    if modality_weight not in {None, MEASURED}:
        found["modality_weight"] = _number(str(modality_weight), "--modality-weight")
    return found


def _number(text: str, option: str, *, whole: bool = False) -> float:
    words = {"--tokens": "all", "--r-floor": "median, none", "--modality-weight": MEASURED}[option]
    try:
        return int(text) if whole else float(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is neither a {'whole ' if whole else ''}number nor {words}",
            param_hint=option,
        ) from error
