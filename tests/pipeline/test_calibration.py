"""Samples of a build: encoded once for both stages that read them."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.blocks.room import Room
from mbq_export.pipeline import calibration
from mbq_export.pipeline.calibration import Encoded, channel_scales, room_of, samples_of_scales
from mbq_export.pipeline.plan import make_plan
from mbq_export.pipeline.request import BuildRequest
from mbq_export.progress import silent


@pytest.fixture
def encoded(tmp_path: Path) -> Encoded:
    request = BuildRequest(
        model="tiny-llava-ov",
        out=tmp_path / "out",
        method="gptq",
        samples=6,
        targets=("cpu",),
        gate="off",
        gate_reason="nothing is built",
    )
    plan = make_plan(request)
    return Encoded(plan, plan.load())


def test_samples_are_encoded_once_for_scales_and_rounding(
    encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real encoder, counted."""
    real, asked = calibration.encode, []

    def counted(samples, *args, **named):
        asked.append(len(samples))
        return real(samples, *args, **named)

    monkeypatch.setattr(calibration, "encode", counted)
    scales = channel_scales(encoded, lambda _: None, state=None, room=Room(), progress=silent)
    found = samples_of_scales(encoded, scales)
    assert found is not None
    assert found.inputs is encoded.inputs
    assert asked == [6, len(found.held_out)]


def test_memory_is_what_was_allowed_or_what_the_machine_has(
    encoded: Encoded, tmp_path: Path
) -> None:
    assert room_of(encoded.plan, tmp_path, print).limit > 1 << 20
    request = replace(encoded.plan.request, max_ram=7)
    assert room_of(replace(encoded.plan, request=request), tmp_path, print).limit == 7
