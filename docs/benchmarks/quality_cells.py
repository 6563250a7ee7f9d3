"""The cells of the quality table: which there are, what decides each, and the files of finished ones.

    model (training seed) x variant x format x method x draw (calibration seed) ──► one .npz in the work folder

A file is named by a hash of everything that decides it, sources included, so a run can stop and go on at any cell.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

import mbq_export
from mbq_export.calibrate.methods import METHODS
from mbq_export.evaluate.quality import MODALITIES, Distances, Paper
from mbq_export.schemes import SCHEMES

SHIPPED: Final = "seed0"
"""Name of the model whose weights are in this repository."""
VARIANTS: Final = ("plain", "stress")
FULL: Final = "fp"
"""Method and format of the model as it is."""
ROUNDED: Final = "rtn"
SEARCHED: Final = ("smoothquant", "awq", "gptq", "mbq", "mbq+", "qvlm")
DATA: Final = "builtin:shapes"
HELD_OUT: Final = 32

_LOOKED_AT: Final = (
    "quantize/block_search.py",
    "quantize/clip.py",
    "quantize/clip_pass.py",
    "quantize/dependency.py",
    "quantize/feedback.py",
    "quantize/gptq.py",
    "quantize/held_out.py",
    "quantize/joint.py",
    "quantize/streams.py",
)
"""Sources that decide nothing unless rounding looks at data."""
_SOURCES: Final = (
    "schemes",
    "families",
    "blocks",
    "calibrate",
    "quantize",
    "backends/torch.py",
    "backends/_torch_int8.py",
    "evaluate/packed.py",
    "evaluate/quality.py",
)
_OTHERS: Final = ("quantize/formats",)
"""Of `_SOURCES`, what no cell passes through."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A column block of the table.

    Attributes:
        title: As people read it.
        scheme: Name of the number format.
        group: Columns per scale, 0 per channel.
    """

    title: str
    scheme: str
    group: int

    @property
    def registered(self) -> bool:
        """Whether this release has the number format."""
        return self.scheme in SCHEMES.names()


FORMATS: Final = {
    "w3-g128": Format(title="W3 g128", scheme="w3a16", group=128),
    "w3-g64": Format(title="W3 g64", scheme="w3a16", group=64),
    "w2-g64": Format(title="W2 g64", scheme="w2a16", group=64),
    "w4-g128": Format(title="W4A16 g128", scheme="w4a16", group=128),
    "w4a8": Format(title="W4A8 channel", scheme="w4a8", group=0),
    "w4a8-g128": Format(title="W4A8 g128", scheme="w4a8", group=128),
    "w8a8": Format(title="W8A8 channel", scheme="w8a8", group=0),
}
FIRST: Final = ("w3-g128", "w3-g64")
"""Formats that are measured before the others."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model that takes the exam.

    Attributes:
        model: Training seed, by its name.
        variant: ``plain`` or ``stress``.
        format: Key of `FORMATS`, or `FULL`.
        method: Name of the method, or `FULL`.
        draw: Draw of the calibration data; 0 where there is none.
    """

    model: str
    variant: str
    format: str
    method: str
    draw: int = 0

    @property
    def name(self) -> str:
        """For file names and people."""
        return f"{self.model}_{self.variant}_{self.format}_{self.method}_draw{self.draw}"

    @property
    def title(self) -> str:
        """Its number format as people read it; nothing for full precision."""
        return "" if self.format == FULL else FORMATS[self.format].title

    @property
    def full(self) -> "Cell":
        """The same model in full precision."""
        return Cell(model=self.model, variant=self.variant, format=FULL, method=FULL)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cells share.

    Attributes:
        images: Pictures of the exam.
        seed: Draw of the exam.
        samples: Calibration samples.
    """

    images: int
    seed: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One training seed.

    Attributes:
        folder: Of the Hugging Face model.
        sha256: Of its weights.
        training: What its training.json says of it.
    """

    folder: Path
    sha256: str
    training: Mapping[str, Any]


def methods_of(name: str, asked: Sequence[str]) -> Iterator[str]:
    """Yield the registered methods that make sense for a format, plain rounding first."""
    yield ROUNDED
    for method in asked:
        # A baseline for schemes that round activations: it balances their outliers with weights.
        idle = method == "smoothquant" and not SCHEMES[FORMATS[name].scheme].rounds_activations
        if method in METHODS.names() and not idle:
            yield method


def all_cells(
    models: Sequence[str], *, draws: int, methods: Sequence[str] = SEARCHED
) -> list[Cell]:
    """List every cell, the most telling first.

    Args:
        models: Names, `SHIPPED` first.
        draws: Calibration draws of the shipped model; the others have one.
        methods: Those wanted.
    """
    formats = [name for name, found in FORMATS.items() if found.registered]
    found = []
    for model in models:
        for variant in VARIANTS:
            found.append(Cell(model=model, variant=variant, format=FULL, method=FULL))
            for name in formats:
                for method in methods_of(name, methods):
                    count = draws if model == SHIPPED and method != ROUNDED else 1
                    found += [
                        Cell(model=model, variant=variant, format=name, method=method, draw=draw)
                        for draw in range(count)
                    ]
    # Sorting is stable: inside a stage, models, variants, formats and methods keep their order.
    return sorted(found, key=_stage)


def _stage(cell: Cell) -> int:
    """Shipped W3, shipped others, other models' W3, further draws of W3, the rest."""
    three = cell.format in {FULL, *FIRST}
    if cell.draw:
        return 3 if three else 5
    if cell.model == SHIPPED:
        return 0 if three else 1
    return 2 if three else 4


