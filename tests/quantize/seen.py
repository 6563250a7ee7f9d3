"""A small model, what it is calibrated on, and rounding that looks at it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mbq_export.channel_scales import ChannelScales
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.families.base import ANSWER, PROMPT, VISION, LoadedModel
from mbq_export.families.inputs import ModelInputs
from mbq_export.progress import Progress, silent
from mbq_export.quantize import quantize
from mbq_export.quantize.feedback import Samples
from mbq_export.quantize.widths import MixedBits
from mbq_export.schemes import SCHEMES
from mbq_export.state import State
from tests.questions import questions

CALIBRATION, HELD_OUT = 5, 3
RATIOS = {"vision": 0.25, "prompt": 4.0}


def samples(model: LoadedModel) -> Samples:
    found = questions(model, CALIBRATION + HELD_OUT)
    return Samples(inputs=found[:CALIBRATION], held_out=found[CALIBRATION:])


def report(model: LoadedModel) -> dict[str, Any]:
    """Ratios and gradients that differ from linear to linear."""
    layers = []
    for layer in range(model.text.layers):
        linears = {
            linear: {
                "clipped": {k: v * (1 + place) / 2 for k, v in RATIOS.items()},
                "mean_sq": {
                    "answer": 1 / (2 + place + layer),
                    "vision": 0.01 * (1 + place),
                    "prompt": 0.3,
                },
            }
            for place, linear in enumerate(model.family.linears)
        }
        r = {"attn": 0.3, "mlp": 0.6}
        layers.append({"layer": layer, "r": r, "linears": linears})
    return {"layers": layers}


def rounded(
    model: LoadedModel,
    out: Path,
    found: ChannelScales,
    *,
    scheme: str = "w3a16",
    group_size: int = 64,
    mixed: MixedBits | None = None,
    state: State | None = None,
    progress: Progress = silent,
) -> QuantCheckpoint:
    return quantize(
        model,
        found,
        scheme=SCHEMES[scheme],
        group_size=group_size,
        out=out,
        samples=samples(model),
        mixed=mixed,
        state=state,
        progress=progress,
    )


@torch.no_grad()
def rows_of(model: LoadedModel, inputs: list[ModelInputs]) -> dict[str, Tensor]:
    """What each linear of the decoder reads over all samples: (T, K) by full name."""
    seen: dict[str, list[Tensor]] = {}
    handles = []
    for layer in range(model.text.layers):
        for linear in model.family.linears:
            name = model.family.linear_path(layer, linear)
            note = seen.setdefault(name, [])
            handles.append(
                model.module.get_submodule(name).register_forward_pre_hook(
                    lambda _module, args, note=note: note.append(args[0].flatten(0, -2))
                )
            )
    for sample in inputs:
        model.module(**sample.tensors(), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def class_weights(model: LoadedModel, inputs: list[ModelInputs], name: str, kind: str) -> Tensor:
    classes = np.concatenate([sample.token_classes for sample in inputs])
    if kind == "plain":
        return torch.ones(len(classes), dtype=torch.float64)
    place = next(i for i, linear in enumerate(model.family.linears) if name.endswith(linear))
    by = {ANSWER: 1.0, **{k: v * (1 + place) / 2 for k, v in
          ((VISION, RATIOS["vision"]), (PROMPT, RATIOS["prompt"]))}}  # fmt: skip
    return torch.tensor([by[int(k)] for k in classes], dtype=torch.float64)


class KilledError(Exception):
    """Stands for the process being killed."""


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_resumed(
    model: LoadedModel, folder: Path, found: ChannelScales, *, after: int = 1, **kind: Any
) -> None:
    """Kill a run after its first block or another, go on, and compare every byte with those of one go."""
    rounded(model, folder / "whole", found, **kind)

    def kill(done: int, _total: int, _note: str = "") -> None:
        if done == after:
            raise KilledError

    with State.open(folder / "work", {}) as state, pytest.raises(KilledError):
        rounded(model, folder / "out", found, state=state, progress=kill, **kind)
    with State.open(folder / "work", {}) as state:
        rounded(model, folder / "out", found, state=state, **kind)
    assert bytes_of(folder / "out") == bytes_of(folder / "whole")
