"""Make quality.json and quality.md beside this file: run ``python -m docs.benchmarks.quality``.

Full precision and every method in every number format, on the sample model and on its stress variant, for every
training seed that --model names, by the package's own calibrate and quantize. Each finished cell is kept in --work, so
a run can be interrupted and goes on; --page-only writes both files from what is finished.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from docs.benchmarks.quality_cells import (
    DATA,
    FORMATS,
    HELD_OUT,
    ROUNDED,
    SEARCHED,
    SHIPPED,
    Cell,
    Setting,
    Store,
    Trained,
    all_cells,
    chosen,
    facts_of,
)
from docs.benchmarks.quality_page import page
from docs.benchmarks.quality_result import against, pair_of, row_of, seeds_of, targets
from docs.benchmarks.quality_run import Bench
from mbq_export import __version__
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.shapes import (
    TRAINING_SCENES,
    UNTOUCHED_SEED,
    blind_majority,
    evaluation_questions,
    make_scenes,
)
from mbq_export.errors import FormatError, GateError, UsageError
from mbq_export.reading import sha256_of
from mbq_export.writing import json_bytes, write_file
from samples.tiny_vlm.stress import WEIGHTS

HERE: Final = Path(__file__).parent
SCHEMA: Final = "mbq-export/quality@2"
BLIND_SCENES: Final = 20_000


def trained(folder: Path) -> Trained:
    """Read what a model of the table is.

    Args:
        folder: A model folder; training.json lies beside or above it.
    """
    places = (folder.parent / "training.json", folder / "training.json")
    record: dict[str, Any] = next((json.loads(p.read_bytes()) for p in places if p.is_file()), {})
    return Trained(
        folder=folder,
        sha256=sha256_of(folder / "model.safetensors"),
        training={
            "seed": record.get("seed"),
            "parameters": record.get("parameters"),
            "steps": {one["name"]: one["log"][-1]["step"] for one in record.get("stages", ())},
            "exact_match": record.get("evaluation", {}).get("exact_match"),
            "shipped": folder == WEIGHTS,
        },
    )


def run(cells: Sequence[Cell], bench: Bench, store: Store, options: argparse.Namespace) -> None:
    """Measure the cells that are missing, until the time is over."""
    started = time.monotonic()
    # All at once: what is hashed are the sources as they are now, when they have just been imported.
    decided = facts_by_cell(cells, options)
    for number, (cell, facts) in enumerate(decided.items()):
        if store.find(facts) is not None:
            continue
        if time.monotonic() - started > 60 * options.limit_minutes:
            print(f"time is over: {len(cells) - number} cells of this run were not looked at")
            return
        begun, used = time.monotonic(), time.process_time()
        try:
            paper = bench.paper(cell)
        except (UsageError, FormatError, GateError) as error:
            print(f"{cell.name:44} {error.code} {error.message}", flush=True)
            continue
        store.write(facts, paper)
        print(
            f"{cell.name:44} accuracy {paper.correct.mean():.4f} "
            f"KL {paper.distances['answer'].nats.mean():.3g} "
            f"{time.monotonic() - begun:.0f} s, {time.process_time() - used:.0f} s of the processor",
            flush=True,
        )


def result(cells: Sequence[Cell], store: Store, options: argparse.Namespace) -> dict[str, Any]:
    """Reduce all finished cells to the JSON document."""
    facts = facts_by_cell(cells, options)
    files = {cell: path for cell in cells if (path := store.find(facts[cell]))}
    read = lru_cache(maxsize=8)(store.read)
    rows, pairs = [], []
    for cell, path in files.items():
        paper = read(path)
        rows.append(row_of(cell, paper, store.facts(path)["code"]))
        pairs += [
            pair_of(cell, first, read(files[other]), paper)
            for first, other in against(cell)
            if other in files
        ]
    seeds = seeds_of(rows)
    return {
        "schema": SCHEMA,
        "setup": {
            **setup(options),
            "current_code": all(_current(facts[c], files[c], store) for c in files),
        },
        "rows": rows,
        "pairs": pairs,
        "seeds": seeds,
        "targets": targets(seeds),
        "not_measured": [asdict(cell) for cell in cells if cell not in files],
    }


def _current(facts: dict[str, Any], path: Path, store: Store) -> bool:
    return bool(store.facts(path)["code"] == facts["code"])


def facts_by_cell(cells: Sequence[Cell], options: argparse.Namespace) -> dict[Cell, dict[str, Any]]:
    """Everything that decides each cell."""
    setting = setting_of(options)
    return {cell: facts_of(cell, options.models[cell.model], setting) for cell in cells}


def setting_of(options: argparse.Namespace) -> Setting:
    """What all cells share."""
    return Setting(images=options.images, seed=options.seed, samples=options.samples)


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """Everything a reader needs to make the table again."""
    training = make_scenes(BLIND_SCENES, seed=3 * TRAINING_SCENES)
    asked = evaluation_questions(options.images, seed=options.seed)
    methods = [m for m in (ROUNDED, *options.methods) if m in METHODS.names()]
    return {
        "model": "tiny-llava-ov",
        "models": {
            name: {"sha256": one.sha256, **one.training} for name, one in options.models.items()
        },
        "formats": {
            name: {"title": f.title, "scheme": f.scheme, "group": f.group, "measured": f.registered}
            for name, f in FORMATS.items()
        },
        "head_bits": 16,
        "vision_bits": 16,
        "calibration": {
            "data": DATA,
            "samples": options.samples,
            "held_out": HELD_OUT,
            "draws": options.draws,
        },
        "evaluation": {"images": options.images, "seed": options.seed},
        "switches": {name: METHODS[name].switches.resolved() for name in methods},
        "blind_accuracy": blind_majority(asked, training=training),
        "device": "cpu, float32",
        "versions": {
            "mbq-export": __version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        },
        "remark": options.remark,
    }


def write(cells: Sequence[Cell], store: Store, options: argparse.Namespace) -> None:
    """Write both files."""
    options.out.mkdir(parents=True, exist_ok=True)
    document = json_bytes(result(cells, store, options))
    write_file(options.out / "quality.json", document)
    write_file(options.out / "quality.md", page(json.loads(document)).encode())


def named_folder(text: str) -> tuple[str, Path]:
    """Split NAME=FOLDER."""
    name, equals, folder = text.partition("=")
    if not (name.isalnum() and equals and name != SHIPPED):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a new name")
    return name, Path(folder)


def share(text: str) -> tuple[int, int]:
    """Split I/N."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, I from 1 to N")
    return int(first), int(count)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; ``models`` becomes a mapping."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        type=named_folder,
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another training seed",
    )
    parser.add_argument("--images", type=int, default=900, help="evaluation pictures")
    parser.add_argument("--seed", type=int, default=UNTOUCHED_SEED, help="evaluation draw")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--draws", type=int, default=3, help="calibration draws of shipped weights")
    parser.add_argument("--methods", nargs="+", choices=SEARCHED, default=SEARCHED)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="FIELD=VALUE,...", help="measure these cells only"
    )
    parser.add_argument(
        "--share", type=share, default=(1, 1), metavar="I/N", help="every N-th cell"
    )
    parser.add_argument("--limit-minutes", type=float, default=float("inf"))
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--any-code", action="store_true", help="take finished cells of other sources too"
    )
    parser.add_argument("--list", action="store_true", help="print the cells and what is finished")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--remark", default="", help="what a reader must know about this run")
    options = parser.parse_args(arguments)
    folders = {SHIPPED: WEIGHTS, **dict(options.model)}
    options.models = {name: trained(folder) for name, folder in folders.items()}
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, then write both files."""
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    store = Store(options.work / "cells", any_code=options.any_code)
    cells = all_cells([*options.models], draws=options.draws, methods=options.methods)
    wanted = chosen(cells, options.only)
    if options.list:
        for cell, facts in facts_by_cell(wanted, options).items():
            print(f"{cell.name:44} {'finished' if store.find(facts) else '-'}")
        return
    first, count = options.share
    if not options.page_only:
        with TemporaryDirectory(prefix="quality-") as scratch:
            bench = Bench(
                options.models, setting_of(options), work=options.work, scratch=Path(scratch)
            )
            run(wanted[first - 1 :: count], bench, store, options)
    write(cells, store, options)


if __name__ == "__main__":
    main()
