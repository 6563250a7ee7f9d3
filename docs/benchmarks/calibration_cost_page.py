"""The Markdown page of calibration_cost.json."""

from collections.abc import Mapping
from typing import Any, Final

TITLES: Final = {
    "sample": "Sample model",
    "shaped": "Random model with the sizes of Qwen2-0.5B",
}
HEAD: Final = """# Cost of the scale search

Made by `python -m docs.benchmarks.calibration_cost`, which writes this page and
[calibration_cost.json](calibration_cost.json). The search of `mbq` with its default switches against
`tests/reference/naive.py`: one exponent at a time, every token, the whole inspected module (attention, MLP or
`down_proj`) run again for each, nothing kept but what full precision reads and answers. Layer by layer in one process
on one thread, one after the other on the same rows. Ratios are of processor time, which other processes on the machine
disturb less than wall time. The measurement of gradients before the search costs both the same and is in neither.
"""


def page(document: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        document: Contents of calibration_cost.json.
    """
    parts = [HEAD, summary(document)]
    for name, case in document["cases"].items():
        parts += [f"## {TITLES[name]}\n", about(case), table(case)]
    return "\n".join(parts)


def summary(document: Mapping[str, Any]) -> str:
    """One row per case: what was reached, what was wanted, what was predicted."""
    lines = [
        "| model | naive / package, median | least to largest | target | predicted | exponents alike | most excess error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, case in document["cases"].items():
        ratio, target = case["ratio"], document["target"]
        alike, units, excess = agreement(case)
        lines.append(
            f"| {TITLES[name]} | **{ratio['median']:.1f}x** | {ratio['least']:.1f} to {ratio['largest']:.1f} | "
            f"{target:.0f}x: {'reached' if ratio['median'] >= target else 'missed'} | {case['predicted']:.1f}x | "
            f"{alike} of {units} | {100 * excess:.3f} % |"
        )
    return "\n".join(lines) + "\n"


def agreement(case: Mapping[str, Any]) -> tuple[int, int, float]:
    """Units with the same exponent, units, and how much larger the error of the worst one is than the least."""
    rows = [row for row in case["rows"] if "wanted" in row]
    pairs = [(row["alphas"][unit], alpha) for row in rows for unit, alpha in row["wanted"].items()]
    worst = max(value for row in rows for value in row["excess"].values())
    return sum(found == wanted for found, wanted in pairs), len(pairs), worst


def about(case: Mapping[str, Any]) -> str:
    """What was run, and where."""
    setup, tokens = case["setup"], case["tokens"]
    naive = sorted({row["layer"] for row in case["rows"] if "naive" in row})
    whole = sum(row["package"]["cpu_s"] for row in case["rows"]) / case["repetitions"]
    searched = len({row["layer"] for row in case["rows"]})
    once = "once: the ratio of a single layer has no spread" if len(naive) == 1 else "once"
    repeated = once if case["repetitions"] == 1 else f"{case['repetitions']} times"
    peaks = list(case["peak_rss_mib"].values())
    return (
        f"{case['layers']} layers, hidden {case['hidden']}, MLP {case['intermediate']}, "
        f"{case['heads'][0]} heads on {case['heads'][1]}; {case['samples']} samples: {tokens['vision']:,} vision, "
        f"{tokens['answer']:,} answer and {tokens['prompt']:,} prompt tokens. {setup['scheme']}, groups of "
        f"{setup['group_size']}, {setup['dtype']}, {setup['threads']} thread of {setup['processor']} "
        f"({setup['cores']} cores, load {setup['load_at_start']} before and {case['load_at_end']} after), "
        f"torch {setup['torch']}. The package searched {searched} layers ({whole:.0f} s of processor time), the naive "
        f"search layers {', '.join(map(str, naive))}, {repeated}; nothing is extrapolated. "
        f"Peak memory of the process was {peaks[0]:.0f} MiB after the first layer and {peaks[-1]:.0f} MiB after the "
        "last, of both searches together.\n"
    )


def table(case: Mapping[str, Any]) -> str:
    """Times of the layers that both searched."""
    lines = [
        "| layer | repetition | package, s | naive, s | ratio | ratio of wall times | exponents that differ |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in case["rows"]:
        if "naive" not in row:
            continue
        differ = [
            f"{unit} {row['alphas'][unit]:.2f} for {alpha:.2f} (+{100 * row['excess'][unit]:.3f} %)"
            for unit, alpha in row["wanted"].items()
            if row["alphas"][unit] != alpha
        ]
        lines.append(
            f"| {row['layer']} | {row['repetition']} | {row['package']['cpu_s']:.2f} | {row['naive']['cpu_s']:.2f} | "
            f"{row['ratio']:.1f} | {row['wall_ratio']:.1f} | {', '.join(differ) or 'none'} |"
        )
    return "\n".join(lines) + "\n"
