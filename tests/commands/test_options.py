"""Global options may stand on either side of the command's name."""

import pytest

from mbq_export.commands.options import hoist_globals


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        (["build", "--json", "-o", "x"], ["--json", "build", "-o", "x"]),
        (["build", "--seed", "7", "-q"], ["--seed", "7", "-q", "build"]),
        (["build", "--seed=7"], ["--seed=7", "build"]),
        (["--json", "build"], ["--json", "build"]),
        (["run", "x", "--", "--json"], ["run", "x", "--", "--json"]),
        (["build", "--seed"], ["--seed", "build"]),
    ],
)
def test_globals_move_to_the_front(typed: list[str], parsed: list[str]) -> None:
    assert hoist_globals(typed) == parsed
