"""A tiny random model in memory and encoded picture questions for it."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from mbq_export.calibrate.shapes import calibration_samples
from mbq_export.families.base import LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.llava_onevision import load
from tests.tiny import SAMPLE_WEIGHTS, Tiny, write_tiny


@cache
def tiny_model(tiny: Tiny | None = None, *, meta_blocks: bool = False) -> LoadedModel:
    """Load a tiny model in float32. Shared: tests must not change it."""
    folder = TemporaryDirectory(prefix="tiny-")
    _KEPT.append(folder)
    return load(write_tiny(Path(folder.name), tiny), meta_blocks=meta_blocks)


@cache
def sample_model() -> LoadedModel:
    """Load the trained sample model in float32. Shared: tests must not change it."""
    return load(SAMPLE_WEIGHTS)


def questions(model: LoadedModel, count: int) -> list[ModelInputs]:
    """Encode calibration samples with answers: captions and questions in turn."""
    return [
        model.processor.inputs(e.prompt, [Image.fromarray(e.image)], e.answer)
        for e in calibration_samples(count)
    ]


_KEPT: list[TemporaryDirectory[str]] = []  # blocks on the meta device are read from the files later