def facts_of(cell: Cell, trained: Trained, setting: Setting) -> dict[str, Any]:
    """Everything that decides a cell."""
    decided: dict[str, Any] = {}
    if cell.method != FULL:
        decided = {
            "scheme": FORMATS[cell.format].scheme,
            "group": FORMATS[cell.format].group,
            "switches": METHODS[cell.method].switches.resolved(),
            "data": {"name": DATA, "samples": setting.samples, "held_out": HELD_OUT},
        }
    return {
        **asdict(cell),
        **decided,
        "model_sha256": trained.sha256,
        "exam": {"images": setting.images, "seed": setting.seed},
        "code": code_of(cell.format, cell.method),
    }


@cache
def code_of(name: str, method: str) -> str:
    """Hash of the sources that decide a cell: other methods' and other number formats' files are not among them."""
    root = Path(mbq_export.__file__).parent
    skipped = {
        f"calibrate/methods/{path.name}" for path in root.glob("calibrate/methods/[a-z]*.py")
    }
    skipped -= {"calibrate/methods/base.py"}
    skipped |= {f"schemes/{path.name}" for path in root.glob("schemes/w*.py")}
    if method != FULL:
        skipped -= {f"calibrate/methods/{method.replace('+', '_plus')}.py"}
        skipped -= {f"schemes/{FORMATS[name].scheme}.py"}
    if method == FULL or not METHODS[method].switches.looks_at_data:
        skipped |= set(_LOOKED_AT)
    digest = hashlib.sha256()
    for source in _files(root):
        place = source.relative_to(root).as_posix()
        if place not in skipped and not place.startswith(_OTHERS):
            digest.update(place.encode() + hashlib.sha256(source.read_bytes()).digest())
    for module in ("stress.py", "inputs.py"):
        digest.update((root.parent / "samples" / "tiny_vlm" / module).read_bytes())
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    for part in _SOURCES:
        place = root / part
        yield from sorted(place.rglob("*.py")) if place.is_dir() else [place]


class Store:
    """Finished cells in a folder."""

    def __init__(self, folder: Path, *, any_code: bool = False) -> None:
        """Use a folder.

        Args:
            folder: Made if missing.
            any_code: Take a cell that other sources computed where the present ones have not.
        """
        self._folder, self._any_code = folder, any_code
        folder.mkdir(parents=True, exist_ok=True)

    def find(self, facts: Mapping[str, Any]) -> Path | None:
        """Return the file of a finished cell, None for a missing one."""
        path = self._path(facts)
        if path.exists() or not self._any_code:
            return path if path.exists() else None
        others = self._folder.glob(f"{Cell(**_cell(facts)).name}-*.npz")
        kept = [other for other in others if _alike(facts, self.facts(other))]
        return max(kept, key=lambda other: other.stat().st_mtime, default=None)

    def write(self, facts: Mapping[str, Any], paper: Paper) -> None:
        """Keep a finished cell; it appears whole or not at all."""
        path = self._path(facts)
        staged = path.with_suffix(".partial.npz")
        arrays = {
            f"{modality}.{name}": getattr(found, name)
            for modality, found in paper.distances.items()
            for name in ("nats", "same", "scenes")
        }
        np.savez_compressed(
            staged,
            facts=np.array(json.dumps(facts, sort_keys=True)),
            correct=paper.correct,
            nll=paper.nll,
            scenes=paper.scenes,
            kinds=paper.kinds,
            **arrays,
        )
        staged.rename(path)

    @staticmethod
    def facts(path: Path) -> dict[str, Any]:
        """What decided a finished cell."""
        with np.load(path, allow_pickle=False) as kept:
            found: dict[str, Any] = json.loads(str(kept["facts"]))
        return found

    @staticmethod
    def read(path: Path) -> Paper:
        """Read a finished cell."""
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

    def _path(self, facts: Mapping[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return self._folder / f"{Cell(**_cell(facts)).name}-{key}.npz"


def _cell(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: facts[name] for name in ("model", "variant", "format", "method", "draw")}


def _alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two cells differ in their sources at most."""
    return {**first, "code": None} == {**second, "code": None}


def chosen(cells: Iterable[Cell], filters: Sequence[str]) -> list[Cell]:
    """Keep the cells that pass every filter.

    Args:
        cells: Some.
        filters: ``field=value,value``.

    Raises:
        ValueError: For a field that a cell has not.
    """
    kept = list(cells)
    for one in filters:
        field, _, values = one.partition("=")
        if field not in Cell.__dataclass_fields__:
            raise ValueError(
                f"{field!r} is no field of a cell: {', '.join(Cell.__dataclass_fields__)}"
            )
        kept = [cell for cell in kept if str(getattr(cell, field)) in values.split(",")]
    return kept
