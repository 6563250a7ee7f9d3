"""Hidden rows on their way through the decoder: as the model computes them, and as quantized blocks leave them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mbq_export.schemes.affine import dequantize, rounded_per_token

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mbq_export.blocks.stream import Batch, BlockStream
    from mbq_export.families.inputs import ModelInputs
    from mbq_export.schemes.affine import Codes
    from mbq_export.schemes.base import QuantScheme

Pairs = list[tuple["Batch", Tensor]]
"""Batches, each with the rows that enter a block."""


@dataclass(kw_only=True)
class Streams:
    """Rows of one set of samples between two blocks, in float32.

    Attributes:
        batches: Samples that run together, without rows of their own.
        exact: (B, T, hidden) per batch as the full-precision model has them; None where nobody reads them.
        moved: The same as quantized blocks leave them; None likewise.
    """

    batches: tuple[Batch, ...]
    exact: list[Tensor] | None
    moved: list[Tensor] | None

    @classmethod
    def begin(
        cls, stream: BlockStream, inputs: Sequence[ModelInputs], *, exact: bool, moved: bool
    ) -> Streams:
        """Embed samples; before the first block both streams are equal."""
        found = stream.begin(inputs)
        rows = [batch.hidden.float() for batch in found]
        batches = tuple(
            replace(
                batch,
                hidden=batch.hidden.new_empty(0),
                arguments=tuple(_widened(arguments) for arguments in batch.arguments),
            )
            for batch in found
        )
        return cls(
            batches=batches,
            exact=list(rows) if exact else None,
            moved=list(rows) if moved else None,
        )

    @property
    def before(self) -> Pairs:
        """What full precision feeds the next block."""
        assert self.exact is not None  # whoever reads it asked for it
        return list(zip(self.batches, self.exact, strict=True))

    @property
    def after(self) -> Pairs:
        """What quantized blocks feed the next one; what full precision does where those rows are not kept."""
        return (
            self.before if self.moved is None else list(zip(self.batches, self.moved, strict=True))
        )

    def advance(
        self, stream: BlockStream, index: int, *, folded: nn.Module, rounded: nn.Module
    ) -> None:
        """Run both streams through a block, each through its own form of it."""
        for rows, block in ((self.exact, folded), (self.moved, rounded)):
            if rows is not None:
                for place, batch in enumerate(self.batches):
                    with torch.no_grad():
                        rows[place] = stream.run(block, index, batch, rows[place])


def with_codes(
    block: nn.Module, codes: Mapping[str, Codes], *, scheme: QuantScheme, into: bool = False
) -> nn.Module:
    """A block whose linears compute as the stored codes do; the others stay exact.

    Args:
        block: With folded scales, in float32.
        codes: By linear, relative to the block.
        scheme: Says whether their inputs are rounded too.
        into: Change `block` itself instead of a copy.
    """
    found = block if into else copy.deepcopy(block)
    for linear, rounded in codes.items():
        module = found.get_submodule(linear)
        with torch.no_grad():
            module.get_parameter("weight").copy_(dequantize(rounded))
        if scheme.rounds_activations:
            module.register_forward_pre_hook(partial(_round_rows, bits=scheme.act_bits))
    return found


def rows_multiplied(rows: Tensor, scheme: QuantScheme) -> Tensor:
    """What a kernel multiplies weights with, and errors are weighed by: rows rounded per token if the scheme does."""
    return rounded_per_token(rows, bits=scheme.act_bits) if scheme.rounds_activations else rows


def _round_rows(
    _module: nn.Module, positional: tuple[Tensor, ...], *, bits: int
) -> tuple[Tensor, ...]:
    return (rounded_per_token(positional[0], bits=bits), *positional[1:])


def _widened(value: Any) -> Any:
    """Arguments of a block with floating tensors in float32: masks and rotary tables of a half-precision model."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _widened(inner) for name, inner in value.items()}
    return tuple(map(_widened, value)) if isinstance(value, tuple) else value
