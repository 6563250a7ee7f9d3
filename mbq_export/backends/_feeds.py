"""What every engine checks before it runs: are the feeds those that its inputs describe?"""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from mbq_export.backends._dtypes import dtype_of, is_float
from mbq_export.backends.base import TensorSpec
from mbq_export.errors import FormatError


def checked_feeds(
    specs: Sequence[TensorSpec], feeds: Mapping[str, NDArray[Any]], *, name: str
) -> dict[str, NDArray[Any]]:
    """Compare feeds with what a graph wants; cast floats to its float type.

    Raises:
        FormatError: E4102, naming the tensor, what was found and what is expected.
    """
    unknown = sorted(set(feeds) - {spec.name for spec in specs})
    if unknown:
        raise _misfit(
            name, unknown[0], "given", f"inputs: {', '.join(spec.name for spec in specs)}"
        )
    checked = {}
    for spec in specs:
        if spec.name not in feeds:
            raise _misfit(name, spec.name, "missing", f"{spec.dtype} {list(spec.shape)}")
        value = feeds[spec.name]
        fits = len(value.shape) == len(spec.shape) and all(
            isinstance(size, str) or size == found
            for size, found in zip(spec.shape, value.shape, strict=True)
        )
        wanted = dtype_of(spec.dtype)
        if value.dtype != wanted:
            fits &= is_float(value.dtype) and is_float(wanted)
        if not fits:
            found = f"{value.dtype} {list(value.shape)}"
            raise _misfit(name, spec.name, found, f"{spec.dtype} {list(spec.shape)}")
        checked[spec.name] = value.astype(wanted, copy=False)
    return checked


def _misfit(graph: str, tensor: str, found: str, expected: str) -> FormatError:
    return FormatError(
        "E4102",
        f"Input {tensor} of {graph} is {found}.",
        why=f"expected {expected}",
        fix="use the bundle's own processor and graphs together",
    )
