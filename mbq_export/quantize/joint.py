"""Clip ratios of neighbouring halves, chosen together by what reaches the end of the last one.

    for every (f_1, f_2, f_3),  f in 1, .995, .99, .985, .98:
        weights of half i: nearest codes on the grid of each group's range times f_i       outliers saturate
        D = rows behind the last half in full precision - the same with all halves rounded
        J = balanced mean |D|
    smallest J; of equal ones the first, which has the larger ratios

Halves are tried as a tree: what the first ones leave is computed once for all that differ only behind them. One half
has rounded weights at a time. The idea of Q-VLM, arXiv 2410.08119; METHODS 12 says what was made of it.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from mbq_export.blocks.loss import class_totals, coefficients, token_counts, token_errors
from mbq_export.errors import GateError
from mbq_export.families.base import TOKEN_CLASSES
from mbq_export.quantize.streams import rows_multiplied
from mbq_export.schemes.affine import Codes, codes_on, dequantize, grid_of
from mbq_export.schemes.base import CHANNEL

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mbq_export.blocks.halves import Half
    from mbq_export.blocks.loss import ClassWeights, Loss
    from mbq_export.blocks.stream import BlockStream
    from mbq_export.quantize.apply import Rounding
    from mbq_export.quantize.streams import Pairs
    from mbq_export.schemes.base import QuantScheme

RATIOS: Final = (1.0, 0.995, 0.99, 0.985, 0.98)
STANDARD_ERRORS: Final = 2.0
"""A combination this close to the best of a sample is scored on all samples."""

Ratios = tuple[float, ...]


def combinations(depth: int) -> list[Ratios]:
    """All ratios of `depth` halves, those without clipping first."""
    return list(itertools.product(RATIOS, repeat=depth))


def round_shrunk(weight: Tensor, ratio: float, *, scheme: QuantScheme, group_size: int) -> Codes:
    """Round to the nearest codes on grids of groups whose ranges are shrunk alike; ratio 1 is plain rounding.

    Args:
        weight: (N, K), finite.
        ratio: What is left of every group's range.
        scheme: Number format.
        group_size: Columns that share a scale, or `CHANNEL`.

    Raises:
        FormatError: E4112 for a range that fp16 cannot hold.
    """
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, scheme.groups_of(columns, group_size), -1)
    grid = grid_of(grouped * ratio, scheme=scheme, channel=group_size == CHANNEL)
    return Codes(
        codes=codes_on(grouped, grid, scheme=scheme).reshape(rows, columns),
        scales=grid.scales,
        zeros=grid.zeros.to(torch.uint8),
        clamped=grid.clamped,
    )


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a search found.

    Attributes:
        ratios: One per half.
        plain: J without clipping, on all samples.
        best: J of `ratios`, on all samples; at most `plain`.
        exact: Combinations that were scored on all samples.
    """

    ratios: Ratios
    plain: float
    best: float
    exact: int


