"""A file in a folder is its own registration."""

from pathlib import Path

import pytest

from mbq_export.errors import InternalError, UsageError
from mbq_export.registry import Folder
from mbq_export.schemes.layouts.base import Layout

MEMBER = """
from mbq_export.schemes.layouts.base import Layout
LAYOUT = Layout(name={name!r}, version=1, pack=None, unpack=None)
"""


@pytest.fixture
def folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Folder[Layout]:
    package = f"package_{abs(hash(request.node.name))}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / package / "base.py").write_text(
        "raise RuntimeError('shared modules are not members')"
    )
    (tmp_path / package / "_private.py").write_text(
        "raise RuntimeError('private modules are not members')"
    )
    for name in ("beta", "alpha"):
        (tmp_path / package / f"{name}.py").write_text(MEMBER.format(name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    return Folder(package=package, constant="LAYOUT", kind=Layout)


def test_members_are_found_by_file_and_sorted(folder: Folder[Layout]) -> None:
    assert folder.names() == ("alpha", "beta")


def test_unknown_name_lists_the_known_and_the_nearest(folder: Folder[Layout]) -> None:
    with pytest.raises(UsageError) as caught:
        folder["alpah"]
    assert caught.value.message == "Unknown layout 'alpah'."
    assert caught.value.why == "known: alpha, beta"
    assert caught.value.fix == ("use alpha",)


def test_file_without_the_constant_is_named(folder: Folder[Layout], tmp_path: Path) -> None:
    (tmp_path / folder.package / "gamma.py").write_text("")
    with pytest.raises(
        InternalError, match=rf"{folder.package}\.gamma has no LAYOUT of type Layout"
    ):
        folder.names()


def test_two_members_of_one_name_are_refused(folder: Folder[Layout], tmp_path: Path) -> None:
    (tmp_path / folder.package / "gamma.py").write_text(MEMBER.format(name="alpha"))
    with pytest.raises(InternalError, match="call themselves 'alpha'"):
        folder.names()
