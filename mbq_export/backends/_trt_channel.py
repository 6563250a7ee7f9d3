"""Messages between the tool and a process that holds an engine: one line of JSON, then the bytes of the arrays it names.

    {"op": "run", ..., "arrays": [["inputs_embeds", "float16", [1, 1, 896]], ...]} newline, bytes  bytes ...

Nothing is ever executed of what is read: a header that is too long or not JSON ends the conversation.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.backends._dtypes import dtype_of

LONGEST_HEADER: Final = 1 << 16
DTYPES: Final = frozenset({"float16", "bfloat16", "float32", "int32", "int64", "int8", "bool"})
ARRAYS: Final = "arrays"


class Closed(Exception):  # noqa: N818  (an end, not an error of ours)
    """The other side has gone, or sent what is no message."""


def send(file: BinaryIO, head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write one message.

    Raises:
        Closed: If nobody reads.
    """
    found = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    listed = [[name, str(array.dtype), list(array.shape)] for name, array in found.items()]
    try:
        file.write(json.dumps({**head, ARRAYS: listed}).encode() + b"\n")
        file.writelines(array.reshape(-1).view(np.uint8).data for array in found.values())
        file.flush()
    except (BrokenPipeError, ValueError) as error:
        raise Closed(str(error)) from error


def receive(file: BinaryIO) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Read one message.

    Returns:
        The header without its list of arrays, and the arrays.

    Raises:
        Closed: At the end of the stream, or if what comes is no message.
    """
    line = file.readline(LONGEST_HEADER)
    try:
        head = json.loads(line)
        listed = head.pop(ARRAYS)
        return head, {name: _array(file, dtype, shape) for name, dtype, shape in listed}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Closed(f"no message: {line[:80]!r}") from error


def _array(file: BinaryIO, dtype: str, shape: list[int]) -> NDArray[Any]:
    if dtype not in DTYPES:
        raise ValueError(dtype)
    found = dtype_of(dtype)
    size = math.prod(shape) * found.itemsize
    data = file.read(size)
    if len(data) < size:
        raise ValueError("short")
    return np.frombuffer(data, found).reshape(shape)
