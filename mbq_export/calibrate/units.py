"""One decoder block as the scale search sees it: four units, their inputs, and where errors are read.

    unit       linears     error read at        inputs are read at
    qkv        q, k, v     attention output     attention input
    o          o           o output             o input
    gate_up    gate, up    MLP output           MLP input
    down       down        down output          down input

Inputs and outputs are those of the un-scaled full-precision block. All units but `qkv` treat tokens one by
one; attention needs the keys and values of every token that a drawn one may look back at.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from mbq_export.blocks.loss import token_counts
from mbq_export.blocks.tokens import class_mask
from mbq_export.calibrate.excerpt import draw, gather, joined
from mbq_export.calibrate.race import Step
from mbq_export.families.base import TOKEN_CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mbq_export.blocks.loss import ClassWeights
    from mbq_export.blocks.stream import Batch, BlockStream
    from mbq_export.calibrate.excerpt import Drawn, Excerpt
    from mbq_export.families.base import Smooth, TextShape
    from mbq_export.schemes.base import QuantScheme

    Read = Callable[[], Iterator[Tensor]]

KEEP_BYTES: Final = 512 << 20
"""Calls of a block are kept for its four searches if they fit; else the block is run again for each."""

STEPS: Final = ((1 / 8, 1024, 5), (1 / 2, 4096, 2), (2, 8192, 1))
"""Steps of a race: tokens per class over those that ``tokens`` names; tokens whose keys and values are computed for
each candidate; the fewest candidates that go on.
"""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an inspected module in full precision.

    Attributes:
        rows: (..., K) its first argument.
        arguments: Its other arguments, by name.
        output: (..., N).
        classes: Token classes, shaped like the leading axes of `rows`, flattened.
    """

    rows: Tensor
    arguments: Mapping[str, Any]
    output: Tensor
    classes: Tensor


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """|x| per channel over the tokens of each class.

    Attributes:
        sums: (classes, K) float64.
        peaks: (classes, K) float32, the largest; 0 without tokens.
        tokens: (classes,) float64.
    """

    sums: Tensor
    peaks: Tensor
    tokens: Tensor

    def mean(self, *kinds: int) -> Tensor:
        """Mean of |x| over the tokens of some classes together: (K,) float64, 0 without tokens."""
        chosen = list(kinds)
        mean: Tensor = self.sums[chosen].sum(0) / self.tokens[chosen].sum().clamp(min=1.0)
        return mean

    def peak(self, *kinds: int) -> Tensor:
        """Largest |x| over the tokens of some classes together: (K,) float64."""
        return self.peaks[list(kinds)].amax(0).double()


@dataclass(frozen=True, kw_only=True)
class UnitView:
    """Everything a method may look at when it chooses the scale of one unit.

    Attributes:
        layer: Index of the block.
        place: Source and linears of the unit, relative to the block.
        block: The block in full precision; not to be changed.
        text: Decoder sizes.
        scheme: Number format to round to.
        group_size: Columns that share a scale.
        r: Measured weight of vision tokens, for the balanced statistic.
        weights: Class weights of the loss; None weighs all real tokens alike.
        coarse: Whether half of the exponents will do, where the grid is ``auto``.
        statistics: Of the unit's inputs.
        steps: Draws of tokens that stand for all, the smaller first; none where only all will do.
        calls: All tokens, in batches; may be iterated over more than once.
    """

    layer: int
    place: Smooth
    block: nn.Module
    text: TextShape
    scheme: QuantScheme
    group_size: int
    r: float
    weights: ClassWeights | None
    statistics: Statistics
    steps: tuple[Step, ...]
    calls: Callable[[], Iterator[Call]]
    coarse: bool = False

    @property
    def inspected(self) -> nn.Module:
        """The module at whose output errors are read."""
        return self.block.get_submodule(inspected_path(self.place))

    def parameter(self, linear: str) -> str:
        """Name of a linear's weight as `inspected` knows it."""
        path = inspected_path(self.place)
        return "weight" if linear == path else f"{linear.removeprefix(path + '.')}.weight"


