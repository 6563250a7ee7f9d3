"""Plots of a kernel benchmark as files: bandwidth against the ceiling, speed-up by rows of activations."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from mbq_export.evaluate.plots import Line, lines
from mbq_export.evaluate.svg import Drawing
from mbq_export.writing import write_file

Document = Mapping[str, Any]
NAMESPACE: Final = "http://www.w3.org/2000/svg"
PIXELS: Final = 760
SHOWN: Final = ("CUDA w3a16 g128", "CUDA w4a16 g128", "CUDA w4a8 channel", "Triton w3a16 g128")
BASE: Final = "cuBLAS fp16"
MEGA: Final = 1e6
COLOURS: Final = ("#1f6fb2", "#b85c1a", "#25784f", "#a4478f", "#7a6c14", "#5a6570")
STYLE: Final = (
    "svg{background:#fff;font:11.5px sans-serif}.axis{fill:#5b646e}.grid{stroke:#d9dcd8}"
    + "".join(
        f".line{i}{{fill:none;stroke:{c};stroke-width:2}}.mark{i}{{fill:{c};stroke:{c}}}.fill{i}{{fill:{c}}}"
        for i, c in enumerate(COLOURS)
    )
)
"""A file of its own has no page whose colours it could use."""


def plots(document: Document) -> dict[str, tuple[str, Drawing]]:
    """Title to file name and drawing; nothing where nothing was timed."""
    timed = [row for row in document["rows"] if row["timing"] is not None]
    if not timed:
        return {}
    found = {
        "Bandwidth of one token by size of the layer, with the measured ceiling": (
            "kernels-bandwidth.svg",
            bandwidth(timed, document["ceilings"]["read"]),
        )
    }
    for n, k in sorted({(row["n"], row["k"]) for row in timed}):
        own = [row for row in timed if (row["n"], row["k"]) == (n, k)]
        if len({row["m"] for row in own}) > 1:
            title = f"{n} x {k}: speed-up over cuBLAS fp16 by rows of activations"
            found[title] = (f"kernels-speedup-{n}x{k}.svg", speedup(title, own))
    return found


def bandwidth(timed: Sequence[Document], reads: Sequence[Document]) -> Drawing:
    """GB/s at M = 1 over the size of the weights, and of plain reads of that size."""
    ceiling = [(_log2(read["bytes"] / MEGA), read["gb_s"]) for read in reads]
    curves = [Line(label="measured ceiling", points=sorted(ceiling))]
    for name in (*SHOWN, BASE):
        points = [
            (_log2(row["weight_bytes"] / MEGA), row["gb_s"])
            for row in timed
            if row["entrant"] == name and row["m"] == 1
        ]
        if points:
            curves.append(Line(label=name, points=sorted(points)))
    return lines(
        "Bandwidth of one token", curves, x_title="log2 of weights in MB", y_title="GB/s of weights"
    )


def speedup(title: str, timed: Sequence[Document]) -> Drawing:
    """Time of cuBLAS fp16 over that of our kernels, by M."""
    curves = [
        Line(
            label=name,
            points=sorted((_log2(r["m"]), r["speedup"]) for r in timed if r["entrant"] == name),
        )
        for name in SHOWN
    ]
    shown = [curve for curve in curves if curve.points]
    return lines(title, shown, x_title="log2 of M", y_title="times faster than cuBLAS fp16")


def file_text(drawn: Drawing) -> str:
    """A drawing as a file that needs no page around it."""
    head, _, rest = str(drawn.svg).partition(">")
    opened = head.replace("<svg ", f'<svg xmlns="{NAMESPACE}" width="{PIXELS}" ', 1)
    return f"{opened}><style>{STYLE}</style>{rest}\n"


def write_plots(folder: Path, document: Document) -> dict[str, str]:
    """Write the plots beside the page; return title to file name."""
    found = plots(document)
    for file, drawn in found.values():
        write_file(folder / file, file_text(drawn).encode())
    return {title: file for title, (file, _) in found.items()}


def _log2(value: float) -> float:
    return math.log2(value)
