"""A report of one's own: read as it is, refused where a search could not use it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mbq_export.calibrate.edited import edited
from mbq_export.calibrate.gradients import Gradients
from mbq_export.calibrate.sensitivity import sensitivity
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.errors import FormatError
from mbq_export.families.base import LINEARS

LAYERS = 3


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A report as `calibrate` writes it."""
    rng = np.random.default_rng(0)
    values = rng.random((LAYERS, len(LINEARS), 4, 5)) + 0.1
    gradients = Gradients(
        linears=LINEARS, mean_abs=values, mean_square=values**2, losses=np.ones(5)
    )
    found = sensitivity(gradients, floor="median", seed=0, facts={})
    calib = {"switches": Switches(method="mbq").resolved()}
    ChannelScales(scales={}, sensitivity=found, calib=calib).write(tmp_path)
    return tmp_path / "sensitivity.json"


def read(path: Path) -> dict[str, Any]:
    return edited(path, layers=LAYERS, linears=LINEARS)


def test_a_report_is_taken_as_it_is_and_said_to_be_the_users(report: Path) -> None:
    before = json.loads(report.read_text())
    before["layers"][1]["r"]["attn"] = 0.25
    report.write_text(json.dumps(before))
    found = read(report)
    assert found["source"] == "user"
    assert found["layers"] == before["layers"]


def ratio(entry: dict[str, Any]) -> dict[str, Any]:
    return entry["linears"]["mlp.up_proj"]["clipped"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda whole: whole.update(schema="mbq-export/calib@1"), "is no mbq-export/sensitivity"),
        (lambda whole: whole["layers"].pop(), "has 2 layers"),
        (lambda whole: whole.update(layers={}), "has no layers"),
        (lambda whole: whole["layers"][1]["r"].pop("mlp"), r"layers\[1\] has no r\.mlp"),
        (lambda whole: whole["layers"][2]["r"].update(attn=-0.1), r"r\.attn is -0\.1"),
        (lambda whole: whole["layers"][2]["r"].update(attn=None), r"r\.attn is None"),
        (lambda whole: whole["layers"][0]["r"].update(attn=True), r"r\.attn is True"),
        (lambda whole: ratio(whole["layers"][0]).update(vision="1"), r"clipped\.vision is 1"),
        (lambda whole: ratio(whole["layers"][0]).pop("prompt"), r"up_proj\.clipped\.prompt"),
        (lambda whole: whole["layers"].insert(0, None) or whole["layers"].pop(), "has no r"),
    ],
)
def test_what_no_search_can_use_is_refused_by_its_place(
    report: Path, edit: Callable[[dict[str, Any]], object], words: str
) -> None:
    whole = json.loads(report.read_text())
    edit(whole)
    report.write_text(json.dumps(whole))
    with pytest.raises(FormatError, match=words) as caught:
        read(report)
    assert caught.value.code == "E4316"


def test_a_class_that_could_not_be_measured_stays_null(report: Path) -> None:
    whole = json.loads(report.read_text())
    ratio(whole["layers"][0])["vision"] = None
    report.write_text(json.dumps(whole))
    assert ratio(read(report)["layers"][0])["vision"] is None


def test_no_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read(tmp_path / "sensitivity.json")
    assert caught.value.code == "E4316"