def inspected_path(place: Smooth) -> str:
    """Where errors are read: at the linear itself, or at the module that holds several."""
    first = place.into[0]
    return first if len(place.into) == 1 else first.rpartition(".")[0]


@dataclass(kw_only=True)
class BlockObservation:
    """One full-precision run of a block over all batches, and what the searches need of it.

    Attributes:
        outputs: Per batch, the block's output: the next block's input.
        read: Rows that stand in for those of a unit.
        statistics: By unit.
        steps: By unit, where tokens were drawn.
        kept: By unit, all calls, if they are wanted and fit in `KEEP_BYTES`.
    """

    outputs: list[Tensor] = field(default_factory=list)
    read: Read | None = None
    statistics: dict[str, Statistics] = field(default_factory=dict)
    steps: dict[str, tuple[Step, ...]] = field(default_factory=dict)
    kept: dict[str, list[Call]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Tokens that stand for all in one block.

    Attributes:
        sizes: Tokens per class of each step of a race.
        rows: Per batch, for modules that treat tokens one by one.
        spans: Per step and batch, for attention: the smaller the step, the fewer the sequences they are from.
    """

    sizes: Sequence[int]
    rows: Sequence[Drawn | None]
    spans: Sequence[Sequence[Drawn | None]]


@torch.no_grad()
def run_and_watch(
    stream: BlockStream,
    block: nn.Module,
    index: int,
    batches: Sequence[tuple[Batch, Tensor]],
    places: Sequence[Smooth],
    *,
    read: Read | None = None,
) -> Iterator[tuple[Tensor, dict[str, Call]]]:
    """Run a block over batches and yield, per batch, its output and the call of each place's module.

    Args:
        stream: Runs the block.
        block: The block.
        index: Its position.
        batches: Batches with the block's input rows.
        places: Units to watch.
        read: Rows per batch that calls have in place of their own, for a single place; the output stays.
    """
    seen: dict[str, tuple[Tensor, Mapping[str, Any], Tensor]] = {}
    handles = [
        block.get_submodule(inspected_path(place)).register_forward_hook(
            _note(seen, place.unit), with_kwargs=True
        )
        for place in places
    ]
    other = itertools.repeat(None) if read is None else read()
    try:
        for (batch, hidden), instead in zip(batches, other, strict=False):
            output = stream.run(block, index, batch, hidden)
            yield (
                output,
                {
                    unit: Call(
                        rows=rows if instead is None else instead,
                        arguments=arguments,
                        output=result,
                        classes=batch.classes.flatten(),
                    )
                    for unit, (rows, arguments, result) in seen.items()
                },
            )
    finally:
        for handle in handles:
            handle.remove()


def _note(
    seen: dict[str, tuple[Tensor, Mapping[str, Any], Tensor]], unit: str
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    def note(
        _module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        named = dict(named)
        rows = positional[0] if positional else named.pop("hidden_states")
        seen[unit] = (rows, named, output[0] if isinstance(output, tuple) else output)

    return note


def observe(  # noqa: PLR0913 - what a run of a block needs, and what is kept of it
    stream: BlockStream,
    block: nn.Module,
    index: int,
    batches: Sequence[tuple[Batch, Tensor]],
    *,
    places: Sequence[Smooth],
    draws: Draws | None,
    read: Read | None = None,
) -> BlockObservation:
    """Run a block once over everything and keep what its searches need.

    Args:
        stream: Runs the block.
        block: The block.
        index: Its position.
        batches: Batches with the block's input rows.
        places: Units to watch.
        draws: Tokens that stand for all; None to look at all of them.
        read: See `run_and_watch`.
    """
    found = BlockObservation(read=read)
    sums: dict[str, Tensor] = {}
    peaks: dict[str, Tensor] = {}
    parts: dict[str, list[Sequence[Excerpt | None]]] = {place.unit: [] for place in places}
    keep = draws is None and _fits(block, batches, places)
    tokens = sum((token_counts(batch.classes.flatten()) for batch, _ in batches), torch.zeros(()))
    for position, (output, calls) in enumerate(
        run_and_watch(stream, block, index, batches, places, read=read)
    ):
        found.outputs.append(output)
        for unit, call in calls.items():
            size = call.rows.flatten(0, -2).float().abs()
            sums[unit] = (
                sums.get(unit, torch.zeros(())) + (class_mask(call.classes).float() @ size).double()
            )
            peaks[unit] = torch.maximum(
                peaks.get(unit, torch.zeros(())), _peaks(size, call.classes)
            )
            if keep:
                found.kept.setdefault(unit, []).append(call)
            if draws is not None:
                parts[unit].append(_parts(call, draws, position))
    found.statistics = {
        unit: Statistics(sums=values, peaks=peaks[unit], tokens=tokens)
        for unit, values in sums.items()
    }
    if draws is not None:
        found.steps = {unit: _steps(drawn, draws.sizes) for unit, drawn in parts.items()}
    return found


def draw_tokens(
    batches: Sequence[Batch], *, tokens: int, kinds: Sequence[int], seed: Sequence[int]
) -> Draws:
    """Draw the tokens that the searches of a block look at.

    Args:
        batches: All samples.
        tokens: Per class, as the switch says.
        kinds: Classes to draw from.
        seed: Of the generator: the same seed draws the same tokens.
    """
    sizes = [max(2, round(tokens * share)) for share, _, _ in STEPS]
    rows = draw(batches, per_class=sizes[-1], kinds=kinds, seed=seed)
    spans = [
        draw(batches, per_class=size, kinds=kinds, seed=[*seed, most], most_tokens=most)
        for size, (_, most, _) in zip(sizes, STEPS, strict=True)
    ]
    return Draws(sizes=sizes, rows=rows, spans=spans)


def _parts(call: Call, draws: Draws, position: int) -> list[Excerpt | None]:
    """What the steps of a race see of a call: one excerpt that each cuts smaller, or one for each."""
    drawn = [side[position] for side in (draws.spans if call.arguments else [draws.rows])]
    return [
        None if each is None else gather(call.rows, call.output, call.arguments, each)
        for each in drawn
    ]


def _steps(parts: Sequence[Sequence[Excerpt | None]], sizes: Sequence[int]) -> tuple[Step, ...]:
    sides = [
        joined([excerpt for excerpt in side if excerpt is not None])
        for side in zip(*parts, strict=True)
    ]
    found: list[Step] = []
    for number, (size, (_, _, keep)) in enumerate(zip(sizes, STEPS, strict=True)):
        seen = [each.upto(size) for each in sides[number % len(sides)]]
        step = Step(excerpts=seen, keep=keep)
        # Where there are few tokens a later step is no larger.
        if found and step.tokens <= found[-1].tokens:
            found[-1] = step
        else:
            found.append(step)
    return tuple(found)


def _peaks(rows: Tensor, classes: Tensor) -> Tensor:
    """Largest value per class and channel, 0 without tokens: (T, K) to (classes, K)."""
    found = rows.new_zeros(len(TOKEN_CLASSES), rows.shape[1])
    for kind in range(len(TOKEN_CLASSES)):
        chosen = classes == kind
        if bool(chosen.any()):
            found[kind] = rows[chosen].amax(0)
    return found


def _fits(
    block: nn.Module, batches: Sequence[tuple[Batch, Tensor]], places: Sequence[Smooth]
) -> bool:
    tokens = sum(batch.classes.numel() for batch, _ in batches)
    hidden = batches[0][1].shape[-1]
    inputs = sum(int(block.get_parameter(f"{p.into[0]}.weight").shape[1]) for p in places)
    size = batches[0][1].element_size()
    return bool(tokens * (inputs + hidden * len(places)) * size <= KEEP_BYTES)
