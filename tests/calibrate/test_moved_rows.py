"""A search on what rounded blocks leave: the slow loop's choices, and full precision's where rounding moves nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mbq_export.blocks.stream import BlockStream
from mbq_export.calibrate import _blocks, calibrate, units
from mbq_export.calibrate.methods import METHODS
from mbq_export.errors import UsageError
from mbq_export.families.base import LINEARS, LoadedModel
from mbq_export.families.llava_onevision import load
from mbq_export.progress import silent
from mbq_export.state import State
from tests.calibrate.test___init__ import KilledError, bytes_of, recipe
from tests.calibrate.views import RATIOS, job
from tests.questions import questions, tiny_model
from tests.reference import moved_rows
from tests.tiny import Tiny, write_tiny

MBQ = METHODS["mbq"]
QUANTIZED = MBQ.resolve({"prefix": "quantized", "tokens": "all"})
EXACT = MBQ.resolve({"tokens": "all"})
PER_HEAD = Tiny(kv_heads=4, seed=1)
SAMPLES = 3
TIES = 3e-2
"""A weight on a tie may fall to the other code where scales differ by a float32 step; one in thousands does."""

Units = dict[tuple[int, str], dict[str, Any]]


def searched(model: LoadedModel, switches: Any, **options: Any) -> Units:
    task = job(model, switches, MBQ, **options)
    batches = task.stream.begin(questions(model, SAMPLES))
    found = _blocks(task, batches, None, silent)
    return {(u["layer"], u["unit"]): u for _, record in found for u in record["units"]}


def test_every_unit_is_searched_on_what_rounded_blocks_and_units_before_leave() -> None:
    model = tiny_model(PER_HEAD)
    stream = BlockStream(model)
    batches = stream.begin(questions(model, SAMPLES))
    wanted = moved_rows.search(stream, batches, RATIOS, bits=3, group_size=32)
    found = searched(model, QUANTIZED)
    other = searched(model, EXACT)
    assert len(found) == 8
    for (layer, unit), record in found.items():
        expected = wanted[layer][unit]
        curve = [value for _, value in record["grid"]]
        assert curve == pytest.approx(expected.curve, rel=TIES), (layer, unit)
        # Between near-equal minima either choice is one: its loss is the loop's least.
        chosen = expected.curve[round(record["alpha"] * 20)]
        assert chosen == pytest.approx(min(expected.curve), rel=TIES)
        if (layer, unit) != (0, "qkv"):
            assert abs(record["J"]["rtn"] / other[layer, unit]["J"]["rtn"] - 1) > 3 * TIES


def test_the_first_unit_reads_what_full_precision_feeds_it() -> None:
    model = tiny_model(PER_HEAD)
    assert searched(model, QUANTIZED)[0, "qkv"] == searched(model, EXACT)[0, "qkv"]


def on_the_grid(folder: Path) -> LoadedModel:
    """A model of its own whose weights are codes times powers of two, each group with the least and largest code."""
    model = load(write_tiny(folder, PER_HEAD))
    generator = torch.Generator().manual_seed(5)
    for index in range(model.text.layers):
        for linear in LINEARS:
            weight = model.module.get_parameter(f"{model.family.linear_path(index, linear)}.weight")
            codes = torch.randint(0, 8, (weight.numel() // 32, 32), generator=generator)
            codes[:, 0], codes[:, 1] = 0, 7
            with torch.no_grad():
                weight.copy_(((codes - 4) * 2.0**-5).reshape(weight.shape))
    return model


def test_weights_that_rounding_keeps_leave_the_search_of_full_precision(tmp_path: Path) -> None:
    model = on_the_grid(tmp_path)
    found = searched(model, QUANTIZED)
    assert found == searched(model, EXACT)
    assert {record["J"]["rtn"] for record in found.values()} == {0.0}


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_blocks_that_are_run_again_give_the_same(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    model = tiny_model()
    some = replace(QUANTIZED, tokens=32) if scheme == "w3a16" else QUANTIZED
    options = {"scheme": scheme, "group_size": 128}
    kept = searched(model, some, **options)
    monkeypatch.setattr(units, "KEEP_BYTES", 0)
    assert searched(model, some, **options) == kept


def test_a_killed_run_rebuilds_what_rounded_blocks_leave(tmp_path: Path) -> None:
    model = tiny_model()
    made = recipe(chosen={"prefix": "quantized"})
    inputs = questions(model, SAMPLES)
    expected = bytes_of(calibrate(model, inputs, made), tmp_path / "expected")

    def kill(done: int, _total: int, _note: str = "") -> None:
        if done == 5:
            raise KilledError

    with (
        State.open(tmp_path / "work", {}) as state,
        pytest.raises(KilledError),
    ):
        calibrate(model, inputs, made, state=state, progress=kill)
    with State.open(tmp_path / "work", {}) as state:
        found = calibrate(model, inputs, made, state=state)
    assert bytes_of(found, tmp_path / "found") == expected
    assert found.calib["switches"]["prefix"] == "quantized"


def test_the_published_code_searches_full_precision() -> None:
    with pytest.raises(UsageError, match="--compat mbq contradicts prefix = quantized") as caught:
        MBQ.resolve({"compat": "mbq", "prefix": "quantized"})
    assert caught.value.code == "E2002"
