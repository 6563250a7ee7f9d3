"""Make quality.json and quality.md beside this file: run ``python -m docs.benchmarks.quality``.

Full precision and every method at W3, groups of 128 and 64, on the sample model and on its stress variant, by the
package's own calibrate and quantize. Finished rows are kept in --work, so an interrupted run goes on.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from docs.benchmarks.quality_page import page
from mbq_export import __version__
from mbq_export.backends.torch import fake_quant_model
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.data import encode, read_manifest
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.shapes import (
    TRAINING_SCENES,
    UNTOUCHED_SEED,
    blind_majority,
    evaluation_questions,
    evaluation_scenes,
    make_scenes,
)
from mbq_export.evaluate.packed import encoder
from mbq_export.evaluate.quality import (
    MODALITIES,
    Distances,
    Exam,
    Paper,
    comparison,
    summary,
)
from mbq_export.families import FAMILIES
from mbq_export.families.base import LoadedModel
from mbq_export.quantize import quantize
from mbq_export.quantize.feedback import Samples
from mbq_export.reading import sha256_of
from mbq_export.schemes import SCHEMES
from mbq_export.state import revision_of
from mbq_export.writing import json_bytes, write_file
from samples.tiny_vlm.stress import WEIGHTS, stressed_folder

HERE: Final = Path(__file__).parent
SCHEMA: Final = "mbq-export/quality@1"
SCHEME: Final = SCHEMES["w3a16"]
DATA: Final = "builtin:shapes"
VARIANTS: Final = ("plain", "stress")
GROUPS: Final = (128, 64)
SEARCHED: Final = ("awq", "mbq", "gptq", "mbq+")
HELD_OUT: Final = 32
FULL: Final = "fp"
ROUNDED: Final = "rtn"
PAIRS: Final = (
    ("rtn", "awq"),
    ("rtn", "mbq"),
    ("awq", "mbq"),
    ("rtn", "gptq"),
    ("mbq", "gptq"),
    ("mbq", "mbq+"),
    ("gptq", "mbq+"),
)
BLIND_SCENES: Final = 20_000


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        variant: ``plain`` or ``stress``.
        group: Columns per scale; 0 for full precision.
        method: Name of the method, or ``fp``.
        seed: Draw of the calibration data; 0 where there is none.
    """

    variant: str
    group: int
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        """File name of the row."""
        return f"{self.variant}-g{self.group}-{self.method}-seed{self.seed}"


