"""The table of commands keeps its promises: quick help, true fixes, globals anywhere."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from mbq_export.commands import COMMANDS, app
from tests.command_line import PROGRAM, ROOT, run, tell

NAMES = [module.__name__.rpartition(".")[2] for module in COMMANDS]
OTHERS = ("hf ", "cp ", "pip ", "nvidia-smi", "--query-gpu", "[cmake, ", "kernels/build.py")
"""Lines with options of other programs."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
COMMAND = re.compile(r"(?:^|[\"'])mbq-export ([a-z]+)")


def known_options() -> set[str]:
    group = typer.main.get_command(app)
    commands = [group, *group.commands.values()]  # type: ignore[attr-defined]
    options = {name for c in commands for p in c.params for name in (*p.opts, *p.secondary_opts)}
    return options | {"--help"}


def advice() -> list[tuple[str, str]]:
    """Every line of the package and of its list of codes that may tell a user what to type."""
    files = [*sorted((ROOT / "mbq_export").rglob("*.py")), ROOT / "mbq_export" / "codes.toml"]
    return [
        (f"{file.relative_to(ROOT)}:{number}", line)
        for file in files
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if not any(word in line for word in OTHERS)
    ]


def test_no_message_names_an_option_that_does_not_exist() -> None:
    known = known_options()
    wrong = [
        f"{place}: {option}"
        for place, line in advice()
        for option in OPTION.findall(line)
        if option not in known and "at = f" not in line
    ]
    assert wrong == []


def test_no_message_names_a_command_that_does_not_exist() -> None:
    text = (ROOT / "mbq_export" / "codes.toml").read_text()
    fixes = [fix for entry in tomllib.loads(text).values() for fix in entry["fix"]]
    lines = [line for _, line in advice() if "fix" in line] + fixes
    wrong = {name for line in lines for name in COMMAND.findall(line)} - set(NAMES)
    assert wrong == set()


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_options_and_where_globals_go(name: str) -> None:
    outcome = tell(name, "--help")
    assert outcome.status == 0
    assert f"Usage: mbq-export {name}" in outcome.out
    assert "Also anywhere: --json" in outcome.out


def test_help_of_the_program_lists_every_command() -> None:
    for line in ([], ["--help"], ["-h"]):
        outcome = tell(*line)
        assert (outcome.status, outcome.err) == (0, ""), line
        assert set(NAMES) <= set(re.findall(r"[a-z]+", outcome.out)), line


def test_version_names_the_layouts() -> None:
    assert re.fullmatch(
        r"mbq-export \d+\.\d+\.\d+ \(layouts: dense 1, w3t 1, w4t 1\)\n", tell("--version").out
    )


def test_globals_may_stand_behind_the_command() -> None:
    for line in (("--json", "explain", "E2004"), ("explain", "E2004", "--json")):
        assert '"command": "explain"' in tell(*line).out


def test_misspelt_command_gets_the_nearest() -> None:
    error = run("bluid").document["error"]
    assert error["message"] == "No such command 'bluid'. Did you mean 'build'?"
    assert error["fix"] == ["mbq-export --help"]


def test_reader_that_goes_away_ends_the_program_quietly() -> None:
    """As with ``| head``: the pipe is closed before anything was written."""
    script = f"{sys.executable} {ROOT / 'cli.py'} explain E2004; echo status $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"( sleep 1; {script} ) | true"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert "status 0" in done.stderr


def test_shell_completes_commands_and_options() -> None:
    for words, expected in {"mbq-export bu": "build", "mbq-export build --wb": "--wbits"}.items():
        place = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            PROGRAM,
            env={**os.environ, "_MBQ_EXPORT_COMPLETE": "complete_bash", **place},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.split() == [expected]


def test_checkout_and_package_are_the_same_program() -> None:
    done = subprocess.run([*PROGRAM, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == tell("--version").out
    assert Path(PROGRAM[1]).name == "cli.py"
