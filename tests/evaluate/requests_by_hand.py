"""Requests and runs with round numbers, for tests of figures and reports."""

from collections.abc import Sequence
from pathlib import Path

from mbq_export.bundle import Bundle
from mbq_export.evaluate import telemetry
from mbq_export.evaluate.figures import Load, Run
from mbq_export.evaluate.telemetry import Growth
from mbq_export.runtime.timing import RequestStatistics

QUIET = telemetry.Load(seconds=1.0, own=0.5, others=0.01)


def request(step: float = 2.0, *, visual: int = 20, output: int = 4) -> RequestStatistics:
    """10 ms to the first token, then ``step`` ms for each."""
    return RequestStatistics(
        visual_tokens=visual,
        prompt_tokens=10,
        output_tokens=output,
        preprocess_ms=1.0,
        vision_ms=3.0 if visual else 0.0,
        merge_ms=0.5,
        prefill_ms=5.0,
        decode_ms=(step,) * (output - 1),
        sample_ms=(0.1,) * output,
        ttft_ms=10.0,
        itl_ms=(step,) * (output - 1),
        peak_rss_bytes=1000,
    )


def run(
    name: str = "w3",
    *,
    steps: Sequence[float] = (2.0, 2.0, 2.0),
    visual: int = 20,
    output: int = 4,
    bundle: Bundle | None = None,
) -> Run:
    """One request per step time."""
    requests = tuple(request(step, visual=visual, output=output) for step in steps)
    return Run(
        name=name,
        bundle=bundle or Bundle(root=Path(name), manifest={}, sha256="0"),
        backend="ort",
        lowering="qdq",
        accuracy_level=0,
        threads=1,
        limit=512,
        images=1 if visual else 0,
        load=Load(load_ms=7.0, memory=Growth(kept=100, peak=150), first=requests[0]),
        requests=requests,
    )
