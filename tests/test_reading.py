"""Files from outside: what is accepted, what is refused, in which words."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from mbq_export import reading
from mbq_export.errors import FormatError
from mbq_export.reading import (
    contained,
    parse_json,
    read_json,
    read_jsonl,
    safetensors_header,
    sha256_of,
)

WORDS = {"F16": np.float16, "F32": np.float32, "I32": np.int32, "U8": np.uint8}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def outcome(act: Callable[[], object]) -> str:
    """Code of the error, or "read" if there is none."""
    try:
        act()
    except FormatError as error:
        return error.code
    return "read"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1,}', r"at line 1 column \d"),
        ('{\n"a" 1}', r"at line 2 column 5"),
        ('{"a": 1}'.encode("utf-16"), r"byte 0 is not UTF-8 .starts with b'\\xff\\xfe"),
        (b'\xef\xbb\xbf{"a": 1}', r"BOM"),
        (b'{"a": "\x00"}', r"Invalid control character"),
        (b"\x00" * 9, r"line 1 column 1"),
        ("[1]", "the top level is a list"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e999}', "the number 1e999 is too large"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' is there twice"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "deeper than 64"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "deeper than 64"),
        ('{"a": ' + "9" * 5000 + "}", "Exceeds the limit"),
        ("", "line 1 column 1"),
    ],
)
def test_json_that_is_not_strict_is_refused(
    tmp_path: Path, content: str | bytes, said: str
) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        read_json(write(tmp_path / "config.json", content))
    assert caught.value.code == "E4002"
    assert "config.json" in caught.value.message


def test_json_of_64_levels_is_read(tmp_path: Path) -> None:
    text = '{"a": ' + "[" * 63 + "]" * 63 + "}"
    assert read_json(write(tmp_path / "x.json", text)) == json.loads(text)


def test_json_larger_than_its_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(FormatError, match="has 209715200 bytes") as caught:
        read_json(path, code="E4604")
    assert caught.value.code == "E4604"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_json_that_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    said = {"missing": "There is no file", "folder": "is a folder", "pipe": "is a pipe or device"}[
        kind
    ]
    with pytest.raises(FormatError, match=said):
        read_json(path)


@settings(max_examples=300)
@given(
    st.binary(max_size=60)
    | st.text(alphabet='{}[]":,0123abe.+-ntfu \\', max_size=60).map(str.encode)
)
def test_any_bytes_are_an_object_or_a_format_error(data: bytes) -> None:
    assert outcome(lambda: parse_json(data, name="x", code="E4002")) in {"read", "E4002"}


def test_lines_may_have_a_byte_order_mark_crlf_and_blanks(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": "\xc3\xa9"}')
    assert read_jsonl(path) == [(1, {"a": 1}), (3, {"a": "é"})]


def test_all_bad_lines_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    lines = ['{"a": 1}'] * 20
    for number in (3, 5, 7, 9, 11, 13):
        lines[number - 1] = "{'a': 1}"
    lines[4] = '{"a": "\xff"}'
    path = write(tmp_path / "d.jsonl", "\n".join(lines).encode("latin-1"))
    with pytest.raises(FormatError, match=r"6 bad lines in d\.jsonl") as caught:
        read_jsonl(path)
    assert caught.value.code == "E4302"
    assert [f"line {n} " in caught.value.message for n in (3, 5, 7, 9, 11, 13)] == [True] * 5 + [
        False
    ]


def test_one_long_line_is_named_and_the_next_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LINE_LIMIT", 100)
    path = write(tmp_path / "d.jsonl", '{"a": "' + "x" * 1000 + '"}\n{"a": 2}\n{broken\n')
    with pytest.raises(
        FormatError, match="line 1 is longer than 100 bytes; line 3 is not"
    ) as caught:
        read_jsonl(path)
    assert "2 bad lines" in caught.value.message


@pytest.mark.parametrize(
    ("relative", "said"),
    [
        ("../x", "leads upwards"),
        ("a/../../x", "leads upwards"),
        ("/etc/passwd", "is absolute"),
        ("~/x", "is absolute"),
        ("C:x", "is absolute"),
        ("a\\b", "backslash"),
        ("a\0b", "zero byte"),
        ("", "empty"),
        ("https://example.org/x", "is a URL"),
        ("file:x", "is a URL"),
    ],
)
def test_path_that_leads_elsewhere_is_refused(tmp_path: Path, relative: str, said: str) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        contained(tmp_path, relative, code="E4305", missing="E4304")
    assert caught.value.code == "E4305"


def test_path_inside_the_folder_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a/b.txt", "x")
    assert contained(tmp_path, "a/b.txt", code="E4305").read_text() == "x"
    (tmp_path / "link").symlink_to("a/b.txt")
    assert contained(tmp_path, "link", code="E4305").read_text() == "x"


def test_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "secret", "x")
    (tmp_path / "data/link").symlink_to("../secret")
    (tmp_path / "data/deep").symlink_to(tmp_path)
    for relative in ("link", "deep/secret"):
        with pytest.raises(FormatError, match="is a link that leaves the folder"):
            contained(tmp_path / "data", relative, code="E4305")


def test_link_of_a_hub_snapshot_may_lead_to_the_blobs_of_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name/snapshots/abc"
    blobs = tmp_path / "models--org--name/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write(blobs / "0", "x")
    write(tmp_path / "models--org--name/other", "x")
    (snapshot / "config.json").symlink_to("../../blobs/0")
    (snapshot / "other").symlink_to("../../other")
    assert contained(snapshot, "config.json", code="E4105").read_text() == "x"
    with pytest.raises(FormatError, match="leaves the folder"):
        contained(snapshot, "other", code="E4105")


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "loop"])
def test_path_to_something_else_than_a_file_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        (tmp_path / "x").mkdir()
    elif kind == "pipe":
        os.mkfifo(tmp_path / "x")
    elif kind == "loop":
        (tmp_path / "x").symlink_to("x")
    with pytest.raises(FormatError) as caught:
        contained(tmp_path, "x", code="E4305", missing="E4304")
    assert caught.value.code == "E4304"


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, np.ndarray[Any, Any]]:
    names = draw(
        st.lists(st.text("abc.", min_size=1, max_size=5), min_size=1, max_size=5, unique=True)
    )
    shape = st.lists(st.integers(0, 4), max_size=3)
    return {
        name: np.zeros(draw(shape), draw(st.sampled_from(list(WORDS.values())))) for name in names
    }


@settings(max_examples=40, deadline=None)
@given(tensors())
def test_header_equals_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, stored: dict[str, np.ndarray[Any, Any]]
) -> None:
    path = tmp_path_factory.mktemp("t") / "model.safetensors"
    save_file(stored, path)
    found = safetensors_header(path)
    data = path.read_bytes()
    assert found.keys() == stored.keys()
    for name, tensor in load_file(path).items():
        entry = found[name]
        assert (entry.shape, WORDS[entry.dtype]) == (tensor.shape, tensor.dtype.type)
        assert data[entry.start : entry.end] == tensor.tobytes()


def header_file(path: Path, header: str, body: bytes = b"") -> Path:
    text = header.encode()
    return write(path, len(text).to_bytes(8, "little") + text + body)


ENTRY = '"{}": {{"dtype": "F32", "shape": [2], "data_offsets": [{}, {}]}}'


@pytest.mark.parametrize(
    ("header", "size", "said"),
    [
        ("{" + ENTRY.format("a", 0, 8) + "}", 7, "'a' should end at byte .* and the file has"),
        (
            "{" + ENTRY.format("a", 0, 8) + "}",
            9,
            "'a' and 'the end of the file' have 1 unused bytes",
        ),
        ("{" + ENTRY.format("a", 1, 9) + "}", 9, "'the header' and 'a' have 1 unused bytes"),
        (
            "{" + ENTRY.format("a", 0, 8) + "," + ENTRY.format("b", 4, 12) + "}",
            12,
            "'a' and 'b' overlap",
        ),
        (
            "{" + ENTRY.format("a", 0, 8) + "," + ENTRY.format("a", 0, 8) + "}",
            8,
            "key 'a' is there twice",
        ),
        ("{" + ENTRY.format("a", 0, 4) + "}", 4, r"'a' has shape \[2\] F32 but lies in bytes"),
        ("{" + ENTRY.format("a", -8, 0) + "}", 0, "not whole numbers"),
        ('{"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}}', 8, "unknown dtype 'F31'"),
        ('{"a": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}', 8, "not whole numbers"),
        ('{"a": {"dtype": "F32", "shape": [2]}}', 8, "is not {dtype, shape, data_offsets}"),
        (
            '{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 8]}}',
            8,
            "lies in bytes",
        ),
        ("{not json}", 0, "not a strict JSON object"),
        ("[]", 0, "the top level is a list"),
    ],
)
def test_damaged_header_is_refused_with_the_tensor(
    tmp_path: Path, header: str, size: int, said: str
) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        safetensors_header(header_file(tmp_path / "model.safetensors", header, bytes(size)))
    assert caught.value.code == "E4101"


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x8B1F])
def test_header_whose_length_reads_like_another_format_is_a_header(
    tmp_path: Path, length: int
) -> None:
    text = '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    path = write(tmp_path / "x", length.to_bytes(8, "little") + text.encode() + b"\0")
    assert list(safetensors_header(path)) == ["a"]


def test_empty_tensors_may_share_a_place(tmp_path: Path) -> None:
    empty = '"{}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'
    path = header_file(tmp_path / "m", "{" + empty.format("a") + "," + empty.format("b") + "}")
    assert set(safetensors_header(path)) == {"a", "b"}


@pytest.mark.parametrize("length", [2**40, 2**63, 200 << 20])
def test_header_length_is_not_believed(tmp_path: Path, length: int) -> None:
    with pytest.raises(FormatError, match=f"its header should have {length} bytes") as caught:
        safetensors_header(write(tmp_path / "m", length.to_bytes(8, "little") + b"{}"))
    assert caught.value.code == "E4101"


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 20, -1])
def test_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones((3, 3), np.float32), "b": np.ones(2, np.float16)}, path)
    write(path, path.read_bytes()[:cut])
    with pytest.raises(FormatError) as caught:
        safetensors_header(path)
    assert caught.value.code == "E4101"


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "E4107",
            "a Git-LFS pointer",
        ),
        (b"<!DOCTYPE html><html>", "E4107", "a web page"),
        (b"\n <HTML><head>", "E4107", "a web page"),
        (b"\x1f\x8b\x08" + bytes(20), "E4107", "gzip-compressed"),
        (b"PK\x03\x04" + bytes(20), "E4101", "zip archive"),
        (b"\x80\x02}q\x00." + bytes(20), "E4101", "a Python pickle"),
        (b"\x7fELF" + bytes(20), "E4101", "a program"),
    ],
)
def test_file_that_is_something_else_is_named(
    tmp_path: Path, content: bytes, code: str, said: str
) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        safetensors_header(write(tmp_path / "model.safetensors", content))
    assert caught.value.code == code


def test_pipe_in_place_of_weights_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="is a pipe or device") as caught:
        safetensors_header(tmp_path / "model.safetensors")
    assert caught.value.code == "E4106"


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_any_changed_byte_gives_a_header_or_a_format_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "m"
    save_file({"a.w": np.ones((3, 3), np.float32), "b.w": np.ones(2, np.float16)}, path)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    write(path, bytes(data))

    def read() -> None:
        for entry in safetensors_header(path).values():
            assert 8 <= entry.start <= entry.end <= len(data)

    assert outcome(read) in {"read", "E4101", "E4107"}


def test_hash_is_sha256(tmp_path: Path) -> None:
    path = write(tmp_path / "x", "abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
