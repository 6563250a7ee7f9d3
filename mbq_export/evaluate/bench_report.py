"""Figures of a benchmark to its report and tables.

``details`` of a ``bench`` report, beside what every report has:

    env          machine and packages
    protocol     repetitions, warm-up
    libraries_ms importing what every session needs, once
    runs         per bundle and workload: bundle, workload, phases, ttft_ms, itl_ms, tpot_ms, e2e_ms,
                 tokens_per_second, memory, energy, roofline, noise
    comparison   every bundle against the first one, per workload and figure: medians and ratio
    bandwidth    reads from memory, measured
    noise        other programs' share of the CPUs, and why the result is not valid
    quality      null: benchmarks measure speed

Raw samples are in ``measurements``, named ``<bundle>/<workload>/<figure>``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import GateError
from mbq_export.evaluate import telemetry
from mbq_export.evaluate.figures import (
    LARGEST_COV_PERCENT,
    PHASES,
    TOTALS,
    Load,
    Run,
    comparison,
    decode_cov,
    noise_reasons,
    percent,
)
from mbq_export.evaluate.roofline import Roofline, StepBytes, graph_step, packed_step
from mbq_export.evaluate.telemetry import Bandwidth
from mbq_export.families.locate import family_of
from mbq_export.report import Report, nullable, shown
from mbq_export.runtime import DECODER, graph_record, runs_graphs

COLD: Final = "sessions were opened in a process that had its libraries loaded"
NO_GRAPH: Final = "the torch backend runs no graph"
FOLDED: Final = (
    "ONNX Runtime folds the functions of this lowering into float weights when it loads them"
)
QDQ: Final = "qdq"
UNRECORDED: Final = "the bundle's manifest does not say"
UNTOLD: Final = "the system does not tell"


def bench_report(
    runs: Sequence[Run], *, details: Mapping[str, Any], load: telemetry.Load
) -> Report:
    """Summarise runs; measures memory bandwidth and reads the bundles' sizes on the way.

    Args:
        runs: By workload, the first of each is what others are compared with.
        details: Further keys of the report.
        load: Who used the CPUs meanwhile.
    """
    bandwidth = telemetry.memory_bandwidth(threads=max(run.threads for run in runs))
    reasons = noise_reasons(runs, load)
    return Report(
        kind="bench",
        measurements=tuple(
            run.measurement(figure) for run in runs for figure in (*PHASES, *TOTALS)
        ),
        context={"bundles": list(dict.fromkeys(run.name for run in runs))},
        details={
            "env": telemetry.environment(),
            **details,
            "runs": [_run_json(run, bandwidth) for run in runs],
            "comparison": comparison(runs),
            "bandwidth": bandwidth.as_json(),
            "noise": {
                "seconds": load.seconds,
                "own_cpu_percent": 100 * load.own,
                **nullable("other_cpu_percent", percent(load.others), why="nobody tells"),
                "reasons": reasons,
            },
            "quality": None,
            "quality_why": "bench measures speed; mbq-export validate measures quality",
        },
        valid=not reasons,
    )


def noise_error(report: Report) -> GateError | None:
    """Return the error that an invalid result is, or None if it is valid."""
    if report.valid:
        return None
    first, *others = report.details["noise"]["reasons"]
    return GateError(
        "E1301",
        f"The figures are too noisy: {first}.",
        why="; ".join(others) or "what varies more than its limit says nothing about the bundles",
        fix=("close other programs and raise -r", "--allow-noisy keeps the result with a warning"),
    )


def rows(report: Report) -> list[tuple[str, ...]]:
    """Return a table: bundle, test, p50, p95 and p99 in ms, CoV %, tokens per second, % of the roofline."""
    table: list[tuple[str, ...]] = []
    for run in report.details["runs"]:
        work = run["workload"]
        tests = {
            f"vit@{work['images']}": ("phases", "vit", None, None),
            f"pp{work['prompt_tokens'] + work['visual_tokens']}": (
                "phases",
                "prefill",
                "prefill",
                None,
            ),
            f"tg{work['output_tokens']}": (None, "tpot_ms", "decode", "percent"),
            "itl": (None, "itl_ms", None, None),
            "ttft": (None, "ttft_ms", None, None),
            "e2e": (None, "e2e_ms", "e2e", None),
        }
        for test, (group, key, rate, share) in tests.items():
            found = (run[group] if group else run)[key]
            if found is None:
                continue
            roof = run["roofline"]["graph"]
            table.append(
                (
                    run["name"],
                    test,
                    shown(found["p50_ms"]),
                    shown(found["p95_ms"]),
                    shown(found["p99_ms"]),
                    shown(found["cov_percent"], 3),
                    shown(run["tokens_per_second"][rate]) if rate else "",
                    shown(roof[share], 3) if share and roof else "",
                )
            )
    return table


def comparison_rows(report: Report) -> list[tuple[str, ...]]:
    """Return a table: workload, figure, bundle, its median, the baseline's, the ratio and its p10 to p90."""
    return [
        (
            row["workload"],
            row["figure"],
            row["bundle"],
            shown(row["bundle_p50_ms"]),
            shown(row["baseline_p50_ms"]),
            f"{row['ratio']:.2f}x",
            f"{row['ratio_p10']:.2f} to {row['ratio_p90']:.2f}",
        )
        for row in report.details["comparison"]
    ]


