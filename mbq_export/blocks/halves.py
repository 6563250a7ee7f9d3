"""A decoder block in two halves, each from residual rows to residual rows.

rows ──► norm ─► attention ─► + ──► rows ──► norm ─► MLP ─► + ──► rows
└─────────────────────────────┘     └───────────────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor, nn

from mbq_export.blocks.ratios import HALF_OF
from mbq_export.blocks.reading import rows_read_by

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mbq_export.blocks.stream import Batch, BlockStream
    from mbq_export.families.base import Smooth, Unit

Kind = Literal["attn", "mlp"]
KINDS: Final[tuple[Kind, Kind]] = ("attn", "mlp")
LAST_UNIT: Final = {"attn": "o", "mlp": "down"}
"""Half to the unit that ends it."""


@dataclass(frozen=True, kw_only=True)
class Half:
    """One half of a block.

    Attributes:
        index: Position of the block.
        kind: Which half.
        block: The block, in float32.
        smooth: The family's units.
    """

    index: int
    kind: Kind
    block: nn.Module
    smooth: tuple[Smooth, ...]

    @property
    def units(self) -> dict[str, Unit]:
        """Unit of each linear, relative to the block, in model order."""
        places = [place for place in self.smooth if HALF_OF[place.unit] == self.kind]
        return {linear: place.unit for place in places for linear in place.into}

    @torch.no_grad()
    def run(self, stream: BlockStream, batches: Sequence[tuple[Batch, Tensor]]) -> Iterator[Tensor]:
        """Yield, per batch, the residual rows (B, T, hidden) behind this half.

        Args:
            stream: Runs blocks.
            batches: Batches with the residual rows before it.
        """
        mlp = next(place for place in self.smooth if place.unit == "gate_up")
        if self.kind == "attn":
            # What the second norm reads is what attention leaves: no family has to say how its attention is called.
            yield from rows_read_by(
                mlp.source, stream=stream, block=self.block, index=self.index, batches=batches
            )
            return
        norm = self.block.get_submodule(mlp.source)
        inside = self.block.get_submodule(mlp.into[0].rpartition(".")[0])
        for _, rows in batches:
            yield rows + inside(norm(rows))
