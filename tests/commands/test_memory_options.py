"""Sizes as people type them."""

import pytest
import typer

from mbq_export.commands.memory_options import max_ram


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("4096", 4096),
        ("500MB", 500_000_000),
        ("12GiB", 12 << 30),
        ("1.5k", 1500),
        ("2 tib", 2 << 40),
    ],
)
def test_a_size_is_read(text: str | None, expected: int | None) -> None:
    assert max_ram(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-1", "2e9", "1 QB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="is no size"):
        max_ram(text)
