"""Every method that is registered: the same bytes every time, also when a run was killed in its middle."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mbq_export.calibrate.methods import METHODS
from tests.tiny import Tiny, write_tiny

ROOT = Path(__file__).parents[3]

CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.methods import METHODS
from mbq_export.families.llava_onevision import load
from mbq_export.quantize import quantize
from mbq_export.quantize.feedback import Samples
from mbq_export.schemes import SCHEMES
from mbq_export.state import State
from tests.questions import questions

folder = Path(sys.argv[1])
real = State.save_block

def run(method, name, deadly):
    saved = []
    def counted(self, stage, *args):
        real(self, stage, *args)
        saved.append(stage)
        if len(saved) == deadly:
            os.kill(os.getpid(), signal.SIGKILL)
    State.save_block = counted
    out = folder / method / name
    recipe = Recipe(scheme=SCHEMES["w3a16"], group_size=64, switches=METHODS[method].resolve({}))
    with State.open(out.with_suffix(".partial"), {"method": method}) as state:
        scales = calibrate(model, inputs, recipe, state=state)
        scales.write(folder / method / f"{name}.scales")
        quantize(
            model, scales, scheme=recipe.scheme, group_size=64, out=out,
            samples=Samples(inputs=inputs, held_out=held_out), state=state,
        )
    return len(saved)

def forked(*run_of):
    pid = os.fork()
    if pid == 0:
        os._exit(100 + run(*run_of))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(*run_of, code, flush=True)
    return code - 100

# A fork per run: importing everything once more would take longer than the runs.
torch.set_num_threads(1)
model = load(folder / "model", meta_blocks=True)
every = questions(model, 6)
inputs, held_out = every[:4], every[4:]
for method in METHODS.members():
    (folder / method).mkdir()
    saves = forked(method, "whole", 0)
    forked(method, "again", 0)
    forked(method, "killed", max(1, saves // 2))
    forked(method, "killed", 0)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Folder with the results of every method, and the exit codes of its four runs."""
    folder = tmp_path_factory.mktemp("methods")
    write_tiny(folder / "model", Tiny(layers=2))
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert child.returncode == 0, child.stderr
    codes: dict[str, list[int]] = {}
    for line in child.stdout.splitlines():
        method, *_, code = line.split()
        codes.setdefault(method, []).append(int(code))
    return folder, codes


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", METHODS.members())
def test_a_method_gives_the_same_bytes_again_and_after_being_killed(
    method: str, runs: tuple[Path, dict[str, list[int]]]
) -> None:
    folder, codes = runs
    whole, again, killed, resumed = codes[method]
    assert whole == again > 100
    assert killed == -signal.SIGKILL
    assert 100 < resumed < whole
    for made in ("{}", "{}.scales"):
        wanted = contents(folder / method / made.format("whole"))
        assert wanted == contents(folder / method / made.format("again"))
        assert wanted == contents(folder / method / made.format("killed"))
