"""The Markdown page of footprint.json."""

from collections.abc import Mapping
from typing import Any, Final

MIB: Final = 1 << 20
PAPER: Final = (("memory", 2.78), ("speed", 1.44))
"""Q-VLM, arXiv 2410.08119: a 13B LLaVA model, its own kernels on a GPU. The paper's numbers, not measured here."""

HEAD: Final = """\
# Memory and speed against full precision

Made by `python -m docs.benchmarks.footprint`, which writes this page and [footprint.json](footprint.json). The sample
model with decoder linears in w3a16, groups of 128, beside the same model in full precision; ONNX Runtime on a CPU,
{threads} thread, one picture, {tokens} new tokens, {repetitions} requests each, in turn; medians, and for ratios the
median of pairs.{noise}

| | full precision | ours | full / ours | Q-VLM's paper |
| --- | --- | --- | --- | --- |
{rows}

Brackets are the 10 % and 90 % points of the pairs. The last column is what the paper claims for its own method and a 13B
model on a GPU; it was not measured here, and the two columns are no comparison of methods. The bytes of the linears
shrink as the format says; embedding, head, vision tower and norms keep 16 bits, {rest} of our checkpoint. ONNX Runtime has
no 3-bit kernel: the `qdq` graph holds the codes in 4-bit containers and, like the full-precision graph, computes in
float32, so full precision reads twice the bytes of its checkpoint there. The functions of the base graph (`reference`)
would be folded into float weights when they are loaded: not a fast path. Times on a CPU say what this path costs, not what
the format is worth on a device that reads 3 bits, and nothing here was timed on a GPU. Peak memory is that of a whole
process and mostly its libraries. What the formats cost in accuracy: [quality.md](quality.md).

Made with {versions}; sources `{code}`.
"""


def page(document: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        document: Contents of footprint.json.
    """
    setup = document["setup"]
    noise = "" if document["valid"] else f" **Noisy**: {'; '.join(document['noise']['reasons'])}."
    return HEAD.format(
        threads=setup["threads"],
        tokens=setup["new_tokens"],
        repetitions=setup["repetitions"],
        noise=noise,
        rows="\n".join(f"| {' | '.join(row)} |" for row in rows(document)),
        rest=_rest(document["bundles"]["ours"]),
        versions=", ".join(f"{name} {version}" for name, version in setup["versions"].items()),
        code=setup["code"][:16],
    )


def _rest(ours: Mapping[str, Any]) -> str:
    """What the decoder's linears leave of a checkpoint."""
    rest = ours["checkpoint_bytes"] - ours["linears_bytes"]
    return f"{rest / MIB:.2f} of the {ours['checkpoint_bytes'] / MIB:.2f} MiB"


def rows(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table."""
    full, ours = (document["bundles"][name] for name in ("full", "ours"))
    paper = dict(PAPER)
    found = [
        size("decoder linears on disk", full["linears_bytes"], ours["linears_bytes"]),
        size(
            "checkpoint on disk",
            full["checkpoint_bytes"],
            ours["checkpoint_bytes"],
            f"{paper['memory']:.2f} (memory)",
        ),
        size(
            "weights read per token, packed",
            *(one["step"]["packed"]["weights_bytes"] for one in (full, ours)),
        ),
    ]
    graphs = [one["step"]["graph"] for one in (full, ours)]
    if all(graphs):
        weights = [graph["weights_bytes"] for graph in graphs]
        found.append(size("weights read per token, ONNX graph", *weights))
    peaks = [one["memory"]["peak_bytes"] for one in (full, ours)]
    if all(peaks):
        found.append(size("peak memory of a process that answers once", *peaks))
    labels = {"ttft": "first token", "tpot": "each further token", "e2e": "whole answer"}
    timed = (one for one in document["comparison"] if one["figure"] in labels)
    return [*found, *(time(labels[one["figure"]], one, paper["speed"]) for one in timed)]


def time(what: str, one: Mapping[str, Any], paper: float) -> tuple[str, ...]:
    """A line of milliseconds."""
    ratio, low, high = (one[name] for name in ("ratio", "ratio_p10", "ratio_p90"))
    return (
        f"{what}, ms",
        f"{one['baseline_p50_ms']:.2f}",
        f"{one['bundle_p50_ms']:.2f}",
        f"{ratio:.2f} [{low:.2f}, {high:.2f}]",
        f"{paper:.2f} (speed)" if one["figure"] == "e2e" else "",
    )


def size(what: str, full: int, ours: int, paper: str = "") -> tuple[str, ...]:
    """A line of bytes."""
    return what, f"{full / MIB:.2f} MiB", f"{ours / MIB:.2f} MiB", f"{full / ours:.2f}", paper
