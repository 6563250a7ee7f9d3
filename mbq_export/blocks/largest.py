"""How far activations reach on one sample: what decides whether a graph fits into fp16, which ends at 65504.

picture ──► tower, projector ──┐
tokens ───► embedding ─────────┴─► block 0 ──► block 1 ──► ... ──► norm, head
                 every input and output of every layer, block by block, largest size kept
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mbq_export.blocks.stream import BlockStream

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Largest:
    """The largest activation of a run.

    Attributes:
        size: Its absolute value; infinite if one was not finite.
        place: Module path, and whether it goes in or comes out: ``layers.3.mlp.down_proj input``.
    """

    size: float
    place: str


@torch.no_grad()
def largest_activation(model: LoadedModel, sample: ModelInputs) -> Largest:
    """Run one sample in the model's own type and look at every layer.

    The head is asked for the last position alone, as in engines. What no layer takes or gives is not seen: rotated
    queries and keys, which are as long as unrotated ones, and what happens inside attention.

    Args:
        model: Loaded in float32; decoder blocks may be on the meta device.
        sample: Prompt, pictures and answer.

    Raises:
        FormatError: E41xx if the model's files changed, E4204 if image tokens and features differ in number.
    """
    stream, found = BlockStream(model), [Largest(size=0.0, place="")]
    seeing = set(model.family.vision_module(model).modules())
    tower = {name: layer for name, layer in model.module.named_modules() if layer in seeing}
    with _watched(tower, found):
        (batch,) = stream.begin([sample])
    hidden = batch.hidden
    for index in range(len(stream)):
        path = f"{model.family.blocks}.{index}"
        with stream.block(index) as block:
            layers = {f"{path}.{name}": layer for name, layer in block.named_modules()}
            with _watched(layers, found):
                hidden = stream.run(block, index, batch, hidden)
    _look(found, f"{model.family.blocks}.{len(stream) - 1} output", hidden)
    ends = (model.family.final_norm, model.family.head)
    with _watched({name: model.module.get_submodule(name) for name in ends}, found):
        stream.logits(hidden[:, -1:])
    return found[0]


def _look(found: list[Largest], place: str, value: Tensor) -> None:
    """Replace the only element if a value is larger."""
    size = float(value.abs().max())
    size = size if math.isfinite(size) else math.inf
    if size > found[0].size:
        found[0] = Largest(size=size, place=place)


@contextmanager
def _watched(layers: Mapping[str, nn.Module], found: list[Largest]) -> Iterator[None]:
    """Keep the largest of ``found`` and of what those layers take and give that hold no others."""

    def hook(name: str) -> Any:
        def seen(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            for side, values in (("input", inputs), ("output", outputs)):
                for value in values:
                    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                        _look(found, f"{name} {side}", value)

        return seen

    with ExitStack() as hooks:
        for name, layer in layers.items():
            if not any(layer.children()):
                handle = layer.register_forward_hook(hook(name))
                hooks.callback(handle.remove)
        yield
