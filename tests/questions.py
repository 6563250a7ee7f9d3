"""A tiny random model in memory and encoded picture questions for it."""

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from mbq_export.calibrate.shapes import calibration_samples
from mbq_export.families.base import LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.llava_onevision import load
from tests.tiny import SAMPLE_WEIGHTS, Tiny, write_tiny


@cache
def tiny_model(tiny: Tiny | None = None, *, meta_blocks: bool = False) -> LoadedModel:
    """Load a tiny model in float32. Shared: tests must not change it, and fail if they do."""
    folder = TemporaryDirectory(prefix="tiny-")
    _KEPT.append(folder)
    return _shared(load(write_tiny(Path(folder.name), tiny), meta_blocks=meta_blocks))


@cache
def sample_model() -> LoadedModel:
    """Load the trained sample model in float32. Shared: tests must not change it, and fail if they do."""
    return _shared(load(SAMPLE_WEIGHTS))


def questions(model: LoadedModel, count: int) -> list[ModelInputs]:
    """Encode calibration samples with answers: captions and questions in turn."""
    return [
        model.processor.inputs(e.prompt, [Image.fromarray(e.image)], e.answer)
        for e in calibration_samples(count)
    ]


def touched() -> list[str]:
    """Tensors of shared models that were written to or replaced since they were loaded.

    Models with any are forgotten, so that only one test fails for it. What is written past a tensor, through numpy or
    ``.data``, only `rewritten` finds.
    """
    return _changed(_marks, 1)


def rewritten() -> list[str]:
    """Tensors of shared models whose bytes are others than when they were loaded. Reads all of them."""
    return _changed(_sums, 2)


Marks = dict[str, object]
_KEPT: list[TemporaryDirectory[str]] = []  # blocks on the meta device are read from the files later
_SHARED: list[tuple[LoadedModel, Marks, Marks]] = []


def _shared(model: LoadedModel) -> LoadedModel:
    _SHARED.append((model, _marks(model), _sums(model)))
    return model


def _changed(look: Callable[[LoadedModel], Marks], place: int) -> list[str]:
    found = []
    for entry in list(_SHARED):
        now, before = look(entry[0]), entry[place]
        names = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
        if names:
            found += names
            _SHARED.remove(entry)
            tiny_model.cache_clear()
            sample_model.cache_clear()
    return found


def _tensors(model: LoadedModel) -> dict[str, torch.Tensor]:
    return {**dict(model.module.named_parameters()), **dict(model.module.named_buffers())}


def _marks(model: LoadedModel) -> Marks:
    marks: Marks = {
        name: (tensor.data_ptr(), tensor._version, tensor.requires_grad)
        for name, tensor in _tensors(model).items()
    }
    marks["training"] = model.module.training
    return marks


def _sums(model: LoadedModel) -> Marks:
    return {
        name: zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy())
        for name, tensor in _tensors(model).items()
        if not tensor.is_meta and tensor.numel() and tensor.dim()
    }