def _run_json(run: Run, bandwidth: Bandwidth) -> dict[str, Any]:
    one = run.requests[0]
    return {
        "name": run.name,
        "bundle": _bundle_json(run),
        "workload": {
            "name": run.workload,
            "images": run.images,
            "visual_tokens": one.visual_tokens,
            "prompt_tokens": one.prompt_tokens,
            "output_tokens": one.output_tokens,
            "batch": 1,
            "requests": len(run.requests),
        },
        "phases": {
            "load": {"warm_ms": run.load.load_ms, "cold_ms": None, "cold_ms_why": COLD},
            **_summaries(run, {name: name for name in PHASES}),
        },
        **_summaries(run, {name: f"{name}_ms" for name in TOTALS}),
        "first_request": {"ttft_ms": run.load.first.ttft_ms, "e2e_ms": run.load.first.e2e_ms},
        "tokens_per_second": run.rates(),
        "memory": _memory_json(run.load),
        "energy": {"joules_per_token": None, "joules_per_token_why": "no energy counter is read"},
        "roofline": _rooflines(run, bandwidth),
        "noise": nullable("decode_cov_percent", decode_cov(run), why="fewer than two requests")
        | {"limit_percent": LARGEST_COV_PERCENT},
    }


def _bundle_json(run: Run) -> dict[str, Any]:
    scheme = run.bundle.manifest.get("quant", {}).get("scheme", {})
    return {
        "name": run.bundle.name,
        "sha256": run.bundle.sha256,
        **nullable("scheme", scheme.get("name"), why=UNRECORDED),
        **nullable("group_size", scheme.get("group_size"), why=UNRECORDED),
        "backend": run.backend,
        **nullable("lowering", run.lowering if runs_graphs(run.backend) else None, why=NO_GRAPH),
        "accuracy_level": run.accuracy_level,
        "threads": run.threads,
    }


def _memory_json(load: Load) -> dict[str, Any]:
    """What loading and the first request added; the process itself is the peak less the growth."""
    return {
        **nullable("kept_bytes", load.memory.kept, why=UNTOLD),
        **nullable("peak_growth_bytes", load.memory.peak, why=UNTOLD),
        **nullable("peak_rss_bytes", load.first.peak_rss_bytes, why=UNTOLD),
    }


def _summaries(run: Run, keys: Mapping[str, str]) -> dict[str, Any]:
    """Statistics of figures under their keys; null with the reason where there are no samples."""
    found: dict[str, Any] = {}
    for name, key in keys.items():
        measurement = run.measurement(name)
        spread = measurement.spread
        summary = spread.as_json(measurement.unit) if spread else None
        found |= nullable(key, summary, why=measurement.why)
    return found


def _rooflines(run: Run, bandwidth: Bandwidth) -> dict[str, Any]:
    """Both countings, or the packed one alone where no graph is run as its file holds it."""
    other_reading = (
        NO_GRAPH if not runs_graphs(run.backend) else FOLDED if run.lowering != QDQ else ""
    )
    median = run.measurement("tpot").value
    rate = 1000 / median if median else None
    checkpoint = QuantCheckpoint.open(run.bundle.checkpoint_folder, verify=False)
    family = family_of(checkpoint.config)
    shape = family.text_shape(checkpoint.config)
    steps: list[StepBytes] = [packed_step(checkpoint, family, shape)]
    if not other_reading:
        record = graph_record(run.bundle, DECODER, lowering=run.lowering)
        steps.append(graph_step(record, shape, limit=run.limit))
    found: dict[str, Any] = {
        step.counting: Roofline(
            step=step,
            context=run.context,
            bandwidth_gb_s=bandwidth.best_gb_s,
            cached_gb_s=Bandwidth.measure(
                int(step.at(run.context)), threads=run.threads, passes=2
            ).best_gb_s,
            tokens_per_second=rate,
        ).as_json()
        for step in steps
    }
    return found if not other_reading else found | nullable("graph", None, why=other_reading)
