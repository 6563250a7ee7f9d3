"""The protocol under a clock whose times are written down: rotation, marks, order, and who is not timed."""

import pytest
import torch

from mbq_export.errors import FormatError
from mbq_kernels.bench.entrant import Entrant, Placed, Placing
from mbq_kernels.bench.plan import absent_entrants
from mbq_kernels.bench.protocol import between, copies_for, measure, replays_for, rotation
from mbq_kernels.bench.session import time_linears
from mbq_kernels.bench.shapes import Shape, Suite
from tests.kernels.fake_clock import FakeClock, entrant, fake_rig, placed_with

SHAPE = Shape(n=32, k=128)
SUITE = Suite(name="tiny", shapes=(SHAPE,), rows=(1,))
BASE = entrant("base", source="base")
L2_OF_H100 = 50 << 20
L2_OF_4090 = 72 << 20


def nothing() -> None:
    """A launch."""


@pytest.mark.parametrize(
    ("weight_bytes", "l2_bytes", "copies"),
    [
        (5_067_776, L2_OF_H100, 53),  # 256 MiB / 5.07 MB
        (5_067_776, L2_OF_4090, 60),  # 4 * 72 MiB / 5.07 MB
        (1 << 30, L2_OF_H100, 1),
        (1 << 28, L2_OF_H100, 1),
    ],
)
def test_copies_exceed_four_caches_and_256_mib(
    weight_bytes: int, l2_bytes: int, copies: int
) -> None:
    assert copies_for(weight_bytes, l2_bytes) == copies


@pytest.mark.parametrize(("copies", "launches"), [(1, 50), (7, 56), (50, 50), (53, 53)])
def test_a_graph_has_at_least_50_launches_and_whole_turns(copies: int, launches: int) -> None:
    turns = rotation(copies)
    assert len(turns) == launches
    assert all(turns.count(copy) == launches // copies for copy in range(copies))


@pytest.mark.parametrize(
    ("replay_us", "replays"), [(500.0, 50), (10_000.0, 50), (20_000.0, 25), (300_000.0, 5)]
)
def test_large_cases_are_replayed_as_often_as_fits_half_a_second(
    replay_us: float, replays: int
) -> None:
    assert replays_for(replay_us) == replays


def test_a_launch_is_a_replay_over_its_launches_after_five_replays_to_warm_up() -> None:
    clock = FakeClock([4.0])
    timing = measure(clock, [nothing] * 50)
    assert timing is not None
    assert (timing.median_us, timing.launches, timing.replays) == (pytest.approx(4.0), 50, 50)
    assert clock.replayed == [5, 50]
    assert not timing.noisy


@pytest.mark.parametrize(("spread", "noisy"), [(0.04, False), (0.06, True)])
def test_replays_that_differ_by_more_than_5_percent_are_noisy(spread: float, noisy: bool) -> None:
    timing = measure(FakeClock([4.0], spread=spread), [nothing] * 50)
    assert timing is not None
    assert timing.noisy is noisy


@pytest.mark.parametrize(("second", "drifting"), [(10.1, False), (10.3, True), (9.7, True)])
def test_a_base_that_moved_marks_everything_between(second: float, drifting: bool) -> None:
    clock = FakeClock([10.0, 2.0, second])
    found = between(
        lambda: measure(clock, [nothing] * 50), [lambda: measure(clock, [nothing] * 50)]
    )
    assert found.base is not None
    assert found.others[0] is not None
    assert found.others[0].drifting is drifting
    assert found.base.drifting is drifting
    assert found.base.median_us == pytest.approx((10.0 + second) / 2)


def test_a_row_is_held_against_base_and_ceiling() -> None:
    # base, ours, base; no kernel library, so no ceiling is measured
    (base, ours) = time_linears(
        fake_rig(FakeClock([10.0, 2.0, 10.0])), SUITE, [BASE, entrant("us")]
    )
    assert ours["speedup"] == pytest.approx(5.0)
    assert base["speedup"] == pytest.approx(1.0)
    assert ours["gb_s"] == pytest.approx(32 * 128 * 2 / 2.0 / 1e3)
    assert ours["percent_of_datasheet"] == pytest.approx(100 * ours["gb_s"] / 3350)
    assert ours["percent_of_read"] is None
    assert ours["correct"] is True


def test_a_wrong_kernel_is_not_timed() -> None:
    clock = FakeClock([10.0, 10.0])  # a third list of launches would end the test
    wrong = entrant("wrong", place=placed_with(lambda x, w: 1.01 * (x @ w.T)))
    base, ours = time_linears(fake_rig(clock), SUITE, [BASE, wrong])
    assert base["timing"] is not None
    assert ours["timing"] is None
    assert ours["correct"] is False
    assert "relative L2" in ours["timing_why"]
    assert len(clock.recorded) == 2


def test_one_output_that_nobody_wrote_is_seen() -> None:
    def unwritten(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        y = x @ w.T
        y[0, 7] = torch.nan
        return y

    rig = fake_rig(FakeClock([10.0, 10.0]))
    _, ours = time_linears(rig, SUITE, [BASE, entrant("us", place=placed_with(unwritten))])
    assert ours["timing_why"].startswith("wrong: 1 of 32 outputs were not written")


def refusing(error: Exception) -> Entrant:
    def place(shape: Shape, placing: Placing) -> Placed:
        raise error

    return entrant("peer", source="peer", place=place)


def test_a_peer_that_refuses_is_listed_with_its_reason() -> None:
    rig = fake_rig(FakeClock([10.0, 10.0]))
    _, peer = time_linears(rig, SUITE, [BASE, refusing(ValueError("no such shape\nmore"))])
    assert peer["timing_why"] == "ValueError: no such shape"
    assert peer["correct"] is None


def test_a_refusal_of_our_library_is_a_reason_and_a_bug_of_ours_is_not() -> None:
    def failing(error: Exception) -> Entrant:
        def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            raise error

        return entrant("us", place=placed_with(product))

    refused = failing(FormatError("E4121", "status -10.", why="config illegal"))
    _, row = time_linears(fake_rig(FakeClock([10.0, 10.0])), SUITE, [BASE, refused])
    assert row["timing_why"] == "status -10. config illegal"
    with pytest.raises(TypeError, match="ours"):
        time_linears(
            fake_rig(FakeClock([10.0, 10.0])), SUITE, [BASE, failing(TypeError("a bug of ours"))]
        )


def test_missing_peers_are_listed_by_name() -> None:
    rig = fake_rig(FakeClock([]))
    missing = entrant("gone", source="peer", absent="gone is not installed")
    oracle = entrant("oracle", source="oracle", absent="CPU only")
    listed = absent_entrants([BASE, missing, oracle], rig.setting, rehearsal=False)
    assert listed == [{"entrant": "gone", "source": "peer", "why": "gone is not installed"}]


def test_those_for_comparison_only_are_asked_at_few_rows() -> None:
    suite = Suite(name="tiny", shapes=(SHAPE,), rows=(1, 2), few_rows=(1,))
    rig = fake_rig(FakeClock([10.0] * 20))
    few = Entrant(**{**{n: getattr(BASE, n) for n in BASE.__slots__}, "main": False})
    named = Entrant(
        **{**{n: getattr(few, n) for n in few.__slots__}, "name": "x", "source": "peer"}
    )
    rows = time_linears(rig, suite, [BASE, entrant("us"), named])
    assert [(r["m"], r["entrant"]) for r in rows] == [
        (1, "base"),
        (1, "us"),
        (1, "x"),
        (2, "base"),
        (2, "us"),
    ]
