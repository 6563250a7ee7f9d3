"""Options that decide a checkpoint's numbers: format, method, rounding."""

from pathlib import Path
from typing import Annotated, Final

import typer

PANEL: Final = "Numbers"
CHANNEL: Final = "channel"

WeightBits = Annotated[
    int | None,
    typer.Option(
        "--wbits",
        rich_help_panel=PANEL,
        help="Weight bits: 3, 4, 8, or 16 for the unquantized baseline; 2 with --fake-quant.",
    ),
]
Scheme = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        rich_help_panel=PANEL,
        help="w3a16, w4a16 and w8a16 say the same as --wbits; w4a8 and w8a8 also round activations to 8 bits. With "
        "--fake-quant also w4a4, w6a6 and w2a16.",
        show_default=False,
    ),
]
GroupSize = Annotated[
    str | None,
    typer.Option(
        "--group-size",
        rich_help_panel=PANEL,
        help="Columns that share a scale: 32, 64, 128, or channel. Default: 128; 64 for w2a16; channel for w4a8, "
        "whose 128 has no qdq form, and the only one of other symmetric formats.",
        show_default=False,
    ),
]
HeadBits = Annotated[
    int,
    typer.Option(
        "--lm-head-bits",
        rich_help_panel=PANEL,
        help="Bits of the output head: 16 keeps it, 8 is one scale per row, 4 is groups of 128. A head that was the "
        "embedding becomes a tensor of its own.",
    ),
]
VisionBits = Annotated[
    int,
    typer.Option(
        "--vision-bits",
        rich_help_panel=PANEL,
        help="Bits of the vision tower: 16 keeps it, 8 is w8a8: weights per channel, activations per token.",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        rich_help_panel=PANEL,
        help="rtn, smoothquant, awq, gptq, mbq, mbq+: mbq with error feedback, or qvlm: mbq with ranges searched "
        "for several halves of blocks together.",
    ),
]
Compat = Annotated[
    str,
    typer.Option(
        "--compat",
        rich_help_panel=PANEL,
        help="mbq: the published code's exact arithmetic; none: ours.",
    ),
]
Rounding = Annotated[
    str | None,
    typer.Option(
        "--rounding",
        rich_help_panel=PANEL,
        help="nearest, or gptq for error feedback on the calibration data. Default: by method.",
        show_default=False,
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        "--clip",
        rich_help_panel=PANEL,
        help="group: shrink each group's range where that lowers its weighed rounding error on the calibration data; "
        "none. Default: group for awq, else none.",
        show_default=False,
    ),
]
Hessian = Annotated[
    str | None,
    typer.Option(
        "--hessian",
        rich_help_panel=PANEL,
        help="What error feedback weighs tokens by: plain, balanced, or auto for what serves held-out samples.",
        show_default=False,
    ),
]
GptqPrefix = Annotated[
    str | None,
    typer.Option(
        "--gptq-prefix",
        rich_help_panel=PANEL,
        help="Inputs of error feedback: quantized, as the blocks before leave them, or fp.",
        show_default=False,
    ),
]
Asym = Annotated[
    str | None,
    typer.Option(
        "--asym",
        rich_help_panel=PANEL,
        help="How far error feedback aims at the full-precision output: 0 to 1, or auto for what serves held-out "
        "samples.",
        show_default=False,
    ),
]
Damp = Annotated[
    float | None,
    typer.Option(
        "--damp",
        rich_help_panel=PANEL,
        help="Share of its mean diagonal that a Hessian is damped with. Default: 0.01.",
        min=0.0,
        show_default=False,
    ),
]
SearchScope = Annotated[
    str | None,
    typer.Option(
        "--search-scope",
        rich_help_panel=PANEL,
        help="linear, or block: one factor for the ranges of each half of a block, chosen for up to three neighbouring "
        "halves together on the calibration data. Default: by method.",
        show_default=False,
    ),
]
QvlmMeasure = Annotated[
    str | None,
    typer.Option(
        "--qvlm-measure",
        rich_help_panel=PANEL,
        help="What groups halves for that: conditional-entropy or mutual-info of neighbours. Default: the first.",
        show_default=False,
    ),
]
SearchAlpha = Annotated[
    bool | None,
    typer.Option(
        "--search-alpha/--no-search-alpha",
        rich_help_panel=PANEL,
        help="Let that search move the exponents of channel scales by a step, too. Default: no.",
        show_default=False,
    ),
]
FakeQuant = Annotated[
    bool,
    typer.Option(
        "--fake-quant",
        rich_help_panel=PANEL,
        help="Evaluate only: a checkpoint, its exact match and its KL to full precision on held-out questions; no "
        "graphs, no engines. For formats that have no kernel, and for a first look at any.",
    ),
]
ImportScales = Annotated[
    Path | None,
    typer.Option(
        "--import-scales",
        rich_help_panel=PANEL,
        help="Published channel scales of MBQ or AWQ instead of a search: a .safetensors made by "
        "samples/convert_mbq_scales.py.",
        show_default=False,
    ),
]


def switches(compat: str = "none", **chosen: str | float | None) -> dict[str, str | float]:
    """Switches of a method that the user replaced.

    Args:
        compat: As typed.
        chosen: Other switches by name as typed, None where the option was left out.

    Raises:
        BadParameter: If compat is not ``none`` or ``mbq``, or asym neither ``auto`` nor a number.
    """
    if compat not in {"none", "mbq"}:
        raise typer.BadParameter(f"{compat!r} is not one of none, mbq", param_hint="--compat")
    found = {name: value for name, value in chosen.items() if value is not None}
    asym = found.get("asym")
    if isinstance(asym, str) and asym != "auto":
        try:
            found["asym"] = float(asym)
        except ValueError as error:
            raise typer.BadParameter(
                f"{asym!r} is neither a number nor auto", param_hint="--asym"
            ) from error
    return found if compat == "none" else {"compat": compat, **found}


def group_size(text: str | None) -> int | None:
    """Columns that share a scale, 0 for ``channel``; None for the scheme's own.

    Raises:
        BadParameter: If it is neither ``channel`` nor a number.
    """
    if text is None or text == CHANNEL:
        return None if text is None else 0
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(
            f"{text!r} is neither a number of columns nor {CHANNEL}", param_hint="--group-size"
        )
    return int(text)
