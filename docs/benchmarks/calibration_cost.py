"""Make calibration_cost.json and calibration_cost.md beside this file: run ``python -m docs.benchmarks.calibration_cost``.

The scale search of `mbq`, by the package and by tests/reference/naive.py: layer by layer in one process on one thread,
the two after each other on the same rows. Both start from what full precision feeds a block and what gradients weigh
image tokens by; measuring those gradients costs both the same and is not part of either time.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from docs.benchmarks.calibration_cost_page import page
from mbq_export import __version__
from mbq_export.blocks.stream import BATCH_TOKENS, Batch, BlockStream
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.shapes import calibration_samples
from mbq_export.calibrate.smooth import Job, smooth_block
from mbq_export.families.base import ANSWER, PROMPT, VISION, LoadedModel
from mbq_export.families.llava_onevision import load
from mbq_export.schemes import SCHEMES
from mbq_export.state import revision_of
from mbq_export.writing import json_bytes, write_file
from tests.reference import naive
from tests.tiny import Tiny, write_tiny

HERE: Final = Path(__file__).parent
WEIGHTS: Final = HERE.parents[1] / "samples" / "tiny_vlm" / "weights"
SCHEMA: Final = "mbq-export/calibration-cost@1"
SCHEME: Final = SCHEMES["w3a16"]
GROUP: Final = 128
RATIOS: Final = {"attn": 0.3, "mlp": 0.3}
"""What image tokens weigh; given, because gradients are not part of the comparison."""
SHAPE: Final = Tiny(layers=24, hidden=896, intermediate=4864, heads=14, kv_heads=2, dtype="float16")
"""Sizes of Qwen2-0.5B, heads of 64 columns, and the small vocabulary of the sample model."""
SHAPED_SAMPLES: Final = 32
SHAPED_TOKENS: Final = ((PROMPT, 20), (VISION, 729), (PROMPT, 15), (ANSWER, 36))
"""One picture at the resolution of the published model, a question and an answer."""
PREDICTED: Final = {"sample": 8.0, "shaped": 13.5}
"""Counted in multiplications and passes over weights before anything was timed."""


def sample_batches(stream: BlockStream, model: LoadedModel, count: int) -> Sequence[Batch]:
    """Questions about pictures, as a calibration reads them."""
    return stream.begin(
        [
            model.processor.inputs(each.prompt, [Image.fromarray(each.image)], each.answer)
            for each in calibration_samples(count)
        ]
    )


def shaped_batches(stream: BlockStream, hidden: int) -> Iterator[Batch]:
    """Random rows whose channels differ in size, as those of a trained model do; no vision tower has made them."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.cat([torch.full((n,), kind, dtype=torch.int8) for kind, n in SHAPED_TOKENS])
    widths = torch.exp(torch.randn(hidden, generator=generator))
    at_once = max(1, BATCH_TOKENS // len(classes))
    for start in range(0, SHAPED_SAMPLES, at_once):
        samples = tuple(range(start, min(start + at_once, SHAPED_SAMPLES)))
        rows = torch.randn(len(samples), len(classes), hidden, generator=generator) * widths
        yield Batch(
            samples=samples,
            ids=torch.zeros(len(samples), len(classes), dtype=torch.int64),
            classes=classes.expand(len(samples), -1).contiguous(),
            hidden=rows,
            arguments=stream._arguments(rows),  # noqa: SLF001 - a batch that no picture has made
        )


def job_of(model: LoadedModel, stream: BlockStream) -> Job:
    """The search as `calibrate --method mbq` runs it."""
    linears = {name: {"clipped": {"prompt": 1.0}} for name in model.family.linears}
    layers = [{"r": RATIOS, "linears": linears} for _ in range(len(stream))]
    return Job(
        stream=stream,
        places=model.family.smooth,
        text=model.text,
        scheme=SCHEME,
        group_size=GROUP,
        method=METHODS["mbq"],
        switches=METHODS["mbq"].switches,
        sensitivity={"layers": layers},
        seed=0,
    )


def timed(act: Any) -> tuple[Any, dict[str, float]]:
    """Result of a call, and its times; those of the process do not count what other processes take."""
    wall, own = time.perf_counter(), time.process_time()
    found = act()
    return found, {
        "wall_s": round(time.perf_counter() - wall, 3),
        "cpu_s": round(time.process_time() - own, 3),
    }


def layer_row(
    job: Job, index: int, batches: Sequence[Batch], rows: list[Tensor], *, with_naive: bool
) -> tuple[dict[str, Any], list[Tensor]]:
    """Search one layer by the package, and naively if asked to; return what it feeds the next layer."""
    with job.stream.block(index) as block:
        pairs = list(zip(batches, rows, strict=True))
        found, times = timed(lambda: smooth_block(job, block, index, pairs))
        alphas = {unit["unit"]: unit["alpha"] for unit in found.units if unit["alpha"] is not None}
        row: dict[str, Any] = {"layer": index, "package": times, "alphas": alphas}
        if with_naive:
            feed = [
                naive.Batch(rows=x, arguments=batch.arguments[index], classes=batch.classes)
                for batch, x in pairs
            ]
            (wanted, _), row["naive"] = timed(
                lambda: naive.search_block(block, feed, RATIOS, bits=3, group_size=GROUP)
            )
            row["ratio"] = round(row["naive"]["cpu_s"] / times["cpu_s"], 3)
            row["wall_ratio"] = round(row["naive"]["wall_s"] / times["wall_s"], 3)
            row["wanted"] = {unit: choice.alpha for unit, choice in wanted.items()}
            row["excess"] = {
                unit: choice.curve[naive.GRID.index(alphas[unit])] / min(choice.curve) - 1
                for unit, choice in wanted.items()
            }
    return row, found.outputs


def case(
    model: LoadedModel,
    stream: BlockStream,
    batches: Sequence[Batch],
    *,
    naive_layers: Sequence[int],
    repetitions: int,
    stop: float = float("inf"),
) -> dict[str, Any]:
    """All layers by the package, until the clock says `stop`; some of them naively, as often as asked."""
    job = job_of(model, stream)
    found, peaks = [], {}
    for repetition in range(repetitions):
        rows = [batch.hidden for batch in batches]
        for index in range(len(stream)):
            if time.monotonic() > stop:
                break
            row, rows = layer_row(job, index, batches, rows, with_naive=index in naive_layers)
            found.append({"repetition": repetition, **row})
            peaks[f"after layer {index}"] = peak_mib()
            print({k: row.get(k) for k in ("layer", "package", "naive", "ratio")}, flush=True)
    ratios = [row["ratio"] for row in found if "ratio" in row]
    kinds = torch.cat([batch.classes.flatten() for batch in batches])
    return {
        "samples": sum(len(batch.samples) for batch in batches),
        "tokens": {
            name: int((kinds == kind).sum())
            for name, kind in (("vision", VISION), ("answer", ANSWER), ("prompt", PROMPT))
        },
        "layers": len(stream),
        "hidden": model.text.hidden,
        "intermediate": model.text.intermediate,
        "heads": [model.text.heads, model.text.kv_heads],
        "repetitions": repetitions,
        "ratio": {"median": median(ratios), "least": min(ratios), "largest": max(ratios)},
        "peak_rss_mib": peaks,
        "rows": found,
    }


def peak_mib() -> float:
    """Largest memory of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case; the shaped model is written to a folder and streamed from it block by block."""
    if name == "sample":
        model = load(WEIGHTS)
        stream = BlockStream(model)
        batches = sample_batches(stream, model, options.samples)
        every = range(len(stream))
        return case(model, stream, batches, naive_layers=every, repetitions=options.repetitions)
    with TemporaryDirectory(prefix="shaped-") as folder:
        model = load(write_tiny(Path(folder), SHAPE), meta_blocks=True)
        stream = BlockStream(model)
        batches = list(shaped_batches(stream, model.text.hidden))
        return case(
            model,
            stream,
            batches,
            naive_layers=options.naive_layers,
            repetitions=1,
            stop=time.monotonic() + 60 * options.minutes,
        )


def setup() -> dict[str, Any]:
    """Where and with what."""
    return {
        "mbq-export": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "scheme": SCHEME.name,
        "group_size": GROUP,
        "switches": METHODS["mbq"].switches.resolved(),
        "code": revision_of("schemes", "families", "blocks", "calibrate"),
    }


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure the cases that were asked for, keep the others, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=PREDICTED, default=[*PREDICTED])
    parser.add_argument("--samples", type=int, default=128, help="samples of the sample model")
    parser.add_argument("--repetitions", type=int, default=3, help="of the sample model")
    parser.add_argument(
        "--naive-layers", type=int, nargs="+", default=[0, 12], help="of the shaped model"
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no layer after so long")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = options.out / "calibration_cost.json"
    cases = json.loads(kept.read_text())["cases"] if kept.exists() else {}
    for name in options.cases:
        about = setup()
        cases[name] = {
            "predicted": PREDICTED[name],
            "setup": about,
            **measured(name, options),
            "load_at_end": round(os.getloadavg()[0], 1),
        }
        document = {"schema": SCHEMA, "target": 10.0, "cases": cases}
        write_file(kept, json_bytes(document))
        write_file(options.out / "calibration_cost.md", page(document).encode())


if __name__ == "__main__":
    main()
