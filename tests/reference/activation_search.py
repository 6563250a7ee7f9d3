"""The search for schemes that round activations, one candidate at a time (METHODS 7, 2.2, 2.3).

The unit's own linears hold Q(W diag(e)), which is not divided back, and read x / e rounded per token; every other linear
stays exact. Weights are put into the block and taken out again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mbq_export.blocks.stream import Batch, BlockStream
from mbq_export.families.base import ANSWER, VISION
from tests.reference import published
from tests.reference.moved_rows import UNITS, noted


def rounded_weight(weight: Tensor, *, bits: int, group_size: int) -> Tensor:
    """Symmetric codes: a float32 scale per row, or an fp16 one per group."""
    largest = 2 ** (bits - 1) - 1
    groups = weight.reshape(len(weight), -1, group_size or weight.shape[1])
    absmax = groups.abs().amax(-1, keepdim=True)
    if group_size:
        step = (absmax / largest).clamp(min=2**-14).half().float()
    else:
        step = absmax.clamp(min=1e-5) / largest
    return (torch.round(groups / step).clamp(-largest - 1, largest) * step).reshape(weight.shape)


def rounded_rows(rows: Tensor) -> Tensor:
    """Each row as 8-bit integers times its own scale."""
    step = rows.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
    return torch.round(rows / step).clamp(-128, 127) * step


@torch.no_grad()
def search(
    stream: BlockStream,
    batches: Sequence[Batch],
    unit: str,
    scales: Sequence[Tensor],
    *,
    bits: int,
    group_size: int,
    loss: str,
    r: float,
) -> list[float]:
    """Loss of every scale for a unit of the first block."""
    names, reads, _, _ = UNITS[unit]
    classes = torch.cat([batch.classes.flatten() for batch in batches])
    form = published.balanced_mae if loss == "mae" else published.balanced_mse
    with stream.block(0) as block:
        seen = noted(stream, block, 0, reads, [(batch, batch.hidden) for batch in batches])
        owner = block.get_submodule(reads.split(".", maxsplit=1)[0])
        linears = [owner.get_submodule(name) for name in names]
        curve = []
        for e in scales:
            originals = [linear.weight.clone() for linear in linears]
            handles = [linear.register_forward_pre_hook(divided_by(e)) for linear in linears]
            for linear in linears:
                new = rounded_weight(linear.weight * e, bits=bits, group_size=group_size)
                linear.weight.copy_(new)
            change = []
            for args, named, before in seen:
                after = block.get_submodule(reads)(*args, **named)
                pair = [x[0] if isinstance(x, tuple) else x for x in (before, after)]
                change.append((pair[0] - pair[1]).flatten(0, 1))
            for linear, original, handle in zip(linears, originals, handles, strict=True):
                linear.weight.copy_(original)
                handle.remove()
            curve.append(form(torch.cat(change), classes == VISION, classes == ANSWER, r))
    return curve


def divided_by(e: Tensor) -> object:
    """What stands before a linear: x / e, rounded per token."""

    def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded_rows(args[0] / e),)

    return before
