"""One decoder block as the scale search sees it: four units, their inputs, and where errors are read.

    unit       linears     error read at        inputs are read at
    qkv        q, k, v     attention output     attention input
    o          o           o output             o input
    gate_up    gate, up    MLP output           MLP input
    down       down        down output          down input

Inputs and outputs are those of the un-scaled full-precision block. All units but `qkv` treat tokens one by
one, so a chosen subset of rows can stand for all; attention needs every row, and so do its errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from mbq_export.blocks.loss import token_counts
from mbq_export.blocks.tokens import class_mask
from mbq_export.families.base import TOKEN_CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mbq_export.blocks.loss import ClassWeights
    from mbq_export.blocks.stream import Batch, BlockStream
    from mbq_export.families.base import Smooth, TextShape
    from mbq_export.schemes.base import QuantScheme

KEEP_BYTES: Final = 512 << 20
"""Calls of a block are kept for its four searches if they fit; else the block is run again for each."""


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
        statistics: Of the unit's inputs.
        sample: A subset of rows that can stand for all, or None where only all will do.
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
    sample: Call | None
    calls: Callable[[], Iterator[Call]]

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
        statistics: By unit.
        samples: By unit, for units that treat tokens one by one.
        kept: By unit, all calls, if they fit in `KEEP_BYTES`.
    """

    outputs: list[Tensor] = field(default_factory=list)
    statistics: dict[str, Statistics] = field(default_factory=dict)
    samples: dict[str, Call] = field(default_factory=dict)
    kept: dict[str, list[Call]] = field(default_factory=dict)


@torch.no_grad()
def run_and_watch(
    stream: BlockStream,
    block: nn.Module,
    index: int,
    batches: Sequence[tuple[Batch, Tensor]],
    places: Sequence[Smooth],
) -> Iterator[tuple[Tensor, dict[str, Call]]]:
    """Run a block over batches and yield, per batch, its output and the call of each place's module.

    Args:
        stream: Runs the block.
        block: The block.
        index: Its position.
        batches: Batches with the block's input rows.
        places: Units to watch.
    """
    seen: dict[str, tuple[Tensor, Mapping[str, Any], Tensor]] = {}
    handles = [
        block.get_submodule(inspected_path(place)).register_forward_hook(
            _note(seen, place.unit), with_kwargs=True
        )
        for place in places
    ]
    try:
        for batch, hidden in batches:
            output = stream.run(block, index, batch, hidden)
            yield (
                output,
                {
                    unit: Call(
                        rows=rows,
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


def observe(
    stream: BlockStream,
    block: nn.Module,
    index: int,
    batches: Sequence[tuple[Batch, Tensor]],
    *,
    places: Sequence[Smooth],
    chosen: Sequence[Tensor] | None,
) -> BlockObservation:
    """Run a block once over everything and keep what its searches need.

    Args:
        stream: Runs the block.
        block: The block.
        index: Its position.
        batches: Batches with the block's input rows.
        places: Units to watch.
        chosen: Per batch, flat positions of the rows that stand for all; None to keep no samples.
    """
    found = BlockObservation()
    sums: dict[str, Tensor] = {}
    peaks: dict[str, Tensor] = {}
    parts: dict[str, list[Call]] = {place.unit: [] for place in places}
    keep = _fits(block, batches, places)
    tokens = sum((token_counts(batch.classes.flatten()) for batch, _ in batches), torch.zeros(()))
    for position, (output, calls) in enumerate(
        run_and_watch(stream, block, index, batches, places)
    ):
        found.outputs.append(output)
        for unit, call in calls.items():
            sums[unit] = sums.get(unit, torch.zeros(())) + _sums(call)
            peaks[unit] = torch.maximum(peaks.get(unit, torch.zeros(())), _peaks(call))
            if keep:
                found.kept.setdefault(unit, []).append(call)
            if chosen is not None and not call.arguments:
                parts[unit].append(_rows_of(call, chosen[position]))
    found.statistics = {
        unit: Statistics(sums=values, peaks=peaks[unit], tokens=tokens)
        for unit, values in sums.items()
    }
    found.samples = {
        unit: Call(
            rows=torch.cat([part.rows for part in calls]),
            arguments={},
            output=torch.cat([part.output for part in calls]),
            classes=torch.cat([part.classes for part in calls]),
        )
        for unit, calls in parts.items()
        if calls
    }
    return found


def choose_tokens(
    batches: Sequence[Batch], *, per_class: int, kinds: Sequence[int], seed: Sequence[int]
) -> list[Tensor]:
    """Draw at most `per_class` tokens of each class, without replacement.

    Args:
        batches: All samples.
        per_class: Most tokens of a class.
        kinds: Classes to draw from.
        seed: Of the generator: the same seed draws the same tokens.

    Returns:
        Per batch, ascending flat positions.
    """
    rng = np.random.default_rng(list(seed))
    lengths = [batch.classes.numel() for batch in batches]
    classes = torch.cat([batch.classes.flatten() for batch in batches]).numpy()
    drawn = []
    for kind in sorted(kinds):
        places = np.flatnonzero(classes == kind)
        drawn.append(rng.permutation(places)[:per_class])
    flat = np.sort(np.concatenate(drawn))
    ends = np.cumsum(lengths)
    return [
        torch.from_numpy(flat[(flat >= end - length) & (flat < end)] - (end - length))
        for end, length in zip(ends, lengths, strict=True)
    ]


def _sums(call: Call) -> Tensor:
    rows = call.rows.flatten(0, -2).float().abs()
    return (class_mask(call.classes).float() @ rows).double()


def _peaks(call: Call) -> Tensor:
    rows = call.rows.flatten(0, -2).float().abs()
    nothing = rows.new_zeros(1, rows.shape[1])
    of_class = [
        torch.cat([nothing, rows[call.classes == kind]]) for kind in range(len(TOKEN_CLASSES))
    ]
    return torch.stack([each.amax(0) for each in of_class])


def _rows_of(call: Call, positions: Tensor) -> Call:
    return Call(
        rows=call.rows.flatten(0, -2)[positions],
        arguments={},
        output=call.output.flatten(0, -2)[positions],
        classes=call.classes[positions],
    )


def _fits(
    block: nn.Module, batches: Sequence[tuple[Batch, Tensor]], places: Sequence[Smooth]
) -> bool:
    tokens = sum(batch.classes.numel() for batch, _ in batches)
    hidden = batches[0][1].shape[-1]
    inputs = sum(int(block.get_parameter(f"{p.into[0]}.weight").shape[1]) for p in places)
    size = batches[0][1].element_size()
    return bool(tokens * (inputs + hidden * len(places)) * size <= KEEP_BYTES)
