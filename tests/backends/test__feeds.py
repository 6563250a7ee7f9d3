"""Feeds that fit are passed on in the graph's own float type; others are refused by name."""

import numpy as np
import pytest

from mbq_export.backends._feeds import checked_feeds
from mbq_export.backends.base import TensorSpec
from mbq_export.errors import FormatError
from mbq_export.tensor_file import BFLOAT16

FLOATS = ("float32", "float16", "bfloat16")


def spec(dtype: str) -> TensorSpec:
    return TensorSpec(name="x", dtype=dtype, shape=("n", 2))


@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize("given", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16])
def test_floats_become_the_float_of_the_graph(wanted: str, given: np.dtype) -> None:
    value = np.array([[1.5, -3.0]]).astype(given)
    found = checked_feeds([spec(wanted)], {"x": value}, name="g")["x"]
    assert found.dtype.name == wanted
    assert found.astype(np.float32).tolist() == [[1.5, -3.0]]


@pytest.mark.parametrize("wanted", FLOATS)
def test_integers_are_no_floats(wanted: str) -> None:
    with pytest.raises(FormatError, match=r"Input x of g is int64 \[1, 2\]") as error:
        checked_feeds([spec(wanted)], {"x": np.zeros((1, 2), np.int64)}, name="g")
    assert (error.value.code, error.value.why) == ("E4102", f"expected {wanted} ['n', 2]")


def test_bfloat16_is_no_integer() -> None:
    with pytest.raises(FormatError, match="Input x of g is bfloat16"):
        checked_feeds([spec("int64")], {"x": np.zeros((1, 2), BFLOAT16)}, name="g")
