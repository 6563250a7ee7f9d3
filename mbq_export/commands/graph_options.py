"""Options of ``export`` and ``build`` that shape the decoder graph."""

from typing import Annotated, Final

import typer

PANEL: Final = "Graphs"

OpLevel = Annotated[
    str,
    typer.Option(
        "--op-level",
        rich_help_panel=PANEL,
        help="Operators that graphs for TensorRT may use: opset20 (primitives, from TensorRT 10.3), opset23-attention "
        "(10.14), opset23 or opset24 (10.15); auto takes the highest that all targets read.",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--kv",
        rich_help_panel=PANEL,
        help="Cache of the decoder: concat, or static, which is updated in place and needs opset24. Default: static "
        "for TensorRT where it is read. Of 8 bits there is none: validate --kv-bits 8 tells what it would cost.",
        show_default=False,
    ),
]
