"""The user's cache: whole entries or none, safe places only."""

import logging
import threading
from pathlib import Path

import pytest

from mbq_export import cache
from mbq_export.errors import FormatError, ResourceError
from mbq_export.lock import Lock


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv("MBQ_EXPORT_CACHE", str(root))
    return root


def make(key: str, content: str = "content") -> None:
    with cache.making("plugins", key, wait_s=1) as staged:
        assert staged is not None
        (staged / "file").write_text(content)


def test_what_was_made_is_found_again() -> None:
    make("key")
    found = cache.lookup("plugins", "key")
    assert found is not None
    assert (found / "file").read_text() == "content"
    assert cache.entries("plugins") == [found]
    assert cache.lookup("plugins", "other") is None


def test_nothing_is_there_before_anything_was_made(place: Path) -> None:
    assert cache.entries("plugins") == []
    assert cache.lookup("plugins", "key") is None
    assert not place.exists()


def test_the_cache_is_for_its_user_only(place: Path) -> None:
    make("key")
    assert place.stat().st_mode & 0o777 == 0o700


def test_an_entry_that_failed_half_way_leaves_nothing(place: Path) -> None:
    def fail() -> None:
        with cache.making("plugins", "key", wait_s=1) as staged:
            assert staged is not None
            (staged / "file").write_text("half")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert list((place / "plugins").iterdir()) == []


@pytest.mark.parametrize("damage", ["flip", "shorten", "delete", "no record", "bad record"])
def test_a_damaged_entry_is_deleted_with_a_warning(
    damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    make("key")
    entry = cache.lookup("plugins", "key")
    assert entry is not None
    file, record = entry / "file", entry / cache.ENTRY
    {
        "flip": lambda: file.write_text("cOntent"),
        "shorten": lambda: file.write_text("con"),
        "delete": file.unlink,
        "no record": lambda: record.write_text("{}"),
        "bad record": lambda: record.write_text("not JSON"),
    }[damage]()
    with caplog.at_level(logging.WARNING):
        assert cache.lookup("plugins", "key") is None
    assert "MBQ-W4804" in caplog.text
    assert not entry.exists()
    make("key")
    assert cache.lookup("plugins", "key") == entry


def test_the_second_of_two_processes_gets_what_the_first_made(place: Path) -> None:
    make("other")
    lock = Lock.take(place / "plugins" / "key.lock")
    (place / "plugins" / "key").mkdir()

    def finish() -> None:
        (place / "plugins" / "key").rmdir()
        (place / "plugins" / "other").rename(place / "plugins" / "key")
        lock.release()

    timer = threading.Timer(0.5, finish)
    timer.start()
    with cache.making("plugins", "key", wait_s=20) as staged:
        assert staged is None
    timer.join()
    assert cache.lookup("plugins", "key") is not None


def test_waiting_has_an_end(place: Path) -> None:
    make("other")
    lock = Lock.take(place / "plugins" / "key.lock")
    with (
        pytest.raises(ResourceError, match="works in") as caught,
        cache.making("plugins", "key", wait_s=0.3),
    ):
        pass
    assert caught.value.code == "E5007"
    lock.release()


def test_a_cache_that_others_may_write_to_is_refused(place: Path) -> None:
    place.mkdir()
    place.chmod(0o777)
    with pytest.raises(FormatError, match=r"not safe to load libraries from\.") as caught:
        cache.entries("plugins")
    assert caught.value.code == "E4803"
    assert f"chmod 700 {place}" in caught.value.fix


def test_without_a_variable_the_cache_lies_in_the_users_cache_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("MBQ_EXPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder("plugins") == tmp_path / "xdg/mbq-export/plugins"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder("plugins") == tmp_path / "home/.cache/mbq-export/plugins"
