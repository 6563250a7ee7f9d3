"""Options of ``build`` that shape engines."""

from pathlib import Path
from typing import Annotated, Final

import typer

PANEL: Final = "Engines"

PluginLib = Annotated[
    Path | None,
    typer.Option(
        "--plugin-lib",
        rich_help_panel=PANEL,
        help="Plugin library to load. Default: one that mbq-export plugins build has compiled.",
        show_default=False,
    ),
]
MaxBatch = Annotated[
    int,
    typer.Option(
        "--max-batch",
        rich_help_panel=PANEL,
        help="Most requests in one call of the decoder.",
        min=1,
    ),
]
MaxTiles = Annotated[
    int,
    typer.Option(
        "--max-tiles",
        rich_help_panel=PANEL,
        help="Most picture tiles in one call of the vision engine.",
        min=1,
    ),
]
OptTokens = Annotated[
    int,
    typer.Option(
        "--opt-tokens",
        rich_help_panel=PANEL,
        help="Tokens of the call that kernels are chosen for: 1 is a decode step.",
        min=1,
    ),
]
Workspace = Annotated[
    int,
    typer.Option(
        "--workspace",
        rich_help_panel=PANEL,
        help="MiB of scratch memory that the builder may plan with.",
        min=1,
    ),
]
WeightStreaming = Annotated[
    bool,
    typer.Option(
        "--weight-streaming",
        rich_help_panel=PANEL,
        help="Let the device keep weights in host memory; for small devices.",
    ),
]
TimingCache = Annotated[
    Path | None,
    typer.Option(
        "--timing-cache",
        rich_help_panel=PANEL,
        help="File of kernel times from an earlier build; full TensorRT only, which then writes one beside each engine.",
        show_default=False,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--engine-dtype",
        rich_help_panel=PANEL,
        help="Activations of engines: fp16; bf16, for plugins, w4a8 and the baseline; auto: bf16 if a calibration "
        "sample leaves less than a factor of two to the end of fp16.",
    ),
]
EmbedEngine = Annotated[
    bool,
    typer.Option(
        "--embed-engine",
        rich_help_panel=PANEL,
        help="Also build an engine of the embedding, which the host looks up otherwise.",
    ),
]
OnePlan = Annotated[
    bool,
    typer.Option(
        "--one-plan",
        rich_help_panel=PANEL,
        help="One engine for all :rtx targets, instead of one for each.",
    ),
]
