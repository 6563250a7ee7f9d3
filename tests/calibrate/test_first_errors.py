"""Errors of plain rounding decide how fine a grid is: their formula, the quarter, and a run that was killed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mbq_export.calibrate import BLOCKS, calibrate
from mbq_export.calibrate.first_errors import FirstErrors, first_errors
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.search import exponents
from mbq_export.families.base import ANSWER, LINEARS, PROMPT, VISION
from mbq_export.schemes.integers import integer_linear
from mbq_export.state import State
from tests.calibrate.test___init__ import KilledError, bytes_of, recipe
from tests.calibrate.test_search import packed_candidate
from tests.calibrate.views import job, views
from tests.questions import questions, tiny_model
from tests.reference.moved_rows import rounded

MBQ = METHODS["mbq"]
AUTO = MBQ.resolve({"grid": "auto", "gqa_o_scale": True})
SUMS = 1e-4
"""Float32 products, summed in another order."""


def report(layers: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def entry() -> dict[str, Any]:
        vision, prompt, gradient = torch.rand(3, generator=generator).tolist()
        return {
            "clipped": {"vision": vision, "prompt": None if prompt < 0.2 else prompt},
            "mean_sq": {"answer": gradient},
        }

    return {
        "layers": [
            {"r": {"attn": 0.3, "mlp": 0.6}, "linears": {name: entry() for name in LINEARS}}
            for _ in range(layers)
        ]
    }


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_an_error_is_weighed_by_class_and_gradient(scheme: str) -> None:
    model = tiny_model()
    inputs = questions(model, 2)
    task = job(model, AUTO, MBQ, scheme=scheme, group_size=128)
    of = report(model.text.layers)
    task = task.__class__(**{**vars(task), "sensitivity": of})
    pairs = [(batch, batch.hidden) for batch in task.stream.begin(inputs)]
    with task.stream.block(0) as block:
        found, outputs = first_errors(task, block, 0, pairs)
        exact = task.stream.run_all(block, 0, pairs)
    assert all(torch.equal(a, b) for a, b in zip(outputs, exact, strict=True))
    seen = views(model, inputs, AUTO, scheme=scheme, group_size=128)
    for unit, view in seen.items():
        expected = 0.0
        tokens = 0
        for call in view.calls():
            rows = call.rows.flatten(0, -2)
            tokens += len(rows)
            for linear in view.place.into:
                entry = of["layers"][0]["linears"][linear]
                weight = view.block.get_parameter(f"{linear}.weight")
                if scheme == "w4a8":
                    packed = packed_candidate(view, linear, torch.ones(weight.shape[1]))
                    bias = 0 if packed.bias is None else torch.from_numpy(packed.bias)
                    after = torch.from_numpy(integer_linear(rows.numpy(), packed)) - bias
                else:
                    after = rows @ rounded(weight, bits=3, group_size=128).T
                each = (rows @ weight.T - after).square().sum(1)
                for kind, weigh in (
                    (ANSWER, 1.0),
                    (VISION, entry["clipped"]["vision"]),
                    (PROMPT, entry["clipped"]["prompt"] or 1.0),
                ):
                    part = float(each[call.classes == kind].sum())
                    expected += entry["mean_sq"]["answer"] * weigh * part
        assert found[unit] == pytest.approx(expected / tokens, rel=SUMS)


def test_a_quarter_of_the_units_has_half_the_exponents() -> None:
    errors = FirstErrors(of_unit={(0, f"{number}"): float(number) for number in range(8)})
    assert [errors.is_small(0, f"{number}") for number in range(8)] == [True] * 2 + [False] * 6
    same = FirstErrors(of_unit={(0, f"{number}"): 1.0 for number in range(8)})
    assert not any(same.is_small(0, f"{number}") for number in range(8))
    assert exponents(AUTO) == tuple(k / 20 for k in range(21))
    assert exponents(AUTO, coarse=True) == tuple(k / 20 for k in range(0, 21, 2))
    assert exponents(MBQ.switches, coarse=True) == exponents(MBQ.switches)


def test_a_killed_run_goes_on_with_the_same_grids(tmp_path: Path) -> None:
    model = tiny_model()
    made = recipe(chosen={"grid": "auto"})
    inputs = questions(model, 3)
    heard: list[str] = []
    whole = calibrate(
        model, inputs, made, progress=lambda done, total, note: heard.append(f"{done}/{total}")
    )
    assert heard == [f"{done}/8" for done in range(1, 9)]
    sizes = [len(unit["grid"]) for unit in whole.calib["units"] if unit["alpha"] is not None]
    assert sorted(sizes) == [11, 11, 21, 21, 21, 21]
    expected = bytes_of(whole, tmp_path / "expected")

    def kill(done: int, _total: int, _note: str = "") -> None:
        if done == 7:
            raise KilledError

    with State.open(tmp_path / "work", {}) as state, pytest.raises(KilledError):
        calibrate(model, inputs, made, state=state, progress=kill)
    heard.clear()
    with State.open(tmp_path / "work", {}) as state:
        found = calibrate(
            model,
            inputs,
            made,
            state=state,
            progress=lambda done, total, note: heard.append(note.split(" error")[0]),
        )
    assert heard == ["block 2/2"]
    assert bytes_of(found, tmp_path / "found") == expected
    assert (tmp_path / "work" / "blocks" / BLOCKS).is_dir()


def test_gradients_are_measured_for_the_grid_alone() -> None:
    awq = METHODS["awq"]
    assert not awq.needs_ratios(awq.switches)
    assert awq.needs_ratios(awq.resolve({"grid": "auto"}))
