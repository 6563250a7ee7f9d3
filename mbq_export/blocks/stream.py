"""The decoder one block at a time: load, run, free.

    inputs ──► embeddings ──► begin: batches of equal length, with the arguments each block is called with
                                 │
               block 0 ──► run ──► hidden (B, T, hidden) ──► block 1 ──► ...

Only one block's weights are in memory when the model was loaded with ``meta_blocks``. Samples of equal
length run together, so nothing is ever padded.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from mbq_export.blocks.room import Room
from mbq_export.blocks.tokens import embed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs

BATCH_TOKENS: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one length that run together.

    Attributes:
        samples: Their positions in the list of inputs.
        ids: (B, T) int64.
        classes: (B, T) int8, constants of `families.base`.
        hidden: (B, T, hidden), input of block 0.
        arguments: Per block, the keyword arguments that the model calls it with: rotary tables, masks.
    """

    samples: tuple[int, ...]
    ids: Tensor
    classes: Tensor
    hidden: Tensor
    arguments: tuple[Mapping[str, Any], ...]


class BlockStream:
    """Access to the decoder blocks of a model, and to what flows between them."""

    def __init__(self, model: LoadedModel, room: Room | None = None) -> None:
        """Keep the model; nothing is loaded yet.

        Args:
            model: Its blocks may be on the meta device.
            room: Where rows wait that a later pass reads; memory unless it says otherwise.
        """
        self._model = model
        self.room = room or Room()
        self._parent, _, self._attribute = model.family.blocks.rpartition(".")

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    @property
    def _blocks(self) -> nn.ModuleList:
        found = self._model.module.get_submodule(self._model.family.blocks)
        assert isinstance(found, nn.ModuleList)  # the family's path was checked when it loaded
        return found

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Yield a private copy of a block, free to change, with weights in the model's dtype.

        A block on the meta device is filled from the model's files. The copy is gone afterwards.

        Raises:
            FormatError: E41xx if the files changed or are damaged.
        """
        block = copy.deepcopy(self._blocks[index])
        path = f"{self._model.family.blocks}.{index}"
        if any(parameter.is_meta for parameter in block.parameters()):
            read = self._model.weights.read
            filled = {
                name: read(f"{path}.{name}", dtype=parameter.dtype)
                for name, parameter in block.named_parameters()
            }
            block.load_state_dict(filled, strict=True, assign=True)
            block.requires_grad_(requires_grad=False)
        yield block.eval()

    @torch.no_grad()
    def begin(
        self, inputs: Sequence[ModelInputs], *, batch_tokens: int = BATCH_TOKENS
    ) -> tuple[Batch, ...]:
        """Embed the samples and note how the model would call its blocks on them.

        Args:
            inputs: Samples; the order inside a batch and of the batches depends on them alone.
            batch_tokens: Most tokens in a batch, unless one sample has more.

        Raises:
            FormatError: E4204 if image tokens and features differ in number.
        """
        vision = self._model.family.vision_module(self._model)
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for position, sample in enumerate(inputs):
            by_length[len(sample.input_ids)].append(position)
        batches = []
        for length, positions in sorted(by_length.items()):
            size = max(1, batch_tokens // length)
            for start in range(0, len(positions), size):
                members = tuple(positions[start : start + size])
                hidden = torch.stack(
                    [embed(self._model, inputs[p], vision=vision) for p in members]
                )
                batches.append(
                    Batch(
                        samples=members,
                        ids=torch.stack([torch.from_numpy(inputs[p].input_ids) for p in members]),
                        classes=torch.stack(
                            [torch.from_numpy(inputs[p].token_classes) for p in members]
                        ),
                        hidden=hidden,
                        arguments=self._arguments(hidden),
                    )
                )
        return tuple(batches)

    def run(self, block: nn.Module, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """Run a block on a batch.

        Args:
            block: What `block` yielded for `index`, possibly changed.
            index: Its position.
            batch: Gives the arguments.
            hidden: (B, T, hidden) input.

        Returns:
            (B, T, hidden).
        """
        output = block(hidden, **batch.arguments[index])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @torch.no_grad()
    def run_all(
        self, block: nn.Module, index: int, batches: Sequence[tuple[Batch, Tensor]]
    ) -> list[Tensor]:
        """Run a block on batches with their inputs, without gradients; return the outputs."""
        return [self.run(block, index, batch, hidden) for batch, hidden in batches]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head: (..., hidden) output of the last block to (..., vocab)."""
        family, module = self._model.family, self._model.module
        normed = module.get_submodule(family.final_norm)(hidden)
        result: Tensor = module.get_submodule(family.head)(normed)
        return result

    def _arguments(self, hidden: Tensor) -> tuple[Mapping[str, Any], ...]:
        """Let the model prepare masks and positions itself, with blocks that only listen."""
        decoder = self._model.module.get_submodule(self._parent)
        real = self._blocks
        listeners = [_Listener() for _ in real]
        setattr(decoder, self._attribute, nn.ModuleList(listeners))
        try:
            decoder(inputs_embeds=hidden, use_cache=False)
        finally:
            setattr(decoder, self._attribute, real)
        return tuple(listener.heard for listener in listeners)


class _Listener(nn.Module):
    """Stands where a block stands, keeps the arguments, passes the rows on."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, Any] = {}

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        self.heard = arguments
        return hidden
