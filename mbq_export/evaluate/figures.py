"""Raw requests of a benchmark to its figures: phases, rates, ratios, noise."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mbq_export.bundle import Bundle
from mbq_export.evaluate import telemetry
from mbq_export.evaluate.telemetry import Growth
from mbq_export.report import Measurement, Statistics, nullable
from mbq_export.runtime.timing import RequestStatistics

LARGEST_COV_PERCENT: Final = 5.0
LARGEST_OTHERS_PERCENT: Final = 10.0
"""Beyond these a result is not valid: spread of the decode times between requests, CPUs used by others."""

Values = Callable[[RequestStatistics], Iterable[float]]

PHASES: Final[Mapping[str, Values]] = {
    "preprocess": lambda r: (r.preprocess_ms,),
    "vit": lambda r: (r.vision_ms,) if r.visual_tokens else (),
    "merge": lambda r: (r.merge_ms,),
    "prefill": lambda r: (r.prefill_ms,),
    "decode": lambda r: r.decode_ms,
    "sample": lambda r: r.sample_ms,
}
"""Phases and their samples: one per request, of decode and sample one per token."""

TOTALS: Final[Mapping[str, Values]] = {
    "ttft": lambda r: (r.ttft_ms,),
    "itl": lambda r: r.itl_ms,
    "tpot": lambda r: () if r.tpot_ms is None else (r.tpot_ms,),
    "e2e": lambda r: (r.e2e_ms,),
}
"""Time to first token, gaps between tokens, a request's mean gap, and all of it."""

COMPARED: Final = ("vit", "prefill", "tpot", "ttft", "e2e")
ABSENT: Final = {
    "vit": "the workload has no picture",
    "decode": "a single token was generated",
    "itl": "a single token was generated",
    "tpot": "a single token was generated",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What opening a session took.

    Attributes:
        load_ms: Time, libraries loaded before.
        memory: What it and the first request added to the process.
        first: The first request, allocations included.
    """

    load_ms: float
    memory: Growth
    first: RequestStatistics


@dataclass(frozen=True, kw_only=True)
class Run:
    """One bundle at one workload, measured.

    Attributes:
        name: The bundle's name in results.
        bundle: The bundle.
        backend: What ran it.
        lowering: Form of the decoder graph.
        accuracy_level: Of ONNX Runtime's 4-bit products.
        threads: CPU threads; 0 for all.
        limit: Positions of the context.
        images: Pictures per request.
        load: What opening took.
        requests: Those that count.
    """

    name: str
    bundle: Bundle
    backend: str
    lowering: str
    accuracy_level: int
    threads: int
    limit: int
    images: int
    load: Load
    requests: tuple[RequestStatistics, ...]

    @property
    def workload(self) -> str:
        """Name of the workload, for example ``pp12+tg32@1``."""
        one = self.requests[0]
        return f"pp{one.prompt_tokens}+tg{one.output_tokens}@{self.images}"

    @property
    def context(self) -> float:
        """Mean positions that a decode step attends to."""
        one = self.requests[0]
        return one.prompt_tokens + one.visual_tokens + one.output_tokens / 2

    def measurement(self, figure: str) -> Measurement:
        """Return one of `PHASES` or `TOTALS` with its samples."""
        values = {**PHASES, **TOTALS}[figure]
        return Measurement.of_samples(
            f"{self.name}/{self.workload}/{figure}",
            [value for request in self.requests for value in values(request)],
            unit="ms",
            why=ABSENT.get(figure, "not measured"),
        )

    def rates(self) -> dict[str, Any]:
        """Tokens per second, from medians."""
        one = self.requests[0]
        prompt = one.prompt_tokens + one.visual_tokens
        counts = {"prefill": prompt, "tpot": 1, "e2e": one.output_tokens}
        rates: dict[str, Any] = {}
        for figure, tokens in counts.items():
            median = self.measurement(figure).value
            rates |= nullable(
                "decode" if figure == "tpot" else figure,
                1000 * tokens / median if median else None,
                why=ABSENT.get(figure, "not measured"),
            )
        return rates


def comparison(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Compare every bundle with the first one, request by request in the order they were run.

    ``ratio`` is the median over turns of the first bundle's time through the other's: above 1 the other is
    faster. Turns are pairs of neighbours in time, so slow drifts of the machine cancel.
    """
    rows = []
    for run in runs:
        base = next(other for other in runs if other.workload == run.workload)
        if run is base:
            continue
        for figure in COMPARED:
            theirs, ours = base.measurement(figure), run.measurement(figure)
            if theirs.value is None or ours.value is None:
                continue
            ratios = np.array(theirs.samples) / np.array(ours.samples)
            rows.append(
                {
                    "workload": run.workload,
                    "figure": figure,
                    "baseline": base.name,
                    "bundle": run.name,
                    "baseline_p50_ms": theirs.value,
                    "bundle_p50_ms": ours.value,
                    "ratio": float(np.median(ratios)),
                    "ratio_p10": float(np.percentile(ratios, 10)),
                    "ratio_p90": float(np.percentile(ratios, 90)),
                }
            )
    return rows


def noise_reasons(runs: Sequence[Run], load: telemetry.Load) -> list[str]:
    """Say why these figures should not be believed; nothing if they may be."""
    reasons = []
    for run in runs:
        cov = decode_cov(run)
        if cov is not None and cov > LARGEST_COV_PERCENT:
            reasons.append(
                f"{run.name} {run.workload}: decode times of requests vary by {cov:.1f} % "
                f"(limit {LARGEST_COV_PERCENT:.0f} %)"
            )
    others = percent(load.others)
    if others is not None and others > LARGEST_OTHERS_PERCENT:
        reasons.append(
            f"other programs used {others:.0f} % of the CPUs (limit {LARGEST_OTHERS_PERCENT:.0f} %)"
        )
    return reasons


def decode_cov(run: Run) -> float | None:
    """Spread of the mean decode time between requests, in percent."""
    samples = run.measurement("tpot").samples
    return Statistics.of(samples).cov_percent if samples else None


def percent(share: float | None) -> float | None:
    """Return a share as a percentage."""
    return None if share is None else 100 * share
