"""The constants of schemes and tiles as a C header, so that kernels and packers cannot disagree.

python -m mbq_export.schemes.layouts.header kernels/include/mbq/layout.h
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mbq_export.errors import InternalError, UsageError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, QuantScheme
from mbq_export.schemes.layouts import tiles, w3t, w4t

COMMAND: Final = "python -m mbq_export.schemes.layouts.header kernels/include/mbq/layout.h"
TILES: Final = (w3t, w4t)

_TOP: Final = f"""\
/*
 * Bits, tiles and layout versions of the kernel library.
 *
 * Generated from mbq_export/schemes; do not edit. Make it again:
 *     {COMMAND}
 * What the bytes of a tile mean: docs/formats/tiles.md. C99 and C++17.
 */
#ifndef MBQ_LAYOUT_H
#define MBQ_LAYOUT_H
"""


def text() -> str:
    """The whole header."""
    return "\n".join([_TOP, *_tiles(), *_schemes(), "#endif", ""])


def main(arguments: list[str]) -> None:
    """Write the header to the one path given.

    Raises:
        UsageError: E2001 unless there is exactly one path.
    """
    if len(arguments) != 1:
        raise UsageError(
            "E2001",
            f"{len(arguments)} paths were given.",
            why="the header is one file",
            fix=COMMAND,
        )
    Path(arguments[0]).write_text(text(), encoding="utf-8", newline="\n")


def _tiles() -> Iterator[str]:
    yield _enum(
        "The version of every tile layout; a tile, and what the lanes of a warp own of it.",
        {
            "MBQ_LAYOUT_VERSION": _version(),
            "MBQ_TILE_ROWS": tiles.TILE_ROWS,
            "MBQ_TILE_COLUMNS": tiles.TILE_COLUMNS,
            "MBQ_LANES": tiles.LANES,
            "MBQ_SLOTS": tiles.SLOTS,
            "MBQ_COLUMN_ALIGNMENT": tiles.COLUMN_ALIGNMENT,
            "MBQ_INT8_FACTOR": tiles.INT8_FACTOR,
        },
    )
    for module in TILES:
        layout = module.LAYOUT
        prefix = f"MBQ_{layout.name.upper()}"
        yield _enum(
            f"Layout {layout.name}.",
            {
                f"{prefix}_BITS": module.BITS,
                f"{prefix}_LANE_WORDS": module.LANE_WORDS,
                f"{prefix}_TILE_BYTES": module.TILE_BYTES,
            },
        )
    order = ", ".join(map(str, w4t.ORDER))
    yield "/* Byte j of four columns of w4t, and of int8 activations, is column order[j]. */"
    yield f"#define MBQ_BYTE_ORDER {{{order}}}\n"


def _version() -> int:
    """The one version of all tile layouts, which the C ABI passes along with a scheme."""
    versions: set[int] = {module.LAYOUT.version for module in TILES}
    if len(versions) > 1:
        raise InternalError(
            "E9001", "Tile layouts have several versions.", why="the header has one number for all"
        )
    return versions.pop()


def _schemes() -> Iterator[str]:
    """Those that kernels read."""
    members = [scheme for scheme in SCHEMES.members().values() if scheme.kernel_layout is not None]
    for scheme in sorted(members, key=lambda scheme: scheme.number):
        yield _enum(
            f"Scheme {scheme.name}. GROUPS: sum of its group sizes; CHANNEL: 1 if it may have one scale per output.",
            _scheme(scheme),
        )


def _scheme(scheme: QuantScheme) -> dict[str, int]:
    prefix = f"MBQ_{scheme.name.upper()}"
    values = {
        f"MBQ_SCHEME_{scheme.name.upper()}": scheme.number,
        f"{prefix}_BITS": scheme.weight_bits,
        f"{prefix}_ACT_BITS": scheme.act_bits,
        f"{prefix}_SYMMETRIC": int(scheme.symmetric),
        f"{prefix}_GROUPS": sum(scheme.group_sizes),
        f"{prefix}_CHANNEL": int(CHANNEL in scheme.group_sizes),
    }
    if scheme.largest_k is not None:
        values[f"{prefix}_LARGEST_K"] = scheme.largest_k
    return values


def _enum(comment: str, values: dict[str, int]) -> str:
    rows = ",\n".join(f"    {name} = {value}" for name, value in values.items())
    return f"/* {comment} */\nenum {{\n{rows}\n}};\n"


if __name__ == "__main__":
    main(sys.argv[1:])
