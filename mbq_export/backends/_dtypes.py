"""Element types by numpy's name, with the one that numpy itself lacks: bfloat16, which ``ml_dtypes`` gives it."""

from typing import Any

import numpy as np

from mbq_export.tensor_file import BFLOAT16


def dtype_of(name: str) -> np.dtype[Any]:
    """Element type of a name such as ``float16`` or ``bfloat16``.

    Raises:
        TypeError: For a name that means none.
    """
    return BFLOAT16 if name == BFLOAT16.name else np.dtype(name)


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this type may be cast to another float type; numpy does not count bfloat16 among them."""
    return dtype.kind == "f" or dtype == BFLOAT16
