"""Safetensors files without a framework: mapped reading, and bytes that depend on the tensors alone.

    8 bytes   length of the header, little-endian
    header    JSON: name -> dtype, shape, [start, end); "__metadata__" first; padded with spaces to 8 bytes
    data      widest dtype first, then by name, no holes

The library of that name reads these files too; it is not used for writing because it stores two metadata
entries in an order of its own, so equal input would not give equal bytes.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mbq_export.errors import FormatError
from mbq_export.reading import TensorEntry, safetensors_header
from mbq_export.writing import explained, partial_path

ALIGNMENT: Final = 8
BFLOAT16: Final[np.dtype[Any]] = np.dtype(ml_dtypes.bfloat16)
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A finished file.

    Attributes:
        size: Bytes.
        sha256: Hash of them.
    """

    size: int
    sha256: str


class TensorFile:
    """A safetensors file, header checked; tensors are read-only views of the mapped file."""

    def __init__(self, path: Path) -> None:
        """Read and check the header.

        Raises:
            FormatError: E4101 for a file that is no sound safetensors file.
        """
        self.path = path
        self.entries: Mapping[str, TensorEntry] = safetensors_header(path)

    def array(self, name: str) -> NDArray[Any]:
        """Return a tensor without reading it: pages come in when they are touched.

        Raises:
            FormatError: E4103 if there is none of that name, E4102 if its dtype is not among `DTYPES`.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise FormatError(
                "E4103",
                f"{self.path.name} has no tensor {name!r}.",
                why=f"it holds {len(self.entries)} tensors",
                fix="quantize the model again",
            )
        if entry.dtype not in DTYPES:
            raise FormatError(
                "E4102",
                f"Tensor {name!r} has dtype {entry.dtype}.",
                why=f"known: {', '.join(DTYPES)}",
                fix="quantize the model again",
            )
        data = self._bytes[entry.start : entry.end]
        return data.view(DTYPES[entry.dtype]).reshape(entry.shape)

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.asarray(np.memmap(self.path, np.uint8, "r"))


def write_tensors(
    path: Path, tensors: Mapping[str, NDArray[Any]], *, metadata: Mapping[str, str] | None = None
) -> Written:
    """Write a file whole or not at all, mode 0644, synced.

    Args:
        path: The final name.
        tensors: Arrays of the dtypes in `DTYPES`, any order; bfloat16 as ``ml_dtypes`` has it.
        metadata: Strings for the header.

    Raises:
        ResourceError: E5001 if the disk is full, E5008 if the place is not writable.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    head = memoryview(_header(((name, tensors[name]) for name in order), metadata or {}))
    digest, size = hashlib.sha256(), 0
    staged = partial_path(path)
    with explained(path):
        with staged.open("wb") as file:
            for piece in itertools.chain([head], (_bytes_of(tensors[name]) for name in order)):
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        staged.chmod(0o644)
        staged.replace(path)
    return Written(size=size, sha256=digest.hexdigest())


def _header(tensors: Iterable[tuple[str, NDArray[Any]]], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name, array in tensors:
        end = start + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.newbyteorder("<")],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(array: NDArray[Any]) -> memoryview:
    # Through uint8: memoryview does not know bfloat16.
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(-1)
    return flat.view(np.uint8).data
