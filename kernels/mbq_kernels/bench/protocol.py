"""How a launch is timed, so that two figures of one run may be compared.

    gate      the answer is right, else nothing is timed
    rotate    R copies of the weights, R * bytes >= max(4 * L2, 256 MB): no copy is in a cache when its turn comes
    graph     one CUDA graph of >= 50 launches over the rotation: the host's launch cost is outside
    replays   5 to warm up, then >= 50; of large ones as many as fit 0.5 s, at least 5
    A B A     the base before and after: a card that changes its speed in between is seen

A time is a replay's over its launches. (p90 - p10) / median beyond 5 % marks a row as noisy, a base that moved by more
than 2 % marks every row between its two timings as drifting. Marked rows are kept and shown as such.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from mbq_kernels.bench.clock import Clock, Launch, Recorded

SMALLEST_ROTATION_BYTES: Final = 256 << 20
CACHES: Final = 4
"""A rotation this many times as large as L2 leaves nothing of a copy in it."""
LEAST_LAUNCHES: Final = 50
WARM_REPLAYS: Final = 5
REPLAYS: Final = 50
LEAST_REPLAYS: Final = 5
BUDGET_US: Final = 0.5e6
NOISY_PERCENT: Final = 5.0
DRIFT_PERCENT: Final = 2.0
DRY: Final = "a dry run times nothing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times of one launch, over replays of a graph of many.

    Attributes:
        launches: Launches in the graph.
        replays: Replays that count.
        median_us: Median over replays.
        p10_us: 10th percentile.
        p90_us: 90th percentile.
        drift_percent: How far the base moved around this timing; None outside an A-B-A.
    """

    launches: int
    replays: int
    median_us: float
    p10_us: float
    p90_us: float
    drift_percent: float | None = None

    @property
    def spread_percent(self) -> float:
        """(p90 - p10) / median."""
        return 100 * (self.p90_us - self.p10_us) / self.median_us

    @property
    def noisy(self) -> bool:
        """Replays differ by more than `NOISY_PERCENT`."""
        return self.spread_percent > NOISY_PERCENT

    @property
    def drifting(self) -> bool:
        """The base moved by more than `DRIFT_PERCENT`."""
        return self.drift_percent is not None and self.drift_percent > DRIFT_PERCENT

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "launches": self.launches,
            "replays": self.replays,
            "median_us": self.median_us,
            "p10_us": self.p10_us,
            "p90_us": self.p90_us,
            "noisy": self.noisy,
            "drift_percent": self.drift_percent,
            "drifting": self.drifting,
        }


def copies_for(weight_bytes: float, l2_bytes: int) -> int:
    """R: copies of a weight that no cache holds together."""
    return math.ceil(max(SMALLEST_ROTATION_BYTES, CACHES * l2_bytes) / weight_bytes)


def rotation(copies: int) -> list[int]:
    """Copy of each launch: whole turns, so that every copy is read equally often."""
    return list(range(copies)) * math.ceil(LEAST_LAUNCHES / copies)


def replays_for(replay_us: float) -> int:
    """How many replays of this length to time."""
    return max(LEAST_REPLAYS, min(REPLAYS, int(BUDGET_US / max(replay_us, 1.0))))


def measure(clock: Clock, launches: Sequence[Launch]) -> Timing | None:
    """Time launches that run one after the other in one graph.

    Returns:
        The time of one launch; None from a clock that measures nothing, after it ran the launches.
    """
    return timing_of(clock.record(launches), launches=len(launches))


def timing_of(recorded: Recorded, *, launches: int) -> Timing | None:
    """Warm up, then time as many replays as the protocol asks for.

    Args:
        recorded: What to replay.
        launches: How many a replay runs; the time of one is returned.
    """
    warm = recorded.replay_us(WARM_REPLAYS)
    if not warm:
        return None
    samples = np.array(recorded.replay_us(replays_for(warm[-1]))) / launches
    p10, median, p90 = (float(v) for v in np.percentile(samples, (10, 50, 90)))
    return Timing(launches=launches, replays=len(samples), median_us=median, p10_us=p10, p90_us=p90)


@dataclass(frozen=True, slots=True, kw_only=True)
class Between:
    """What an A-B-A found: the base, and each of the others with the base's drift.

    Attributes:
        base: Timing of the first A with the drift to the second; None if nothing is measured or it is wrong.
        others: One per measured thing, in order.
    """

    base: Timing | None
    others: tuple[Timing | None, ...]


def between(
    base: Callable[[], Timing | None], others: Sequence[Callable[[], Timing | None]]
) -> Between:
    """Time the base, the others, and the base again."""
    first = base()
    timed = [other() for other in others]
    second = base()
    if first is None or second is None:
        return Between(base=first, others=tuple(timed))
    middle = (first.median_us + second.median_us) / 2
    drift = 100 * abs(second.median_us - first.median_us) / middle
    return Between(
        base=replace(first, median_us=middle, drift_percent=drift),
        others=tuple(None if one is None else replace(one, drift_percent=drift) for one in timed),
    )
