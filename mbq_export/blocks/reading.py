"""What a linear inside a block reads, batch by batch, without running the block any further."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mbq_export.blocks.stream import Batch, BlockStream


class _ReadError(Exception):
    """Leaves a block as soon as the awaited rows are there; never seen outside `rows_read_by`."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


def rows_read_by(
    linear: str,
    *,
    stream: BlockStream,
    block: nn.Module,
    index: int,
    batches: Sequence[tuple[Batch, Tensor]],
) -> Iterator[Tensor]:
    """Yield the input of a linear for each batch: (B, T, K). Nothing is kept.

    Args:
        linear: Path relative to the block.
        stream: Runs the block.
        block: The block, whatever was done to it.
        index: Its position.
        batches: Batches with the block's input rows.
    """

    def leave(_module: nn.Module, positional: tuple[Tensor, ...]) -> None:
        raise _ReadError(positional[0])

    for batch, hidden in batches:
        handle = block.get_submodule(linear).register_forward_pre_hook(leave, prepend=True)
        read = []
        try:
            with torch.no_grad():
                stream.run(block, index, batch, hidden)
        except _ReadError as left:
            read.append(left.rows)
        finally:
            handle.remove()
        yield from read
