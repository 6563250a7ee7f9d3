"""The user's cache may hold a plugin library, on which the form of engines depends: these tests begin without one."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the cache during a test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MBQ_EXPORT_CACHE", str(folder))
    return folder
