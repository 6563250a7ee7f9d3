"""One result, one last line, one JSON document; errors with cause and cure."""

import importlib
import json
import logging

import pytest
import typer

from mbq_export.commands.console import Console, counted, run_guarded, table_lines
from mbq_export.errors import FormatError, located
from tests.command_line import run


def app_that(act) -> typer.Typer:
    app = typer.Typer()

    @app.callback()
    def take(context: typer.Context) -> None:
        context.obj.start(context.invoked_subcommand)

    @app.command()
    def work(context: typer.Context, count: int = 1) -> None:
        act(context.obj)

    return app


def refuse(console: Console) -> None:
    with located("export"):
        raise FormatError("E4102", "A \x1b[31mred\x1b[0m value.", why="plain text", fix="retype it")


def test_success_ends_with_a_fixed_line(capsys: pytest.CaptureFixture[str]) -> None:
    status = run_guarded(app_that(lambda c: c.finish({"a": 1}, what="out")), ["work"], Console())
    assert status == 0
    assert capsys.readouterr().out == "OK  work  out\n"


def test_json_mode_prints_one_document_with_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    def act(console: Console) -> None:
        console.text("not in json mode")
        logging.getLogger("mbq_export.x").warning("MBQ-W4310: few %s tokens", "vision")
        console.finish({"a": 1}, what="out")

    assert run_guarded(app_that(act), ["work"], Console(as_json=True)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert document["result"] == {"a": 1}
    assert document["warnings"] == [{"code": "MBQ-W4310", "text": "few vision tokens"}]


def test_error_shows_four_parts_and_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_guarded(app_that(refuse), ["work"], Console()) == 4
    shown = capsys.readouterr().err
    assert shown == (
        "error[MBQ-E4102]: A \\x1b[31mred\\x1b[0m value.\n"
        "  where   export\n"
        "  why     plain text\n"
        "  fix     retype it\n"
        "  more    mbq-export explain MBQ-E4102\n"
        "FAILED  work  MBQ-E4102  A \\x1b[31mred\\x1b[0m value.\n"
    )


def test_error_in_json_mode_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(app_that(refuse), ["work"], Console(as_json=True)) == 4
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["exit"]) == (False, 4)
    assert document["error"]["code"] == "MBQ-E4102"
    assert document["error"]["fix"] == ["retype it"]


def test_wrong_option_is_a_usage_error_that_names_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_guarded(app_that(lambda c: None), ["work", "--count", "many"], Console()) == 2
    assert "--help" in capsys.readouterr().err


def test_interrupt_prints_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    def act(console: Console) -> None:
        console.resume = "mbq-export build -o x"
        raise KeyboardInterrupt

    assert run_guarded(app_that(act), ["work"], Console()) == 130
    assert "resume with: mbq-export build -o x" in capsys.readouterr().err


def test_bug_becomes_a_crash_file_not_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbq_export.commands.console.gettempdir", lambda: str(tmp_path))

    def act(console: Console) -> None:
        raise ZeroDivisionError("one by zero")

    assert run_guarded(app_that(act), ["work"], Console()) == 70
    assert "Traceback" not in capsys.readouterr().err
    [crash] = list(tmp_path.iterdir())
    assert "ZeroDivisionError: one by zero" in crash.read_text()


def test_table_puts_numbers_to_the_right() -> None:
    assert table_lines(("name", "bytes"), [("a", 5), ("bb", 1234)]) == [
        "name  bytes",
        "----  -----",
        "a         5",
        "bb     1234",
    ]


def test_the_same_warning_again_is_counted_not_repeated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def act(console: Console) -> None:
        for text in ("it loops", "it loops", "it is empty", "it loops"):
            logging.getLogger("mbq_export.x").warning("MBQ-W1105: %s", text)
        console.finish({}, what="out")

    console = Console()
    assert run_guarded(app_that(act), ["work"], console) == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning[MBQ-W1105]: it loops",
        "warning[MBQ-W1105]: it is empty",
        "warning[MBQ-W1105]: 2 more like one above",
    ]
    assert [warning["text"] for warning in console.warnings] == ["it loops", "it is empty"]


def test_wrong_option_is_a_document_too_where_one_was_asked_for() -> None:
    """Options are not read yet when one is wrong."""
    for line in (["nonsense"], ["explain"], ["models", "--seed", "many"]):
        outcome = run(*line)
        assert (outcome.status, outcome.document["ok"]) == (2, False), line
        assert outcome.document["error"]["code"] == "MBQ-E2003"


def test_wrong_value_is_shown_with_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    for typed in (["--count", "many"], ["--count=many"]):
        assert run_guarded(app_that(lambda c: None), ["work", *typed], Console()) == 2
        shown = capsys.readouterr().err
        assert "'--count'" in shown
        assert "(got 'many')" in shown


def test_interrupt_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    def act(console: Console) -> None:
        console.resume = "mbq-export build -o x"
        raise KeyboardInterrupt

    assert run_guarded(app_that(act), ["work"], Console(as_json=True)) == 130
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["exit"]) == (False, 130)
    assert document["error"]["class"] == "interrupted"
    assert document["error"]["fix"] == ["mbq-export build -o x"]


def test_missing_package_is_named_with_the_command_that_installs_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def act(console: Console) -> None:
        importlib.import_module("no_such_package.inner")

    assert run_guarded(app_that(act), ["work"], Console()) == 3
    shown = capsys.readouterr().err
    assert "error[MBQ-E3007]: The Python package no_such_package is not installed." in shown
    assert 'fix     pip install "mbq-export[cpu]"' in shown


def test_debug_adds_the_traceback_of_the_bug_itself(
    capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbq_export.commands.console.gettempdir", lambda: str(tmp_path))

    def act(console: Console) -> None:
        raise ZeroDivisionError("one by zero")

    assert run_guarded(app_that(act), ["work"], Console(debug=True)) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in act" in shown


@pytest.mark.parametrize(
    ("things", "text"), [([], "0 checks"), ([1], "1 check"), ([1, 2], "2 checks")]
)
def test_count_agrees_with_its_noun(things: list[int], text: str) -> None:
    assert counted(things, "check") == text


def test_table_shows_four_digits_and_a_dash_for_nothing() -> None:
    assert table_lines(("r", "alpha"), [(0.123456, None), (None, 0.5)])[2:] == [
        "0.1235      -",
        "     -    0.5",
    ]
