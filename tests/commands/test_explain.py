"""`explain`: a page for every code, and a helping hand for a mistyped one."""

import pytest

from tests.command_line import run, tell


@pytest.mark.parametrize("typed", ["MBQ-E2004", "e2004", "mbq-E2004"])
def test_code_is_explained_however_it_is_typed(typed: str) -> None:
    outcome = tell("explain", typed)
    assert outcome.status == 0
    assert outcome.out.splitlines()[0].startswith("E2004  The group size is unknown")
    assert "\nfix\n  - --group-size 64\n" in outcome.out
    assert outcome.out.splitlines()[-1] == f"OK  explain  {typed}"


def test_unknown_code_gets_the_nearest() -> None:
    outcome = run("explain", "E20004")
    assert (outcome.status, outcome.code) == (2, "E2001")
    assert outcome.document["error"]["fix"][0].startswith("mbq-export explain MBQ-E2004")
    assert run("explain", "hello").document["error"]["fix"] == ["copy the code from the error"]
