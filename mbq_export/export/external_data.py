"""Constants outside the graph file: where a graph says they are, and whether that may be believed.

The libraries disagree: one follows a link out of the folder, another reads a garbage offset as 0. So every record is
checked here before any of them sees the file:

    location   a plain file name in the graph's folder; a regular file with one name, no link
    offset     a whole number, a multiple of the element size
    length     a whole number, exactly what dtype and shape need, inside the file
    ranges     in one file they do not overlap
"""

import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Final, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from mbq_export.errors import FormatError, located

KEYS: Final = frozenset({"location", "offset", "length", "checksum"})
LONGEST_NUMBER: Final = 19
"""Digits of an offset or length: as many as a signed 64-bit number has."""
_AGAIN: Final = "export the model again"

BITS: Final[dict[int, int]] = {
    TensorProto.FLOAT: 32,
    TensorProto.UINT8: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT16: 16,
    TensorProto.INT16: 16,
    TensorProto.INT32: 32,
    TensorProto.INT64: 64,
    TensorProto.BOOL: 8,
    TensorProto.FLOAT16: 16,
    TensorProto.DOUBLE: 64,
    TensorProto.UINT32: 32,
    TensorProto.UINT64: 64,
    TensorProto.BFLOAT16: 16,
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
}
"""Width of an element of every type that a constant may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Bytes of one constant.

    Attributes:
        tensor: Its name.
        path: The file.
        offset: First byte.
        length: Number of bytes.
    """

    tensor: str
    path: Path
    offset: int
    length: int


def elements(tensor: TensorProto) -> int:
    """Number of elements, exact however large the sizes are."""
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def size_of(tensor: TensorProto) -> int:
    """Bytes that dtype and shape need; nibbles are rounded up to whole bytes."""
    return -(-elements(tensor) * BITS[tensor.data_type] // 8)


def checked_places(model: onnx.ModelProto, folder: Path) -> dict[str, Place]:
    """Check every record of a graph and return the places by tensor name.

    Args:
        model: The graph, external data not loaded, dtypes and sizes already checked.
        folder: Folder of the graph file.

    Raises:
        FormatError: E4401 for a location outside the folder, E4402 for a link, E4403 for anything else.
    """
    places = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            with located(tensor.name):
                places[tensor.name] = _place(tensor, folder)
    by_file: dict[Path, list[Place]] = defaultdict(list)
    for place in places.values():
        by_file[place.path].append(place)
    for found in by_file.values():
        _check_overlap(found)
    return places


def read_array(tensor: TensorProto, place: Place | None) -> NDArray[np.generic]:
    """Read a constant of a byte-sized type, inline or from its checked place."""
    if place is None:
        return onnx.numpy_helper.to_array(tensor)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    with place.path.open("rb") as file:
        file.seek(place.offset)
        flat = np.fromfile(file, dtype, elements(tensor))
    return flat.reshape(tuple(tensor.dims))


def check_regular(path: Path) -> None:
    """Refuse links of both kinds, and everything that is no file.

    Raises:
        FormatError: E4402.
    """
    try:
        status = path.lstat()
    except OSError as error:
        raise FormatError(
            "E4403",
            f"{path.name} cannot be read: {error.strerror}.",
            why="constants lie beside the graph that uses them",
            fix="copy all files of the folder, or export the model again",
        ) from error
    links = status.st_nlink
    if not S_ISREG(status.st_mode) or links > 1:
        kind = f"a file with {links} names" if S_ISREG(status.st_mode) else "a link or no file"
        raise FormatError(
            "E4402",
            f"{path.name} is {kind}.",
            why="runtimes disagree on whether they follow links, so graphs and their data are plain files",
            fix=f"copy the file: cp --dereference {path.name} NEW",
        )


def _place(tensor: TensorProto, folder: Path) -> Place:
    record: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key not in KEYS or entry.key in record:
            _refuse(
                f"external data has the key {entry.key[:40]!r} that it must not have or has twice"
            )
        record[entry.key] = entry.value
    location = record.get("location", "")
    _check_location(location)
    path = folder / location
    check_regular(path)
    offset, length = _number(record, "offset"), _number(record, "length", size_of(tensor))
    needed, size = size_of(tensor), path.stat().st_size
    if length != needed:
        _refuse(f"{length} bytes are declared, but dtype and shape need {needed}")
    if offset + length > size:
        _refuse(f"bytes {offset} to {offset + length} are declared, but {location} has {size}")
    step = max(1, BITS[tensor.data_type] // 8)
    if offset % step:
        _refuse(f"offset {offset} is no multiple of the element size {step}")
    return Place(tensor=tensor.name, path=path, offset=offset, length=length)


def _check_location(location: str) -> None:
    """A plain name: no folder, drive, scheme, or character that some system reads as one."""
    if not location or location in {".", ".."} or any(bad in location for bad in "/\\:\0"):
        raise FormatError(
            "E4401",
            f"External data lies at {location[:200]!r}.",
            why="constants lie in the graph's own folder, under a plain file name",
            fix=_AGAIN,
        )


def _number(record: dict[str, str], key: str, default: int = 0) -> int:
    text = record.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER):
        _refuse(f"{key} is {text[:40]!r}, no whole number")
    return int(text)


def _check_overlap(places: list[Place]) -> None:
    ordered = sorted(places, key=lambda place: (place.offset, place.length))
    for first, second in itertools.pairwise(ordered):
        if first.offset + first.length > second.offset and first.length and second.length:
            _refuse(f"{first.tensor} and {second.tensor} overlap in {first.path.name}")


def _refuse(what: str) -> NoReturn:
    raise FormatError(
        "E4403",
        f"{what[0].upper()}{what[1:]}.",
        why="every constant has its own bytes, all of them inside the data file",
        fix=_AGAIN,
    )
