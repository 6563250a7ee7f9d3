"""Names of the operators, of their plugins' fields and their numbers as a C++ header: the plugins repeat nothing.

python -m mbq_export.export.op_names plugins/common/op_names.h
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from mbq_export.errors import UsageError
from mbq_export.export import ops
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.layouts import LAYOUTS
from mbq_export.schemes.layouts.tiles import TILE_COLUMNS, TILE_ROWS

COMMAND: Final = "python -m mbq_export.export.op_names plugins/common/op_names.h"

_TOP: Final = f"""\
// Names that an ONNX graph and the plugins share.
//
// Generated from mbq_export/export/ops.py; do not edit. Make it again:
//     {COMMAND}
// What inputs and attributes mean: docs/formats/graphs.md. C++17.
#ifndef MBQ_OP_NAMES_H
#define MBQ_OP_NAMES_H

namespace mbq {{

inline constexpr char kPluginNamespace[] = "{ops.PLUGIN_NAMESPACE}";
inline constexpr char kPluginVersion[] = "{ops.PLUGIN_VERSION}";

// Version of the fields in a compiled engine, and the field that holds it: required there, unknown to a graph.
inline constexpr int kPluginAbi = {ops.PLUGIN_ABI};
inline constexpr char kAbiField[] = "{ops.ABI_FIELD}";
"""

_STRUCT: Final = """\
struct OpFacts {
    const char *name;    // ONNX op type and plugin name
    int scheme;          // MBQ_W3A16 ... of mbq.h
    int bits;            // of a code
    int act_bits;        // of an activation; 16 leaves it in its type
    int layout_version;  // of the tiles
    int tile_words;      // 32-bit words of a tile of 16 x 128 codes
    int inputs;          // without the bias: x, qweight, scales, and zeros where there are any
    bool has_zeros;
};
"""


def text() -> str:
    """The whole header."""
    return "\n".join([_TOP, *_fields(), _STRUCT, *_ops(), "}  // namespace mbq", "", "#endif", ""])


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


def _fields() -> Iterator[str]:
    for name in ops.PLUGIN_FIELDS:
        yield f'inline constexpr char {_field(name)}[] = "{name}";'
    names = ", ".join(map(_field, ops.PLUGIN_FIELDS))
    yield "\n// What a creator declares: 32-bit integers, each of length 1, all required."
    yield f"inline constexpr const char *kFields[] = {{\n    {names}}};"
    yield f"inline constexpr int kFieldCount = {len(ops.PLUGIN_FIELDS)};\n"


def _field(name: str) -> str:
    """Constant of a field: ``group_size`` is ``kFieldGroupSize``."""
    return "kField" + "".join(f"{word[0].upper()}{word[1:]}" for word in name.split("_"))


def _ops() -> Iterator[str]:
    for scheme, tiles in ops.PLUGINS.items():
        op = ops.OPS[scheme]
        numbers = (
            SCHEMES[scheme].number,
            op.bits,
            op.act_bits,
            LAYOUTS[tiles].version,
            TILE_ROWS * TILE_COLUMNS * op.bits // 32,
            len(op.inputs),
        )
        values = ", ".join([f'"{op.name}"', *map(str, numbers), str(not op.symmetric).lower()])
        yield f"inline constexpr OpFacts k{op.name} = {{{values}}};"
    names = ", ".join(f"k{ops.OPS[scheme].name}" for scheme in ops.PLUGINS)
    yield f"inline constexpr OpFacts kOps[] = {{{names}}};\n"


if __name__ == "__main__":
    main(sys.argv[1:])
