"""Let the models of the quality table take the exam, with everything shared that cells have in common.

    exam            scenes, and full precision's logits per (model, variant)
    calibration     encoded samples per draw; gradients per (model, variant, draw)

Searches are not shared: each looks at the weights that its own number format would round to.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from docs.benchmarks.quality_cells import (
    DATA,
    FORMATS,
    FULL,
    HELD_OUT,
    Cell,
    Setting,
    Trained,
)
from mbq_export.backends.torch import fake_quant_model
from mbq_export.calibrate import Recipe, calibrate
from mbq_export.calibrate.data import encode, read_manifest
from mbq_export.calibrate.methods import METHODS
from mbq_export.calibrate.shapes import evaluation_scenes
from mbq_export.channel_scales import ChannelScales, Switches
from mbq_export.evaluate.packed import encoder
from mbq_export.evaluate.quality import Exam, Paper
from mbq_export.families import FAMILIES
from mbq_export.families.base import LoadedModel
from mbq_export.quantize import quantize
from mbq_export.quantize.feedback import Samples
from mbq_export.schemes import SCHEMES
from mbq_export.state import revision_of
from mbq_export.writing import json_bytes, write_file
from samples.tiny_vlm.stress import stressed_folder

MODELS_KEPT: Final = 2
"""Models with their exams in memory, about 100 MB each at 900 pictures."""


class Bench:
    """Makes the paper of any cell."""

    def __init__(
        self, models: Mapping[str, Trained], setting: Setting, *, work: Path, scratch: Path
    ) -> None:
        """Draw the exam.

        Args:
            models: By name.
            setting: What all cells share.
            work: Where gradients are kept; several runs may share it.
            scratch: For stressed weights and checkpoints, of this run alone.
        """
        self._models, self._setting = models, setting
        self._work, self._scratch = work, scratch
        self._scenes = list(evaluation_scenes(setting.images, seed=setting.seed))
        self._open: dict[tuple[str, str], tuple[LoadedModel, Exam]] = {}
        self._samples: dict[int, Samples] = {}

    def paper(self, cell: Cell) -> Paper:
        """Let a cell's model take the exam."""
        model, exam = self._opened(cell)
        return exam.take((model if cell.method == FULL else self.quantized(cell)).module)

    def quantized(self, cell: Cell) -> LoadedModel:
        """Calibrate, quantize and load the checkpoint as the torch model it stands for."""
        model, _ = self._opened(cell)
        form = FORMATS[cell.format]
        scheme = SCHEMES[form.scheme]
        samples = self._drawn(cell.draw, model)
        scales = self._calibrated(cell, model, samples)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            out = Path(folder) / "checkpoint"
            return fake_quant_model(
                quantize(
                    model, scales, scheme=scheme, group_size=form.group, out=out, samples=samples
                )
            )

    def _calibrated(self, cell: Cell, model: LoadedModel, samples: Samples) -> ChannelScales:
        method = METHODS[cell.method]
        switches = method.switches
        kept = self._ratios_file(cell, switches)
        needed = method.needs_ratios(switches)
        # A measurement that is handed in is used like one's own.
        report = json.loads(kept.read_bytes()) if needed and kept.exists() else None
        recipe = Recipe(
            scheme=SCHEMES[FORMATS[cell.format].scheme],
            group_size=FORMATS[cell.format].group,
            switches=switches,
            seed=cell.draw,
            sensitivity=report,
        )
        scales = calibrate(model, samples.inputs, recipe)
        if needed and report is None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, json_bytes(dict(scales.sensitivity)))
        return scales

    def _ratios_file(self, cell: Cell, switches: Switches) -> Path:
        """Where the gradients of a model and draw are kept: full precision's, alike for every format and method."""
        facts: dict[str, Any] = {
            "model": self._models[cell.model].sha256,
            "variant": cell.variant,
            "draw": cell.draw,
            "samples": self._setting.samples,
            "floor": switches.r_floor,
            "code": revision_of("families", "blocks", "calibrate"),
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        return self._work / "ratios" / f"{cell.model}_{cell.variant}_draw{cell.draw}-{key}.json"

    def _drawn(self, draw: int, model: LoadedModel) -> Samples:
        """Encode a calibration draw; every model has the same processor."""
        if draw not in self._samples:
            data = read_manifest(DATA, samples=self._setting.samples, held_out=HELD_OUT, seed=draw)
            self._samples[draw] = Samples(
                inputs=encode(data.samples, model.processor),
                held_out=encode(data.held_out, model.processor),
            )
        return self._samples[draw]

    def _opened(self, cell: Cell) -> tuple[LoadedModel, Exam]:
        place = (cell.model, cell.variant)
        if place not in self._open:
            while len(self._open) >= MODELS_KEPT:
                self._open.pop(next(iter(self._open)))
            model = FAMILIES["llava_onevision"].load(self._folder(cell))
            words = encoder(model.processor.tokenizer)
            self._open[place] = (model, Exam(model.module, self._scenes, words))
        return self._open[place]

    def _folder(self, cell: Cell) -> Path:
        trained = self._models[cell.model]
        if cell.variant != "stress":
            return trained.folder
        folder = self._scratch / f"{cell.model}-stressed"
        stressed_folder(trained.folder, folder)
        return folder
