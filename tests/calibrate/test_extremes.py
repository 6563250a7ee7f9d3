"""Scales from extremes: the formula, where it applies, and what happens to outliers."""

from dataclasses import replace

import torch

from mbq_export.blocks.tokens import class_mask
from mbq_export.calibrate.extremes import FLOOR, even_out, largest_weights
from mbq_export.calibrate.methods.smoothquant import METHOD
from mbq_export.calibrate.units import Statistics, UnitView
from mbq_export.families.base import ANSWER, PAD, PROMPT, VISION
from tests.calibrate.views import views
from tests.questions import questions, tiny_model

SWITCHES = METHOD.switches


def seen() -> dict[str, UnitView]:
    model = tiny_model()
    return views(model, questions(model, 6), SWITCHES)


def with_peaks(unit: UnitView, peaks: torch.Tensor) -> UnitView:
    """The unit with largest |x| of our own making, in answers."""
    all_peaks = torch.zeros(4, len(peaks))
    all_peaks[ANSWER] = peaks
    statistics = Statistics(sums=all_peaks.double(), peaks=all_peaks, tokens=unit.statistics.tokens)
    return replace(unit, statistics=statistics)


def test_peaks_are_the_largest_of_each_class() -> None:
    unit = seen()["qkv"]
    rows = torch.cat([call.rows.flatten(0, -2) for call in unit.calls()]).abs()
    classes = torch.cat([call.classes for call in unit.calls()])
    for kind in (PAD, PROMPT, VISION, ANSWER):
        chosen = rows[class_mask(classes)[kind].bool()]
        expected = chosen.amax(0) if len(chosen) else torch.zeros(rows.shape[1])
        assert torch.equal(unit.statistics.peaks[kind], expected.float())


def test_the_scale_is_the_root_of_the_ratio_of_extremes() -> None:
    unit = seen()["qkv"]
    found = even_out(unit, SWITCHES)
    assert found is not None
    x = unit.statistics.peak(PROMPT, VISION, ANSWER)
    rows = [unit.block.get_parameter(f"{linear}.weight").abs() for linear in unit.place.into]
    w = torch.cat(rows).amax(0).double()
    expected = (x / w).sqrt()
    expected /= (expected.max() * expected.min()).sqrt()
    torch.testing.assert_close(found.scales.double(), expected, rtol=1e-5, atol=0)
    assert (found.alpha, found.record["stat"]) == (0.5, "max")


def test_afterwards_activations_and_weights_reach_equally_far() -> None:
    unit = seen()["gate_up"]
    found = even_out(unit, SWITCHES)
    assert found is not None
    x = unit.statistics.peak(PROMPT, VISION, ANSWER).float() / found.scales
    ratio = x / (largest_weights(unit) * found.scales)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


def test_inputs_that_no_norm_scales_are_left_alone() -> None:
    assert even_out(seen()["down"], SWITCHES) is None


def test_a_dead_channel_keeps_one_and_shifts_no_other() -> None:
    unit = seen()["qkv"]
    peaks = torch.rand(128, generator=torch.Generator().manual_seed(3)) + 0.5
    alive = even_out(with_peaks(unit, peaks), SWITCHES)
    peaks = torch.where(torch.arange(128) == 7, 0.0, peaks)
    found = even_out(with_peaks(unit, peaks), SWITCHES)
    assert found is not None
    assert alive is not None
    assert found.scales[7] == 1
    assert found.record["dead_channels"] == 1
    rest = torch.arange(128) != 7
    ratio = found.scales[rest] / alive.scales[rest]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_a_scale_that_its_norm_cannot_take_gives_way_to_none() -> None:
    unit = seen()["qkv"]
    spread = torch.logspace(-20, 20, 128, base=2.0)
    norm = unit.block.get_parameter(f"{unit.place.source}.weight")
    with torch.no_grad():
        norm.copy_(torch.logspace(10, -10, 128, base=2.0))
    found = even_out(with_peaks(unit, spread), SWITCHES)
    assert found is not None
    assert (found.alpha, found.record["dropped"]) == (0.0, 1)
    assert found.scales.tolist() == [1] * 128


def test_the_floor_is_the_published_one() -> None:
    assert FLOOR == 1e-5
