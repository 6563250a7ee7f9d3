"""Records of external data that lie: each is refused before any library opens the file (FAULTS F063 to F066)."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from mbq_export.errors import FormatError
from mbq_export.export.external_data import check_regular, checked_places, read_array, size_of
from tests.export.one_linear import edit, external, write_one

WEIGHT = ".qweight"


def record(model: onnx.ModelProto, suffix: str = WEIGHT) -> dict[str, onnx.StringStringEntryProto]:
    return {entry.key: entry for entry in external(model, suffix).external_data}


def setting(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        record(model)[key].value = value

    return change


def refusal(path: Path, code: str) -> FormatError:
    with pytest.raises(FormatError) as caught:
        checked_places(onnx.load(path, load_external_data=False), path.parent)
    assert caught.value.code == code
    return caught.value


def test_sound_records_give_the_place_of_every_constant(tmp_path: Path) -> None:
    model = onnx.load(write_one(tmp_path), load_external_data=False)
    places = checked_places(model, tmp_path)
    tensor = external(model, WEIGHT)
    place = places[tensor.name]
    assert (place.length, place.offset % 4096) == (64 * 12 * 4, 0)
    whole = onnx.numpy_helper.to_array(tensor, str(tmp_path))
    np.testing.assert_array_equal(read_array(tensor, place), whole)


@pytest.mark.parametrize(
    "location",
    [
        "../one.onnx_data",
        "/etc/hostname",
        "C:one",
        "a\\b",
        "a\0b",
        "https://example.org/x",
        "",
        ".",
        "..",
    ],
)
def test_location_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    path = edit(write_one(tmp_path), setting("location", location))
    error = refusal(path, "E4401")
    assert error.message == f"External data lies at {location!r}."
    assert error.where == ["linear.qweight"]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_refused(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    path = write_one(tmp_path)
    data = tmp_path / "one.onnx_data"
    kept = tmp_path / "kept"
    data.rename(kept)
    link(kept, data)
    error = refusal(path, "E4402")
    assert error.fix == ("copy the file: cp --dereference one.onnx_data NEW",)


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FormatError, match="pipe is a link or no file"):
        check_regular(tmp_path / "pipe")


def test_missing_data_file_is_named(tmp_path: Path) -> None:
    path = write_one(tmp_path)
    (tmp_path / "one.onnx_data").unlink()
    assert refusal(path, "E4403").message == (
        "one.onnx_data cannot be read: No such file or directory."
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("offset", "-4096", "Offset is '-4096', no whole number."),
        ("offset", "abc", "Offset is 'abc', no whole number."),
        ("offset", "9" * 30, f"Offset is '{'9' * 30}', no whole number."),
        ("offset", "9223372036854775808", "declared, but one.onnx_data has"),
        ("offset", "4098", "Offset 4098 is no multiple of the element size 4."),
        ("length", "12", "12 bytes are declared, but dtype and shape need 3072."),
        ("length", "1e3", "Length is '1e3', no whole number."),
    ],
)
def test_wrong_numbers_are_refused(key: str, value: str, message: str, tmp_path: Path) -> None:
    path = edit(write_one(tmp_path), setting(key, value))
    assert message in refusal(path, "E4403").message


def test_short_data_file_is_refused(tmp_path: Path) -> None:
    path = write_one(tmp_path)
    data = tmp_path / "one.onnx_data"
    data.write_bytes(data.read_bytes()[:-1])
    assert "bytes 8192 to 9216 are declared" in refusal(path, "E4403").message.lower()


def test_overlapping_constants_are_refused(tmp_path: Path) -> None:
    path = edit(write_one(tmp_path), setting("offset", "4096"))
    assert refusal(path, "E4403").message == (
        "Linear.scales and linear.qweight overlap in one.onnx_data."
    )


def test_unknown_and_repeated_keys_are_refused(tmp_path: Path) -> None:
    for key in ("basepath", "offset"):
        path = edit(
            write_one(tmp_path),
            lambda model, key=key: external(model, WEIGHT).external_data.add(key=key, value="0"),  # type: ignore[misc]
        )
        assert f"external data has the key {key!r}" in refusal(path, "E4403").message.lower()


def test_nibbles_are_counted_in_whole_bytes() -> None:
    assert size_of(TensorProto(data_type=TensorProto.INT4, dims=[3, 3])) == 5
    assert size_of(TensorProto(data_type=TensorProto.FLOAT, dims=[])) == 4
    assert size_of(TensorProto(data_type=TensorProto.FLOAT, dims=[2**40, 2**40])) == 4 * 2**80
