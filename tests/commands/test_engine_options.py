"""Options of engines on the command line: what cannot work is refused in the plan, and nothing is written."""

from pathlib import Path

import pytest

from tests.backends import plugin_graphs
from tests.command_line import run

CARD = ("--target", "rtx4090:rtx")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBQ_EXPORT_CACHE", str(tmp_path_factory.mktemp("cache")))


def refused(model: Path, folder: Path, *line: object) -> tuple[int, str, str]:
    """Exit status, code and message of a build that is refused."""
    fixed = ("--data", "builtin:shapes", "--group-size", "64")
    outcome = run("build", "--model", model, *fixed, *line, "-o", folder / "out")
    assert list(folder.glob("out*")) == []
    assert outcome.document["error"]["fix"]
    return outcome.status, outcome.code, outcome.document["error"]["message"]


@pytest.mark.parametrize(
    ("line", "status", "code", "words"),
    [
        ((*CARD, "--opt-tokens", "600"), 2, "E2008", "--opt-tokens 600 is more than an engine"),
        ((*CARD, "--max-batch", "0"), 2, "E2003", "(got '0')"),
        ((*CARD, "--max-tiles", "0"), 2, "E2003", "(got '0')"),
        ((*CARD, "--workspace", "none"), 2, "E2003", "(got 'none')"),
        ((*CARD, "--timing-cache", "times"), 2, "E2002", "A timing cache does not go with rtx."),
        ((*CARD, "--lowering", "plugin"), 3, "E3005", "no compiled plugin library"),
        ((*CARD, "--plugin-lib", "nowhere.so"), 4, "E4701", "nowhere.so is no shared library"),
        ((*CARD, "--engine-dtype", "fp8"), 2, "E2001", "Unknown --engine-dtype 'fp8'."),
        (
            (*CARD, "--engine-dtype", "bf16", "--lowering", "qdq"),
            2,
            "E2002",
            "There are no bf16 engines of --lowering qdq here.",
        ),
        ((*CARD, "--lowering", "gguf"), 2, "E2001", "no lowering 'gguf'"),
        (("--target", "orin:trt"), 3, "E3003", "No engine for orin:trt can be built here."),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path, line: tuple[str, ...], status: int, code: str, words: str
) -> None:
    found = refused(model, tmp_path, *line)
    assert found[:2] == (status, code)
    assert words in found[2]


def test_truncated_library_is_no_library(model: Path, tmp_path: Path) -> None:
    whole = plugin_graphs.emulated().path.read_bytes()
    (tmp_path / "short.so").write_bytes(whole[: len(whole) // 2])
    found = refused(model, tmp_path, *CARD, "--plugin-lib", tmp_path / "short.so")
    assert found[:2] == (4, "E4701")


def test_library_for_another_device_is_incompatible(model: Path, tmp_path: Path) -> None:
    found = refused(model, tmp_path, *CARD, "--plugin-lib", plugin_graphs.emulated().path)
    assert found[:2] == (7, "E7008")
    assert "has no code for sm89" in found[2]