@dataclass(frozen=True, kw_only=True)
class Joint:
    """Neighbouring halves whose ratios are chosen together.

    Attributes:
        halves: In order; their blocks are in float32 and computed with exact weights whenever nothing is tried.
        stream: Runs blocks.
        rounding: Number formats.
        loss: Error of a number.
        weights: Class weights of the half that ends the block; None for all real tokens alike.
    """

    halves: tuple[Half, ...]
    stream: BlockStream
    rounding: Rounding
    loss: Loss
    weights: ClassWeights | None

    def search(self, few: Pairs, whole: Pairs) -> Chosen:
        """Try all combinations.

        Args:
            few: Batches of some samples, with the rows before the first half.
            whole: Those of all samples; `few` itself where they are the same.

        Raises:
            GateError: E1103 if an objective is not finite.
            FormatError: E4112 for a range that fp16 cannot hold.
        """
        tried = combinations(len(self.halves))
        scored = self.objectives(tried, few, of=whole)
        if few is not whole:
            tried = [tried[place] for place in _contenders(scored, samples=_samples(whole))]
            scored = self.objectives(tried, whole, of=whole)
        values = scored.sum(1)
        best = int(values.argmin())
        return Chosen(
            ratios=tried[best], plain=float(values[0]), best=float(values[best]), exact=len(tried)
        )

    def objectives(self, tried: Sequence[Ratios], batches: Pairs, *, of: Pairs) -> Tensor:
        """J of combinations, by sample: (C, samples) float64, whose rows add up to J.

        Args:
            tried: Combinations.
            batches: Batches with the rows before the first half.
            of: All samples: sums over the tokens of a class stand for its tokens in these.

        Raises:
            GateError: E1103 if one is not finite.
        """
        wanted = self._exact(batches)
        totals = {ratios: self._nothing(batches) for ratios in tried}
        self._descend((), batches, wanted, totals)
        drawn, tokens = _tokens(batches), _tokens(of)
        width = batches[0][1].shape[-1]
        weigh = coefficients(tokens, width=width, loss=self.loss, weights=self.weights)
        found = torch.stack([totals[ratios] for ratios in tried]) @ (
            weigh * tokens / drawn.clamp(min=1.0)
        )
        if not bool(torch.isfinite(found).all()):
            raise GateError(
                "E1103",
                f"The error of {int((~torch.isfinite(found)).any(1).sum())} of {len(tried)} combinations is not finite.",
                why="activations or weights overflow",
                fix="check the weights: mbq-export inspect MODEL",
            )
        return found

    def _exact(self, batches: Pairs) -> list[Tensor]:
        """Rows behind the last half in full precision, per batch."""
        rows = batches
        for half in self.halves:
            rows = moved(batches, half.run(self.stream, rows))
        return [each for _, each in rows]

    def _descend(
        self, before: Ratios, rows: Pairs, wanted: list[Tensor], totals: dict[Ratios, Tensor]
    ) -> None:
        """Try the ratios of the next half behind halves whose ratios are taken, and of all after it."""
        depth = len(before)
        half = self.halves[depth]
        for ratios in sorted({each[: depth + 1] for each in totals}, reverse=True):
            if ratios[:depth] != before:
                continue
            with rounded(half, ratios[-1], self.rounding):
                if depth + 1 == len(self.halves):
                    self._score(half, rows, wanted, totals[ratios])
                    continue
                behind = moved(rows, half.run(self.stream, rows))
            self._descend(ratios, behind, wanted, totals)

    def _score(self, half: Half, rows: Pairs, wanted: list[Tensor], totals: Tensor) -> None:
        """Add per-class error sums of every sample: (samples, classes)."""
        place = 0
        for (batch, _), found, target in zip(
            rows, half.run(self.stream, rows), wanted, strict=True
        ):
            errors = token_errors(target - found, loss=self.loss)
            for each, classes in zip(errors, batch.classes, strict=True):
                totals[place] += class_totals(each, classes)
                place += 1

    def _nothing(self, batches: Pairs) -> Tensor:
        return torch.zeros(_samples(batches), len(TOKEN_CLASSES), dtype=torch.float64)


@contextmanager
def rounded(half: Half, ratio: float, rounding: Rounding) -> Iterator[None]:
    """Let the linears of a half compute with rounded weights, and rows if the scheme rounds them, for a while."""
    with ExitStack() as undo:
        for linear, unit in half.units.items():
            scheme = rounding.of(half.index, unit)
            module = half.block.get_submodule(linear)
            weight = module.get_parameter("weight")
            codes = round_shrunk(weight.data, ratio, scheme=scheme, group_size=rounding.group_size)
            undo.callback(partial(setattr, weight, "data", weight.data))
            weight.data = dequantize(codes)
            if scheme.rounds_activations:
                hook = module.register_forward_pre_hook(partial(_round_rows, scheme=scheme))
                undo.callback(hook.remove)
        yield


def _contenders(scored: Tensor, *, samples: int) -> list[int]:
    """Combinations that could be the best of all samples: two best, all that are close, and the first.

    Args:
        scored: (C, n) parts of the objectives by sample, n of all `samples`.
        samples: How many there are.
    """
    values = scored.sum(1)
    apart = scored - scored[int(values.argmin())]
    drawn = scored.shape[1]
    left_out = max(0.0, 1 - drawn / samples)
    deviation = (
        (drawn * left_out) ** 0.5 * apart.std(1)
        if drawn > 1
        else torch.full_like(values, torch.inf)
    )
    close = values - values.min() <= STANDARD_ERRORS * deviation
    close[torch.argsort(values, stable=True)[:2]] = True
    close[0] = True
    return [int(place) for place in close.nonzero()[:, 0]]


def moved(batches: Pairs, rows: Iterator[Tensor]) -> Pairs:
    """The batches with other rows."""
    return [(batch, each) for (batch, _), each in zip(batches, rows, strict=True)]


def _samples(batches: Pairs) -> int:
    return sum(len(batch.samples) for batch, _ in batches)


def _tokens(batches: Pairs) -> Tensor:
    return token_counts(torch.cat([batch.classes.flatten() for batch, _ in batches]))


def _round_rows(
    _module: nn.Module, positional: tuple[Any, ...], *, scheme: QuantScheme
) -> tuple[Any, ...]:
    return (rows_multiplied(positional[0], scheme), *positional[1:])
