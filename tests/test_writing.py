"""Output appears complete, or not at all."""

import json
import resource
import signal
from pathlib import Path

import pytest

from mbq_export.errors import ResourceError, UsageError
from mbq_export.writing import (
    json_bytes,
    partial_path,
    publish,
    refuse_existing,
    refuse_inside,
    write_file,
)


def test_json_is_sorted_and_ends_with_a_newline() -> None:
    assert json_bytes({"b": 1, "a": "ü"}) == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()


def test_json_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        json_bytes({"a": float("nan")})


def test_written_file_has_mode_0644_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", b"{}")
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_file(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ResourceError, match="No space left while writing") as caught:
            write_file(path, b"n" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert caught.value.code == "E5001"
    assert path.read_bytes() == b"old"


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"Cannot write .*nowhere") as caught:
        write_file(tmp_path / "nowhere" / "a.json", b"")
    assert caught.value.code == "E5008"


def test_publish_replaces_only_with_a_complete_folder(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for text in ("first", "second"):
        staged = partial_path(final)
        staged.mkdir()
        (staged / "a.json").write_text(json.dumps(text))
        publish(staged, final)
    assert json.loads((final / "a.json").read_text()) == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_output_is_refused_unless_forced(tmp_path: Path) -> None:
    refuse_existing(
        tmp_path, record="manifest.json", force=False
    )  # empty: there is nothing to lose
    (tmp_path / "manifest.json").write_text('{"schema": "mbq-export/bundle@1"}')
    with pytest.raises(UsageError, match=r"exists\.") as caught:
        refuse_existing(tmp_path, record="manifest.json", force=False)
    assert caught.value.code == "E2011"
    refuse_existing(tmp_path, record="manifest.json", force=True)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("diary.txt", "mine"),
        ("manifest.json", '{"name": "a web app"}'),
        ("mbq.json", '{"schema": "mbq-export/checkpoint@1"}'),
    ],
)
def test_force_replaces_only_the_same_kind_of_output(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=r"no output of this command") as caught:
        refuse_existing(tmp_path, record="manifest.json", force=True)
    assert caught.value.fix == ("choose another -o",)


@pytest.mark.parametrize("name", [".", "/", "..", "a/.."])
def test_a_place_without_a_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name for output"):
        refuse_existing(Path(name), record="manifest.json", force=True)


@pytest.mark.parametrize("out", ["model", "model/out", "model/../model/a/b", "link/out"])
def test_output_in_what_it_is_made_of_is_refused(tmp_path: Path, out: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "model")
    with pytest.raises(UsageError, match=r"lies in .*model\."):
        refuse_inside(tmp_path / out, tmp_path / "model")
    refuse_inside(tmp_path / "model-out", tmp_path / "model")


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"exists, and is no output"):
        refuse_existing(tmp_path / "file", record="manifest.json", force=True)
