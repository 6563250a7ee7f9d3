"""Gram matrices of a linear's inputs, per token class or already weighed.

    H = sum over tokens t of c(t) x_t x_t'                (K, K)     c: weight of the token's class
    S = sum over tokens t of c(t) (x~_t - x_t) x_t'       (K, K)     x~: what full precision feeds the linear

Several weighings of one input (q, k and v read the same rows) share one sum per class: *split*. Where those
are too large, or one weighing is all there is, the weighed sum itself is kept: *folded*. Both give the same
matrices up to rounding. For any weight error E of a linear, tr(E H E') is the weighed sum of its squared output
errors (METHODS 16.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from mbq_export.families.base import ANSWER, PAD, PROMPT, TOKEN_CLASSES, VISION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mbq_export.blocks.loss import ClassWeights

SPLIT_COLUMNS: Final = 8192
"""Beyond this K three matrices take more memory than a weighing each."""
_REAL: Final = (VISION, ANSWER, PROMPT)


class Gram:
    """Sums over the tokens of one distinct input, in float32, added up call by call."""

    def __init__(
        self,
        columns: int,
        weighings: Mapping[str, ClassWeights],
        *,
        shifted: bool = False,
        split: bool | None = None,
    ) -> None:
        """Start with nothing seen.

        Args:
            columns: K.
            weighings: Weights of the token classes by a name of the caller's; padding weighs nothing.
            shifted: Keep S too.
            split: Keep a sum per token class; None decides by K and the number of weighings.
        """
        self.columns = columns
        self._weights = {name: _by_class(weights) for name, weights in weighings.items()}
        if split is None:
            split = columns <= SPLIT_COLUMNS and len(weighings) > 1
        self.split = split
        self._squares: dict[str | int, Tensor] = {}
        self._shifts: dict[str | int, Tensor] | None = {} if shifted else None

    @property
    def bytes(self) -> int:
        """Memory of the sums so far."""
        stores = (self._squares, self._shifts or {})
        return sum(tensor.nbytes for store in stores for tensor in store.values())

    def add(self, rows: Tensor, classes: Tensor, exact: Tensor | None = None) -> None:
        """Add the tokens of one call.

        Args:
            rows: (..., K), what the linear reads.
            classes: Token classes, shaped like the leading axes.
            exact: (..., K), what it reads in full precision; needed where S is kept.
        """
        flat, kinds = rows.reshape(-1, self.columns).float(), classes.flatten()
        away = None if exact is None else exact.reshape(-1, self.columns).float() - flat
        if self.split:
            for kind in _REAL:
                chosen = kinds == kind
                if bool(chosen.any()):
                    part = flat[chosen]
                    self._sum(kind, part, part, None if away is None else away[chosen])
        else:
            for name, weights in self._weights.items():
                weighed = flat * weights[kinds.long()][:, None].to(flat.dtype)
                self._sum(name, flat, weighed, away)

    def hessian(self, name: str) -> Tensor:
        """H of a weighing: (K, K) float32, symmetric."""
        found = self._mixed(self._squares, name)
        return (found + found.T) / 2

    def shift(self, name: str) -> Tensor:
        """S of a weighing: (K, K) float32."""
        assert self._shifts is not None  # the caller asked for it
        return self._mixed(self._shifts, name)

    def diagonal_blocks(self, name: str, group_size: int) -> Tensor:
        """The part of H inside each group of columns.

        Args:
            name: Which weighing.
            group_size: Columns of a group; divides K.

        Returns:
            (groups, group_size, group_size) float32.
        """
        groups = self.columns // group_size
        blocks = self.hessian(name).reshape(groups, group_size, groups, group_size)
        return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()

    def _sum(self, key: str | int, left: Tensor, weighed: Tensor, away: Tensor | None) -> None:
        _accumulate(self._squares, key, left.T @ weighed)
        if self._shifts is not None:
            assert away is not None  # the caller keeps S
            _accumulate(self._shifts, key, away.T @ weighed)

    def _mixed(self, sums: Mapping[str | int, Tensor], name: str) -> Tensor:
        empty = torch.zeros(self.columns, self.columns)
        if not self.split:
            return sums.get(name, empty)
        weights = self._weights[name]
        return sum((sums[kind] * float(weights[kind]) for kind in _REAL if kind in sums), empty)


class GroupGram:
    """The part of H inside each group of columns and nothing else: K x group size floats per weighing, float32."""

    def __init__(
        self, columns: int, weighings: Mapping[str, ClassWeights], *, group_size: int
    ) -> None:
        """Start with nothing seen.

        Args:
            columns: K.
            weighings: Weights of the token classes by a name of the caller's; padding weighs nothing.
            group_size: Columns of a group; divides K.
        """
        self._groups, self._size = columns // group_size, group_size
        self._weights = {name: _by_class(weights) for name, weights in weighings.items()}
        self._sums = {name: torch.zeros(self._groups, group_size, group_size) for name in weighings}

    def add(self, rows: Tensor, classes: Tensor) -> None:
        """Add the tokens of one call.

        Args:
            rows: (..., K), what the linear reads.
            classes: Token classes, shaped like the leading axes.
        """
        grouped = rows.float().reshape(-1, self._groups, self._size).transpose(0, 1)
        kinds = classes.flatten().long()
        for name, weights in self._weights.items():
            weighed = grouped * weights[kinds][:, None].to(grouped.dtype)
            self._sums[name] += grouped.transpose(1, 2) @ weighed

    def diagonal_blocks(self, name: str) -> Tensor:
        """(groups, group_size, group_size) float32, symmetric."""
        found = self._sums[name]
        return (found + found.transpose(1, 2)) / 2


def _accumulate(store: dict[str | int, Tensor], key: str | int, part: Tensor) -> None:
    if key in store:
        store[key] += part
    else:
        store[key] = part


def _by_class(weights: ClassWeights) -> Tensor:
    """Weight by number of the class: (classes,) float64."""
    found = torch.zeros(len(TOKEN_CLASSES), dtype=torch.float64)
    found[PAD], found[ANSWER] = 0.0, 1.0
    found[VISION], found[PROMPT] = weights.vision, weights.prompt
    return found
