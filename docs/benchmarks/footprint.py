"""Make footprint.json and footprint.md beside this file: memory and speed against full precision, on ONNX Runtime.

    mbq-export build --model tiny-llava-ov --wbits 16 -o full
    mbq-export build --model tiny-llava-ov --wbits 3 --group-size 128 --lowering qdq -o ours
    python -m docs.benchmarks.footprint full ours

Bytes and speed do not depend on the method of rounding. Peak memory is that of a child process that opens one bundle
and answers one question; times are paired, request by request, by the package's own `bench`.
"""

import argparse
import json
import multiprocessing
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from docs.benchmarks.footprint_page import page
from mbq_export.bundle import Bundle
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.evaluate.bench import Contender, Protocol, bench, matrix
from mbq_export.runtime import DECODER, default_lowering, graph_record, open_session
from mbq_export.runtime.timing import peak_rss_bytes, rss_bytes
from mbq_export.state import revision_of
from mbq_export.writing import json_bytes, write_file

HERE: Final = Path(__file__).parent
SCHEMA: Final = "mbq-export/footprint@1"
QUESTION: Final = "how many objects ?"


def stored(bundle: Bundle) -> dict[str, Any]:
    """Bytes on disk: the checkpoint's linears and all of it, and the decoder's graph."""
    checkpoint = QuantCheckpoint.open(bundle.checkpoint_folder, verify=False)
    tensors = {
        name: file.entries[name].end - file.entries[name].start
        for name, file in checkpoint.files.items()
    }
    linears = sum(size for name, size in tensors.items() if ".layers." in name and _is_linear(name))
    record = graph_record(bundle, DECODER, lowering=default_lowering(bundle))
    return {
        "checkpoint_bytes": sum(tensors.values()),
        "linears_bytes": linears,
        "graph_bytes": int(record["weight_bytes"]),
        "graph_dtype": record["dtype"],
    }


def _is_linear(name: str) -> bool:
    """Whether a tensor of the decoder belongs to one of its seven linears, biases left out."""
    return "_proj." in name and "language_model" in name and not name.endswith(".bias")


def resident(folder: Path, threads: int) -> dict[str, int | None]:
    """Memory of a process that opens a bundle and answers once: run it in a process of its own."""
    bundle = Bundle.open(folder)
    before = rss_bytes()
    with open_session(bundle, backend="ort", threads=threads) as session:
        session.generate(QUESTION, [])
        after = rss_bytes()
    return {"before_bytes": before, "after_bytes": after, "peak_bytes": peak_rss_bytes()}


def measured(folders: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Bytes, memory and times of both bundles."""
    found: dict[str, Any] = {}
    spawn = multiprocessing.get_context("spawn")
    for name, folder in folders.items():
        with spawn.Pool(1) as pool:
            memory = pool.apply(resident, (folder, options.threads))
        found[name] = {**stored(Bundle.open(folder)), "memory": memory}
    report = bench(
        [
            Contender(
                bundle=bundle,
                name=name,
                backend="ort",
                lowering=default_lowering(bundle),
                threads=options.threads,
            )
            for name, bundle in ((n, Bundle.open(f)) for n, f in folders.items())
        ],
        matrix(prompt_tokens=(None,), new_tokens=(options.new_tokens,), images=(1,)),
        protocol=Protocol(repetitions=options.repetitions, warmup=options.warmup),
    )
    for one in report.details["runs"]:
        own = found[one["name"]]
        own["step"] = {counting: one["roofline"][counting] for counting in ("packed", "graph")}
        own["times"] = {key: one[key] for key in ("ttft_ms", "tpot_ms", "e2e_ms")}
    return {
        "bundles": found,
        "comparison": report.details["comparison"],
        "noise": report.details["noise"],
        "valid": report.valid,
    }


def main() -> None:
    """Measure, then write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("full", type=Path, help="bundle of --wbits 16")
    parser.add_argument("ours", type=Path, help="bundle of --wbits 3 --lowering qdq")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = measured({"full": options.full, "ours": options.ours}, options)
    document = json_bytes(
        {
            "schema": SCHEMA,
            "setup": {
                "model": "tiny-llava-ov",
                "threads": options.threads,
                "new_tokens": options.new_tokens,
                "repetitions": options.repetitions,
                "versions": {
                    name: metadata.version(name) for name in ("onnxruntime", "torch", "numpy")
                },
                "code": revision_of("export", "runtime", "backends", "evaluate"),
            },
            **found,
        }
    )
    write_file(options.out / "footprint.json", document)
    write_file(options.out / "footprint.md", page(json.loads(document)).encode())


if __name__ == "__main__":
    main()
