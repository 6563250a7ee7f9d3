"""Arrays cross a pipe as they are, and what is no message ends the conversation."""

import io

import numpy as np
import pytest

from mbq_export.backends._dtypes import dtype_of
from mbq_export.backends._trt_channel import DTYPES, Closed, receive, send

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_arrays_of_every_type_come_back_bit_for_bit(name: str) -> None:
    array = RNG.normal(size=(2, 3)).astype(dtype_of(name))
    pipe = io.BytesIO()
    send(pipe, {"op": "run"}, {"a": array.T, "b": array[:0]})
    pipe.seek(0)
    head, found = receive(pipe)
    assert head == {"op": "run"}
    assert (found["a"].dtype, found["a"].shape) == (array.dtype, (3, 2))
    assert found["a"].tobytes() == array.T.tobytes()
    assert found["b"].shape == (0, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no json\n",
        b'{"arrays": [["a", "object", [1]]]}\n12345678',
        b'{"arrays": [["a", "bfloat16", [4]]]}\n1234567',
    ],
    ids=["the end", "noise", "a type that is none", "too few bytes"],
)
def test_what_is_no_message_ends_the_conversation(data: bytes) -> None:
    with pytest.raises(Closed):
        receive(io.BytesIO(data))
