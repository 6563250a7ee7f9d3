"""Names of element types, bfloat16 among them."""

import ml_dtypes
import numpy as np
import pytest

from mbq_export.backends._dtypes import dtype_of, is_float


@pytest.mark.parametrize("name", ["float16", "float32", "int64", "int8", "bool"])
def test_names_of_numpy_mean_what_numpy_says(name: str) -> None:
    assert dtype_of(name) == np.dtype(name)


def test_bfloat16_has_its_name_and_counts_as_a_float() -> None:
    assert dtype_of("bfloat16") == ml_dtypes.bfloat16
    assert dtype_of("bfloat16").name == "bfloat16"
    assert [is_float(dtype_of(name)) for name in ("bfloat16", "float16", "int8", "bool")] == [
        True,
        True,
        False,
        False,
    ]
