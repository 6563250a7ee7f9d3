"""Synthetic outlier channels: a harder model that computes exactly the same function.

Large models have a few activation channels far above the rest, and vision and text tokens use different
ones; a small model has neither. Here both are put in by hand, at every place where a factor cancels:

    norm weight * c    ->  activations * c  ->  consumers' columns / c
    up_proj rows * c   ->  activations * c  ->  down_proj columns / c

Per place, the `share` of channels that lean most towards vision (mean |x| over vision tokens against
text tokens) get c around `vision_gain`, and as many that lean most towards text get c around
`text_gain`. Rounding weights to a grid now costs more in those columns, unless a method scales them back.

The result is a fixture for tests and demonstrations. Gains and seed were chosen after a look at what they
do to rounding, so nothing measured on it is evidence for one method against another. The seed alone moves
tiny-llava-ov with plain rounding to 3 bits between 45 % and 84 % exact match (four seeds, 80 pictures).
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mbq_export.calibrate.shapes_drawing import Dice
from mbq_export.errors import FormatError
from mbq_export.families.base import SMOOTH, VISION, Smooth
from mbq_export.families.inputs import ModelInputs

PLACES: Final = tuple(smooth for smooth in SMOOTH if smooth.unit != "o")
"""Not before o_proj: with grouped heads one value channel feeds several of its columns."""

BLOCKS: Final = "model.language_model.layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stress:
    """How much to distort.

    Attributes:
        share: Share of the channels of a place that get either gain.
        vision_gain: Median factor of the channels that lean towards vision.
        text_gain: Median factor of the channels that lean towards text.
        spread: Standard deviation of the factors' logarithm.
        seed: Of the factors.
    """

    share: float = 0.05
    vision_gain: float = 40.0
    text_gain: float = 8.0
    spread: float = 0.3
    seed: int = 1


STRESS: Final = Stress()


@dataclass(frozen=True, slots=True, kw_only=True)
class Stressed:
    """What was done at one place of one block.

    Attributes:
        block: Index of the decoder block.
        unit: Name of the place, as in `families.base.SMOOTH`.
        factors: (K,) float32, 1 where nothing was changed.
        outlier_ratio_before: Largest over median channel of mean |x|.
        outlier_ratio_after: The same with the factors.
    """

    block: int
    unit: str
    factors: NDArray[np.float32]
    outlier_ratio_before: float
    outlier_ratio_after: float


def apply_stress(
    module: nn.Module,
    inputs: Sequence[ModelInputs],
    *,
    stress: Stress = STRESS,
    blocks: str = BLOCKS,
) -> list[Stressed]:
    """Put outlier channels into a model, in place, without changing what it computes.

    Args:
        module: A Hugging Face model in float32, blocks loaded.
        inputs: Samples with pictures; a few dozen tell which way a channel leans.
        stress: How much.
        blocks: Path of the list of decoder blocks.

    Raises:
        FormatError: E4102 if the blocks are not float32; the factors would not cancel in half precision.
    """
    layers = list(module.get_submodule(blocks).children())
    _check_float32(layers)
    means = channel_means(module, layers, inputs)
    dice = Dice(stress.seed)
    done = []
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for place in PLACES:
                vision, text = means[index, place.unit]
                factors = choose_factors(vision / text, stress, dice)
                _multiply(layer, place, factors)
                both = vision + text
                done.append(
                    Stressed(
                        block=index,
                        unit=place.unit,
                        factors=factors.numpy(),
                        outlier_ratio_before=float(both.max() / both.median()),
                        outlier_ratio_after=float(
                            (both * factors).max() / (both * factors).median()
                        ),
                    )
                )
    return done


@torch.no_grad()
def channel_means(
    module: nn.Module, layers: Sequence[nn.Module], inputs: Iterable[ModelInputs]
) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Run samples and average |x| per channel in front of each place's consumers.

    Returns:
        (block, unit) -> mean over vision tokens and mean over the others, (K,) float32 each.
    """
    sums: dict[tuple[int, str], Tensor] = {}
    counts = torch.zeros(2, 1)
    classes = torch.zeros(0)

    def listen(key: tuple[int, str]) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[key] = sums.get(key, torch.zeros(())) + classes @ args[0][0].abs()

        return hook

    handles = [
        layer.get_submodule(place.into[0]).register_forward_pre_hook(listen((index, place.unit)))
        for index, layer in enumerate(layers)
        for place in PLACES
    ]
    for sample in inputs:
        vision = torch.from_numpy(sample.token_classes == VISION)
        classes = torch.stack([vision, ~vision]).float()
        counts += classes.sum(1, keepdim=True)
        module(**sample.tensors(), use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: ((total / counts)[0], (total / counts)[1]) for key, total in sums.items()}


def choose_factors(lean: Tensor, stress: Stress, dice: Dice) -> Tensor:
    """Choose a factor for every channel.

    Args:
        lean: (K,) vision over text mean |x|.
        stress: How many channels, how much.
        dice: Where the spread comes from.

    Returns:
        (K,) float32: around `vision_gain` for the largest, around `text_gain` for the smallest, else 1.
    """
    count = max(1, round(stress.share * len(lean)))
    order = lean.argsort(descending=True)
    factors = torch.ones(len(lean))
    for channels, gain in ((order[:count], stress.vision_gain), (order[-count:], stress.text_gain)):
        spread = torch.from_numpy(dice.normal((count,))) * stress.spread
        factors[channels] = gain * spread.exp()
    return factors


def _multiply(layer: nn.Module, place: Smooth, factors: Tensor) -> None:
    """Multiply what leaves the source, divide what the consumers do with it."""
    source = layer.get_submodule(place.source)
    for parameter in source.parameters(
        recurse=False
    ):  # weight of a norm; weight and bias of a linear
        parameter.mul_(factors.view(-1, *[1] * (parameter.ndim - 1)))
    for name in place.into:
        layer.get_submodule(name).get_parameter("weight").div_(factors)


def _check_float32(layers: Iterable[nn.Module]) -> None:
    found: dict[torch.dtype, int] = defaultdict(int)
    for layer in layers:
        for parameter in layer.parameters():
            found[parameter.dtype] += 1
    if set(found) - {torch.float32}:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        raise FormatError(
            "E4102",
            f"Cannot stress a model in {names}.",
            why="factors of 40 and their inverses cancel in float32 only",
            fix="load the model with dtype float32",
        )
