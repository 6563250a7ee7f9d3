"""The commands: a rehearsal anywhere, times only on a GPU, and a clear word where something is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mbq_export.evaluate import kernel_bench
from mbq_kernels.bench import __main__ as checkout
from mbq_kernels.bench import run as bench_run
from mbq_kernels.bench.document import check_document
from tests.command_line import run, tell
from tests.kernels.emulated import ROOT
from tests.kernels.emulated_linear import library_path

DRY = ("bench", "--kernels", "--dry-run", "--peers", "none")
WITHOUT_A_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
BARE = """
import sys
for name in ("typer", "rich", "transformers", "onnx", "onnxruntime", "jinja2", "markupsafe"):
    sys.modules[name] = None
sys.argv = ["bench.py", *sys.argv[1:]]
import runpy
runpy.run_path({script!r}, run_name="__main__")
"""


def test_a_dry_run_rehearses_the_emulated_kernels_and_writes_result_and_page(
    tmp_path: Path,
) -> None:
    outcome = tell(*DRY, "--library", library_path(), "-o", tmp_path)
    assert outcome.status == 0, outcome.err
    document = check_document(json.loads((tmp_path / "kernels.json").read_text()))
    assert document["dry_run"] is True
    rehearsal = document["rehearsal"]
    assert rehearsal["kernels"] == "emulated"
    ours = [row for row in rehearsal["rows"] if row["source"] == "cuda"]
    assert {(row["scheme"], row["group_size"]) for row in ours} == {
        ("w3a16", 128),
        ("w4a16", 128),
        ("w4a8", 0),
        ("w4a8", 128),
    }
    assert all(row["correct"] is True for row in (*rehearsal["rows"], *rehearsal["chain"]))
    assert all(row["correct"] is True for row in rehearsal["decode"]["rows"])
    assert "Nothing on this page was timed" in (tmp_path / "kernels.md").read_text()
    assert outcome.out.splitlines()[-1] == (
        f"OK  bench  {len(document['rows'])} rows, nothing timed: a dry run"
    )


@pytest.fixture
def _not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh checkout: nothing is compiled, so a rehearsal is short."""
    monkeypatch.setattr(bench_run, "EMULATED", ROOT / "nope.so")


@pytest.mark.usefixtures("_not_built")
def test_without_a_library_the_oracle_stands_in() -> None:
    outcome = run(*DRY)
    assert outcome.status == 0, outcome.err
    rehearsal = outcome.document["result"]["rehearsal"]
    assert rehearsal["kernels"] == "none; the oracle stands in"
    assert {row["source"] for row in rehearsal["rows"]} == {"base", "oracle"}
    missing = {line["entrant"]: line["why"] for line in outcome.document["result"]["absent"]}
    assert missing["CUDA w3a16 g128"] == "the kernel library is not built"


@WITHOUT_A_GPU
def test_off_a_gpu_the_next_command_is_named() -> None:
    outcome = run("bench", "--kernels")
    assert (outcome.status, outcome.code) == (3, "E3001")
    error = outcome.document["error"]
    assert error["message"] == "Kernels are timed on an NVIDIA GPU, and torch sees none here."
    assert error["fix"][0] == "mbq-export bench --kernels --dry-run"


def test_a_missing_library_names_the_build_command(tmp_path: Path) -> None:
    outcome = run(*DRY, "--library", tmp_path / "none.so")
    assert (outcome.status, outcome.code) == (3, "E3005")
    assert outcome.document["error"]["fix"] == ["python kernels/build.py"]


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["bench", "--suite", "full"], "E2002", "--suite is for kernels"),
        (["bench", "--dry-run"], "E2002", "--dry-run is for kernels"),
        (["bench", "--kernels", "bundle"], "E2002", "not bundle"),
        ([*DRY, "--suite", "long"], "E2001", "Unknown suite 'long'"),
        (["bench", "--kernels", "--dry-run", "--peers", "x"], "E2001", "no adapter for 'x'"),
        ([*DRY, "--shapes", "3584"], "E2003", "'3584' is no shape"),
        ([*DRY, "--shapes", "16x100"], "E2003", "'16x100' is no shape"),
        ([*DRY, "--shapes", "0x128"], "E2003", "'0x128' is no shape"),
    ],
)
def test_a_wrong_option_is_refused_by_its_value(line: list[str], code: str, words: str) -> None:
    outcome = run(*line)
    assert (outcome.status, outcome.code) == (2, code)
    assert words in outcome.document["error"]["message"]


@pytest.mark.usefixtures("_not_built")
def test_chosen_shapes_are_planned_in_place_of_the_suites() -> None:
    outcome = run(*DRY, "--shapes", "4096x4096,64x128")
    assert outcome.document["result"]["suite"]["shapes"] == [[4096, 4096], [64, 128]]


@pytest.mark.usefixtures("_not_built")
def test_a_wrong_kernel_ends_the_command_with_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers may be wrong, we may not: one invented wrong row of ours is put into the result."""
    bench_kernels = kernel_bench.bench_kernels

    def spoiled(*arguments: object, **more: object) -> dict[str, object]:
        result = bench_kernels(*arguments, **more)  # type: ignore[arg-type]
        row = result["rehearsal"]["rows"][1]
        row |= {"correct": False, "timing_why": "wrong: everything"}
        return result

    monkeypatch.setattr(kernel_bench, "bench_kernels", spoiled)
    outcome = run(*DRY)
    assert (outcome.status, outcome.code) == (1, "E1109")
    assert "wrong: everything" in outcome.document["error"]["message"]


def test_the_checkout_form_needs_torch_and_numpy_only() -> None:
    script = BARE.format(script=str(ROOT / "kernels/bench.py"))
    done = subprocess.run(
        [sys.executable, "-c", script, "--dry-run", "--peers", "none", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["dry_run"] is True


@WITHOUT_A_GPU
@pytest.mark.parametrize("line", [[], ["tune"]])
def test_the_checkout_form_ends_with_status_3_off_a_gpu(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkout.main(line) == 3
    assert "MBQ-E3001: Kernels are timed on an NVIDIA GPU" in capsys.readouterr().err
