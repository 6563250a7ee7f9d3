"""Score candidates on few tokens, the better ones on more, the last few on many.

    all ──► 1/4 n tokens of each class ──► n ──► 4 n ──► the best
            drop what is clearly worse at each step, by the spread of paired differences

A candidate that drops out keeps an estimate: the value of the best at the last step, plus how far apart the two were
on the tokens that saw both. METHODS 16.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from mbq_export.blocks.loss import class_totals, token_counts
from mbq_export.families.base import PAD, TOKEN_CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mbq_export.calibrate.excerpt import Excerpt

STANDARD_ERRORS: Final = 2.0
"""A candidate this close to the best goes on."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Objectives of all candidates.

    Attributes:
        values: (C,) float64 J; estimates unless all tokens were seen.
        last: (C,) bool, candidates that reached the last step, one of which is the best.
        totals: (C, classes) float64 per-class sums over all tokens, estimated likewise.
        deviation: (C,) float64, standard error of J - J(best) where the candidate was seen last; 0 for all tokens.
        seen: Tokens that every candidate was scored on.
        last_seen: Tokens of the last step.
    """

    values: Tensor
    last: Tensor
    totals: Tensor
    deviation: Tensor
    seen: int
    last_seen: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a race.

    Attributes:
        excerpts: Where candidates are scored.
        keep: Fewest that go on.
    """

    excerpts: Sequence[Excerpt]
    keep: int

    @property
    def classes(self) -> Tensor:
        """(n,) classes of its tokens, in order."""
        return torch.cat([excerpt.classes.flatten() for excerpt in self.excerpts])

    @property
    def tokens(self) -> int:
        """How many they are."""
        return int((self.classes != PAD).sum())


def race(
    steps: Sequence[Step],
    errors_of: Callable[[int, Sequence[Excerpt]], Tensor],
    *,
    candidates: int,
    tokens: Tensor,
    weigh: Tensor,
) -> Scored:
    """Score candidates on the excerpts of one step after the other.

    Args:
        steps: Not empty; each sees more tokens than the one before.
        errors_of: (n,) float64 token errors of a candidate on some excerpts.
        candidates: C.
        tokens: (classes,) tokens in all.
        weigh: (classes,) coefficients of the objective.
    """
    values = torch.zeros(candidates, dtype=torch.float64)
    deviation = torch.zeros_like(values)
    totals = values.new_zeros(candidates, len(TOKEN_CLASSES))
    places = list(range(candidates))
    for number, step in enumerate(steps):
        classes = step.classes
        errors = torch.stack([errors_of(place, step.excerpts) for place in places])
        found, apart = estimate(errors, classes, tokens=tokens, weigh=weigh)
        leader = places[int(found.argmin())]
        values += found.min() - values[leader]  # those who dropped out keep their distance
        values[places], deviation[places] = found, apart
        totals[places] = class_totals(errors, classes) * _inflation(classes, tokens)
        if number + 1 < len(steps):
            close = found - found.min() <= STANDARD_ERRORS * apart
            close[torch.argsort(found, stable=True)[: step.keep]] = True
            places = [place for place, near in zip(places, close.tolist(), strict=True) if near]
    last = torch.zeros(candidates, dtype=torch.bool)
    last[places] = True
    return Scored(
        values=values,
        last=last,
        totals=totals,
        deviation=deviation,
        seen=steps[0].tokens,
        last_seen=steps[-1].tokens,
    )


def estimate(
    errors: Tensor, classes: Tensor, *, tokens: Tensor, weigh: Tensor
) -> tuple[Tensor, Tensor]:
    """Objectives from a sample drawn per class, and standard errors of their distance to the least.

    Args:
        errors: (C, n) float64 token errors.
        classes: (n,) int8.
        tokens: (classes,) tokens in all.
        weigh: (classes,) coefficients of the objective.

    Returns:
        (C,) objectives and (C,) standard errors, with the finite-population correction.
    """
    drawn = token_counts(classes)
    whole = weigh * tokens
    values = class_totals(errors, classes) @ (whole / drawn.clamp(min=1.0))
    apart = errors - errors[int(values.argmin())]
    mean = class_totals(apart, classes) / drawn.clamp(min=1.0)
    spread = class_totals(apart.square(), classes) / drawn.clamp(min=1.0) - mean.square()
    left_out = (1 - drawn / tokens.clamp(min=1.0)).clamp(min=0.0)
    variance = spread.clamp(min=0.0) / (drawn - 1).clamp(min=1.0) * left_out
    return values, (variance @ whole.square()).sqrt()


def _inflation(classes: Tensor, tokens: Tensor) -> Tensor:
    return tokens / token_counts(classes).clamp(min=1.0)
