"""Rows as blocks rounded to nearest leave them: the second stream of a search (``--prefix quantized``, METHODS 6.6).

x    ──► block in full precision ──────────────────► outputs that candidates are compared with
x_q  ──► block with the scales so far, all rounded ──► what a unit's linears read, before its search
                                                 └──► x_q of the next block, after the last
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import torch

from mbq_export.blocks.fold import fold_unit
from mbq_export.blocks.reading import rows_read_by
from mbq_export.schemes.affine import dequantize, quantize, rounded_per_token

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from mbq_export.blocks.stream import Batch
    from mbq_export.calibrate.smooth import Job
    from mbq_export.calibrate.units import Read
    from mbq_export.families.base import Smooth


def rounded_block(job: Job, block: nn.Module, scales: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a block with some scales folded and all of its linears rounded to the nearest code.

    Args:
        job: Places, scheme and group size.
        block: In full precision; not changed.
        scales: Unit name to (K,) float32 e, of the units searched so far.
    """
    found = copy.deepcopy(block)
    for place in job.places:
        if place.unit in scales:
            fold_unit(found, scales[place.unit], place=place, text=job.text)
    for linear in (linear for place in job.places for linear in place.into):
        module = found.get_submodule(linear)
        weight = module.get_parameter("weight")
        codes = quantize(weight.float(), scheme=job.scheme, group_size=job.group_size)
        with torch.no_grad():
            weight.copy_(dequantize(codes))
        if job.scheme.rounds_activations:
            module.register_forward_pre_hook(partial(_round_rows, bits=job.scheme.act_bits))
    return found


class MovedRows:
    """The second stream inside one block."""

    def __init__(
        self, job: Job, block: nn.Module, index: int, batches: Sequence[tuple[Batch, Tensor]]
    ) -> None:
        """Keep the block and its input rows of the second stream."""
        self._job, self._block, self._index, self._batches = job, block, index, batches

    def read_by(self, place: Smooth, scales: Mapping[str, Tensor]) -> Read:
        """What the linears of a unit read, batch by batch, as often as it is called.

        Args:
            place: The unit.
            scales: Of the units searched so far.
        """
        return partial(
            rows_read_by,
            place.into[0],
            stream=self._job.stream,
            block=rounded_block(self._job, self._block, scales),
            index=self._index,
            batches=self._batches,
        )

    def outputs(self, scales: Mapping[str, Tensor]) -> list[Tensor]:
        """Per batch, the input of the next block, with the scales of all units."""
        block = rounded_block(self._job, self._block, scales)
        return self._job.stream.run_all(block, self._index, self._batches)


def _round_rows(
    _module: nn.Module, positional: tuple[Tensor, ...], *, bits: int
) -> tuple[Tensor, ...]:
    rows = positional[0]
    return (rounded_per_token(rows, bits=bits).to(rows.dtype), *positional[1:])
