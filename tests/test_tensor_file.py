"""Bytes that depend on the tensors alone, and views that read nothing until they are touched."""

import hashlib
import json
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mbq_export.errors import FormatError, ResourceError
from mbq_export.tensor_file import BFLOAT16, DTYPES, TensorFile, write_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_file_is_header_length_header_and_data(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": np.array([1.0, 2.0], np.float16)}, metadata={"b": "2", "a": "1"})
    data = path.read_bytes()
    text = (
        b'{"__metadata__":{"a":"1","b":"2"},"w":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}'
    )
    length = -(-len(text) // 8) * 8
    assert data == length.to_bytes(8, "little") + text.ljust(length) + b"\x00\x3c\x00\x40"


def test_returned_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written = write_tensors(path, {"w": np.arange(9, dtype=np.int32)})
    assert written.size == path.stat().st_size
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_comes_back(tmp_path: Path, dtype: np.dtype[Any]) -> None:
    array = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    write_tensors(tmp_path / "a.safetensors", {"w": array, "x": array.T})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.array("w").dtype == dtype
    assert file.array("w").tobytes() == array.tobytes()
    assert file.array("x").tobytes() == np.ascontiguousarray(array.T).tobytes()


@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4), swap=st.booleans())
def test_shapes_come_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], swap: bool
) -> None:
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {
        f"t{i}": rng.random(shape).astype(np.float32 if i % 2 else np.float16)
        for i, shape in enumerate(shapes)
    }
    first = write_tensors(path, arrays)
    again = write_tensors(path, dict(reversed(arrays.items())) if swap else arrays)
    assert first == again
    file = TensorFile(path)
    assert set(file.entries) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.array(name), array)
        assert file.array(name).shape == array.shape


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6.0).reshape(2, 3).astype(np.float32),
        "b": np.arange(3, dtype=np.uint8),
    }
    write_tensors(tmp_path / "a.safetensors", arrays, metadata={"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_wide_tensors_lie_first_so_that_all_are_aligned(tmp_path: Path) -> None:
    arrays = {
        "a": np.zeros(3, np.uint8), "b": np.zeros(5, np.float32), "c": np.zeros(1, np.float16),
    }  # fmt: skip
    write_tensors(tmp_path / "a.safetensors", arrays)
    offsets = {
        name: entry["data_offsets"] for name, entry in header(tmp_path / "a.safetensors").items()
    }
    assert offsets == {"b": [0, 20], "c": [20, 22], "a": [22, 25]}
    assert TensorFile(tmp_path / "a.safetensors").array("b").flags.aligned


def test_big_endian_input_is_stored_little_endian(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": np.array([1, 2], ">i4")})
    assert TensorFile(tmp_path / "a.safetensors").array("w").tolist() == [1, 2]


def test_views_cannot_be_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": np.ones(4, BFLOAT16)})
    with pytest.raises(ValueError, match="read-only"):
        TensorFile(tmp_path / "a.safetensors").array("w")[0] = 2


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"w": np.ones(4, np.float32)})
    with pytest.raises(FormatError, match=r"a\.safetensors has no tensor 'v'") as caught:
        TensorFile(tmp_path / "a.safetensors").array("v")
    assert caught.value.code == "E4103"


def test_dtype_without_a_numpy_type_is_refused(tmp_path: Path) -> None:
    text = b'{"w":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}'
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(FormatError, match="dtype F8_E4M3") as caught:
        TensorFile(tmp_path / "a.safetensors").array("w")
    assert caught.value.code == "E4102"


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w": np.ones(4, np.float32)})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(ResourceError, match="No space left while writing") as caught:
            write_tensors(path, {"w": np.ones(1 << 16, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == "E5001"
    assert path.read_bytes() == old