def rows_of(variant: str, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of a variant, full precision first."""
    yield Row(variant, 0, FULL)
    for group in GROUPS:
        yield Row(variant, group, ROUNDED)
        for method in options.methods:
            for seed in range(options.seeds):
                yield Row(variant, group, method, seed)


def quantized(model: LoadedModel, row: Row, options: argparse.Namespace) -> LoadedModel:
    """Calibrate, quantize and load the checkpoint as the torch model it stands for."""
    switches = METHODS[row.method].switches
    # The first samples are the same however many more are held out.
    held_out = HELD_OUT if switches.rounding == "gptq" else 0
    data = read_manifest(DATA, samples=options.samples, held_out=held_out, seed=row.seed)
    inputs = encode(data.samples, model.processor)
    samples = Samples(inputs=inputs, held_out=encode(data.held_out, model.processor))
    recipe = Recipe(scheme=SCHEME, group_size=row.group, switches=switches, seed=row.seed)
    scales = calibrate(model, inputs, recipe)
    out = options.work / f"{row.name}.checkpoint"
    shutil.rmtree(out, ignore_errors=True)
    checkpoint = quantize(
        model, scales, scheme=SCHEME, group_size=row.group, out=out, samples=samples
    )
    loaded = fake_quant_model(checkpoint)
    shutil.rmtree(out)
    return loaded


def variant_model(variant: str, work: Path) -> LoadedModel:
    """Load the sample model, or write and load its stress variant."""
    folder = WEIGHTS
    if variant == "stress":
        folder = work / "stressed"
        stressed_folder(WEIGHTS, folder)
    return FAMILIES["llava_onevision"].load(folder)


def papers_of(variant: str, options: argparse.Namespace) -> dict[Row, Paper]:
    """Let every model of a variant take the exam."""
    model = variant_model(variant, options.work)
    scenes = list(evaluation_scenes(options.images, seed=options.seed))
    exam = Exam(model.module, scenes, encoder(model.processor.tokenizer))
    papers = {}
    for row in rows_of(variant, options):
        kept = options.work / f"{row.name}-{options.seed}-{options.images}-{options.samples}.npz"
        if not kept.exists():
            tested = model if row.method == FULL else quantized(model, row, options)
            write_paper(kept, exam.take(tested.module))
        papers[row] = read_paper(kept)
        print(f"{row.name:28} accuracy {papers[row].correct.mean():.4f}", flush=True)
    return papers


def write_paper(path: Path, paper: Paper) -> None:
    """Keep a finished row."""
    staged = path.with_suffix(".partial.npz")
    arrays = {
        f"{modality}.{name}": getattr(found, name)
        for modality, found in paper.distances.items()
        for name in ("nats", "same", "scenes")
    }
    np.savez(
        staged,
        correct=paper.correct,
        nll=paper.nll,
        scenes=paper.scenes,
        kinds=paper.kinds,
        **arrays,
    )
    staged.rename(path)


def read_paper(path: Path) -> Paper:
    """Read a finished row."""
    with np.load(path, allow_pickle=False) as kept:
        distances = {
            modality: Distances(
                **{name: kept[f"{modality}.{name}"] for name in ("nats", "same", "scenes")}
            )
            for modality in MODALITIES
        }
        return Paper(
            correct=kept["correct"],
            nll=kept["nll"],
            scenes=kept["scenes"],
            kinds=kept["kinds"],
            distances=distances,
        )


def result(papers: dict[Row, Paper], options: argparse.Namespace) -> dict[str, Any]:
    """Reduce all papers to the JSON document."""
    rows = [{**vars(row), **summary(paper)} for row, paper in papers.items()]
    pairs = []
    for row, paper in papers.items():
        if row.method == FULL:
            continue
        full = papers[Row(row.variant, 0, FULL)]
        pairs.append({**vars(row), "against": FULL, **comparison(full, paper)})
        for first, second in PAIRS:
            if second == row.method and first in {ROUNDED, *options.methods}:
                other = Row(row.variant, row.group, first, 0 if first == ROUNDED else row.seed)
                pairs.append({**vars(row), "against": first, **comparison(papers[other], paper)})
    return {
        "schema": SCHEMA,
        "setup": setup(options),
        "rows": rows,
        "pairs": pairs,
    }


def setup(options: argparse.Namespace) -> dict[str, Any]:
    """Everything a reader needs to make the table again."""
    training = make_scenes(BLIND_SCENES, seed=3 * TRAINING_SCENES)
    asked = evaluation_questions(options.images, seed=options.seed)
    return {
        "model": "tiny-llava-ov",
        "model_sha256": sha256_of(WEIGHTS / "model.safetensors"),
        "scheme": SCHEME.name,
        "head_bits": 16,
        "vision_bits": 16,
        "calibration": {"data": DATA, "samples": options.samples, "seeds": options.seeds},
        "evaluation": {"images": options.images, "seed": options.seed},
        "switches": {
            method: METHODS[method].switches.resolved() for method in (ROUNDED, *options.methods)
        },
        "blind_accuracy": blind_majority(asked, training=training),
        "device": "cpu, float32",
        "versions": {
            "mbq-export": __version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
        },
        "code": code_revision(),
        "remark": options.remark,
    }


def code_revision() -> str:
    """Hash of the sources that decide a row."""
    return revision_of("schemes", "families", "blocks", "calibrate", "quantize")


def main() -> None:
    """Run, then write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=900, help="evaluation pictures")
    parser.add_argument("--seed", type=int, default=UNTOUCHED_SEED, help="evaluation draw")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--seeds", type=int, default=3, help="calibration draws")
    parser.add_argument("--methods", nargs="+", choices=SEARCHED, default=SEARCHED)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/quality"))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--remark", default="", help="what a reader must know about this run")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Rows of other code are not mixed with new ones.
    options.work /= code_revision()[:16]
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    papers: dict[Row, Paper] = {}
    for variant in VARIANTS:
        papers |= papers_of(variant, options)
    document = result(papers, options)
    write_file(options.out / "quality.json", json_bytes(document))
    write_file(options.out / "quality.md", page(json.loads(json_bytes(document))).encode())


if __name__ == "__main__":
    main()
