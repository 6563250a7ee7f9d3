"""Errors have four parts, a place, and a code that is listed."""

import re
import tomllib
from pathlib import Path

import pytest

from mbq_export import errors

ROOT = Path(__file__).parents[1]
CODES = tomllib.loads((ROOT / "mbq_export/codes.toml").read_text())
USED = re.compile(r'"(E\d{4})"')
WARNED = re.compile(r'MBQ-(W\d{4})|warn\(\s*"(W\d{4})"')
SOURCES = {
    path: path.read_text()
    for folder in ("mbq_export", "kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def test_error_shows_what_where_why_and_what_to_type() -> None:
    with (
        pytest.raises(errors.UsageError) as caught,
        errors.located("quantize"),
        errors.located("layer 3"),
    ):
        raise errors.UsageError(
            "E2004", "Group size 100 does not divide 896.", why="it must", fix="--group-size 64"
        )
    assert str(caught.value) == (
        "MBQ-E2004: Group size 100 does not divide 896.\n"
        "  where   quantize, layer 3\n"
        "  why     it must\n"
        "  fix     --group-size 64"
    )


@pytest.mark.parametrize("kind", errors.MbqError.__subclasses__())
def test_first_digit_of_a_code_is_the_exit_status(kind: type[errors.MbqError]) -> None:
    assert kind.exit_status == (70 if kind.first_digit == "9" else int(kind.first_digit))
    with pytest.raises(ValueError, match="is not a code of"):
        kind("E0001", "no such class")


def test_every_code_used_is_listed_and_every_code_listed_is_used() -> None:
    text = "\n".join(SOURCES.values())
    used = set(USED.findall(text)) | {
        code for pair in WARNED.findall(text) for code in pair if code
    }
    assert used == set(CODES)


@pytest.mark.parametrize("code", sorted(CODES))
def test_code_has_cause_triggers_and_fix(code: str) -> None:
    entry = CODES[code]
    assert set(entry) == {"cause", "triggers", "fix"}
    assert entry["cause"].endswith(".")
    assert entry["triggers"]
    assert entry["fix"]


def test_codes_are_sorted() -> None:
    assert list(CODES) == sorted(CODES)


def test_broad_except_stands_in_one_place_only() -> None:
    broad = [
        path.name
        for path, text in SOURCES.items()
        if re.search(r"except (Exception|BaseException)\b", text)
    ]
    assert broad == ["console.py"]
