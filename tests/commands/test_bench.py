"""`bench`: a table, a result file, and no figures from a noisy machine without saying so."""

import json
import shutil
from pathlib import Path

import pytest

from tests.command_line import run, tell

SHORT = ("-n", "4", "-r", "2", "--warmup", "0", "--images", "0")


def test_figures_are_a_table_and_a_file(bundle: Path, tmp_path: Path) -> None:
    outcome = tell("bench", bundle, *SHORT, "--allow-noisy", "-o", tmp_path / "results")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split()[:4] == ["bundle", "test", "p50", "ms"]
    assert [line.split()[1] for line in lines[2:-1]] == ["pp8", "tg4", "itl", "ttft", "e2e"]
    assert lines[-1] == "OK  bench  1 bundle, 1 workload"
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
    assert json.loads((tmp_path / "results" / "bench.json").read_text())["schema"].startswith(
        "mbq-export/bench@"
    )


def test_two_bundles_are_compared_in_one_run(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "other").symlink_to(bundle, target_is_directory=True)
    refused = run("bench", bundle, tmp_path / "other", *SHORT)
    assert (refused.status, refused.code) == (2, "E2001"), "a link is the same bundle"
    copy = shutil.copytree(bundle, tmp_path / "copy")
    outcome = tell("bench", bundle, copy, *SHORT, "--allow-noisy")
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "OK  bench  2 bundles, 1 workload"
    assert "p10 to p90" in outcome.out


def test_noise_is_an_error_unless_allowed_and_the_result_is_kept(bundle: Path) -> None:
    """Two requests of a microsecond model always vary by more than the limit, or other programs work."""
    outcome = run("bench", bundle, *SHORT, "-r", "1")
    if outcome.status == 0:
        pytest.skip("the machine is quiet enough")
    assert (outcome.status, outcome.code) == (1, "E1301")
    assert outcome.document["error"]["context"]["result"]["measurements"]


@pytest.mark.parametrize(
    ("line", "status", "code", "words"),
    [
        (["-p", "x"], 2, "E2003", "'x' is no list of whole numbers such as 16,64"),
        (["-p", "0"], 2, "E2003", "0 is less than 1"),
        (["-n", ""], 2, "E2003", "'' is no list"),
        (["-n", "4,0"], 2, "E2003", "0 is less than 1"),
        (["--images", "-1"], 2, "E2003", "-1 is less than 0"),
        (["-r", "0"], 2, "E2017", "0 repetitions"),
        (["--ort-accuracy-level", "9"], 2, "E2003", "(got '9')"),
        (["--backend", "rtx"], 2, "E2001", "has no engines of"),
        (["--lowering", "plugin"], 2, "E2001", "has no fp32 graph"),
        (["--image", "nope.png"], 4, "E4304", "There is no file 'nope.png'"),
        (["-n", "600"], 2, "E2009", "the bundle allows 512"),
    ],
)
def test_wrong_option_is_refused_by_its_value(
    bundle: Path, line: list[str], status: int, code: str, words: str
) -> None:
    outcome = run("bench", bundle, *line)
    assert (outcome.status, outcome.code) == (status, code)
    assert words in outcome.document["error"]["message"]


def test_results_do_not_go_into_a_bundle(bundle: Path) -> None:
    outcome = run("bench", bundle, *SHORT, "-o", bundle / "results")
    assert (outcome.status, outcome.code) == (2, "E2011")
    assert not (bundle / "results").exists()


def test_nothing_to_time_is_refused() -> None:
    assert run("bench").code == "E2003"
    assert run("bench", "nope").document["error"]["message"] == "There is no bundle nope."
