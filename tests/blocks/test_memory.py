"""The plan of memory is what a calibration takes, and its rows on disk make that independent of the depth."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mbq_export.blocks.memory import plan_memory
from tests.questions import questions, tiny_model
from tests.tiny import Tiny, write_tiny

MOST_OVER = 1.25
"""A plan may promise more than is taken, by so much; never less."""
FLAT_MIB = 16
"""Twice the layers may take so much more: tables and modules of twelve more layers without weights, and chance. Their
rows would take 35 MiB.
"""

CALIBRATION = """
import json, sys
from pathlib import Path
from mbq_export.blocks.room import Room
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.methods import METHODS
from mbq_export.families.llava_onevision import load
from mbq_export.schemes import SCHEMES
from tests.questions import questions
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
model = load(folder, meta_blocks=True)
switches = METHODS["gptq"].resolve({"hessian": "balanced"})
recipe = Recipe(scheme=SCHEMES["w3a16"], group_size=64, switches=switches)
with Room(folder, limit=limit) as room:
    scales = calibrate(model, questions(model, 64), recipe, room=room)
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({**room.as_json(), "measured": peak, "report": scales.sensitivity}))
"""
AMPLE = 1 << 40


def calibrated(folder: Path, limit: int) -> dict:
    """Measure gradients in a process of its own, whose peak nothing else has raised."""
    child = subprocess.run(
        [sys.executable, "-c", CALIBRATION, str(folder), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


def test_rows_of_all_blocks_are_what_grows_with_the_depth() -> None:
    plans = []
    for layers in (2, 4):
        model = tiny_model(Tiny(layers=layers), meta_blocks=True)
        plans.append(plan_memory(model, questions(model, 4), gradients=True, searches=True))
    tokens = sum(len(each.input_ids) for each in questions(tiny_model(), 4))
    assert [plan.rows for plan in plans] == [tokens * 128 * 4 * (layers - 1) for layers in (2, 4)]
    assert plans[0].gradients == plans[1].gradients
    assert plans[0].search == plans[1].search
    assert plans[1].peak() - plans[1].peak(on_disk=True) <= plans[1].rows


def test_a_phase_that_is_left_out_takes_nothing() -> None:
    model = tiny_model()
    plan = plan_memory(model, questions(model, 2), gradients=False, searches=False)
    assert plan.peak() == plan.now > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_is_as_planned_and_flat_in_the_number_of_layers(tmp_path: Path) -> None:
    taken = {}
    for layers, limit in ((24, AMPLE), (24, 0), (12, 0)):
        folder = tmp_path / f"{layers}"
        if not folder.exists():
            write_tiny(folder, Tiny(layers=layers))
        found = taken[layers, limit] = calibrated(folder, limit)
        assert found["rows_on_disk"] is (limit == 0)
        assert found["measured"] <= found["peak"] <= MOST_OVER * found["measured"]
        assert not (folder / "rows").exists()
    assert taken[24, 0]["measured"] - taken[12, 0]["measured"] <= FLAT_MIB << 20
    assert taken[24, AMPLE]["measured"] - taken[24, 0]["measured"] > FLAT_MIB << 20
    assert taken[24, AMPLE]["report"] == taken[24, 0]["report"]
