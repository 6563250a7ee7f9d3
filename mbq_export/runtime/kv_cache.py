"""Keys and values of the tokens seen so far, fed to the decoder and taken back after every call.

    concat   past (1, H, P, D) + T new tokens  ──►  present (1, H, P + T, D)   grows
    static   past (1, H, C, D), write at P     ──►  present (1, H, C, D)       C slots from the start
    kept     embeddings, positions, sequence   ──►  logits                     inside the decoder

Which of them a decoder wants is read off its inputs: only static ones take indices to write at, and one that
keeps its cache takes nothing but embeddings, positions and the number of the sequence they continue. All give the same logits (EXPORT.md 4.3). Keys are
stored after their rotation.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from mbq_export.backends.base import Engine, TensorSpec
from mbq_export.errors import FormatError, UsageError

FIRST_INPUTS: Final = 3
KEPT_INPUTS: Final = 3
"""Embeddings, positions and the sequence's number are all that a decoder takes which keeps its cache."""
CACHE_RANK: Final = 4
SEQUENCES: Final = itertools.count(1)
"""Numbers of sequences, so that a decoder that keeps its cache never continues one with another's tokens."""


@dataclass(frozen=True, kw_only=True)
class DecoderPorts:
    """A decoder's inputs and outputs, told apart by their order, which every decoder keeps (EXPORT.md 3.2).

        inputs    embeddings, mask, positions, [write indices,] key 0, value 0, key 1, ...
        outputs   logits, key 0, value 0, key 1, ...

    Attributes:
        embeds: (1, T, hidden) embeddings of the new tokens.
        mask: (1, positions) int64, 1 where a key exists; None if the decoder keeps its cache.
        positions: (1, T) int64.
        write_indices: (1,) int64, the first free slot; None in concat mode.
        sequence: (1,) int64, which sequence the tokens continue; None if the cache is fed.
        past: Cache inputs; none if the decoder keeps its cache.
        logits: (1, T or 1, V).
        present: Cache outputs, in the order of ``past``.
    """

    embeds: TensorSpec
    mask: TensorSpec | None
    positions: TensorSpec
    write_indices: TensorSpec | None
    sequence: TensorSpec | None
    past: tuple[TensorSpec, ...]
    logits: TensorSpec
    present: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, decoder: Engine) -> Self:
        """Sort a decoder's ports.

        Raises:
            FormatError: E4413 if they are not a decoder's.
        """
        inputs, outputs = decoder.inputs, decoder.outputs
        if (len(inputs), len(outputs)) == (KEPT_INPUTS, 1) and inputs[-1].shape == (1,):
            return cls(
                embeds=inputs[0],
                mask=None,
                positions=inputs[1],
                write_indices=None,
                sequence=inputs[2],
                past=(),
                logits=outputs[0],
                present=(),
            )
        indices = [spec for spec in inputs[FIRST_INPUTS:] if len(spec.shape) == 1]
        past = inputs[FIRST_INPUTS + len(indices) :]
        caches = (*past, *outputs[1:])
        if (
            not past
            or len(indices) > 1
            or len(past) != len(outputs) - 1
            or any(not _is_cache(spec, static=bool(indices)) for spec in caches)
        ):
            raise FormatError(
                "E4413",
                "A decoder graph has other inputs or outputs than decoders have.",
                why=f"found {_names(inputs)} to {_names(outputs)}; a decoder takes embeddings, mask, "
                "positions and one cache tensor per key and value, and returns logits and the caches",
                fix="export the model again",
            )
        embeds, mask, positions = inputs[:FIRST_INPUTS]
        return cls(
            embeds=embeds,
            mask=mask,
            positions=positions,
            write_indices=indices[0] if indices else None,
            sequence=None,
            past=past,
            logits=outputs[0],
            present=outputs[1:],
        )


@dataclass(kw_only=True)
class KvCache:
    """The cache of one sequence, batch 1.

    Attributes:
        ports: The decoder it belongs to.
        limit: Positions the model may use in all.
        length: Positions filled so far, P.
        tensors: One per cache input, (1, H, P, D) or (1, H, C, D).
        number: Of the sequence.
    """

    ports: DecoderPorts
    limit: int
    length: int = 0
    tensors: tuple[NDArray[Any], ...] = field(default=())
    number: int = field(default_factory=SEQUENCES.__next__)

    def __post_init__(self) -> None:
        """Make the tensors of an empty cache; a static one cannot hold more than its slots."""
        self.tensors = tuple(
            np.zeros((1, *(0 if isinstance(n, str) else n for n in spec.shape[1:])), spec.dtype)
            for spec in self.ports.past
        )
        if self.static:
            self.limit = min(self.limit, self.slots)

    @property
    def static(self) -> bool:
        """Whether the cache has all its slots from the start."""
        return self.ports.write_indices is not None

    @property
    def slots(self) -> int:
        """Positions the tensors have room for."""
        return int(self.tensors[0].shape[2]) if self.tensors else self.limit

    def feeds(self, embeds: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Return everything a call over new tokens takes.

        Args:
            embeds: (1, T, hidden) embeddings of the new tokens.

        Raises:
            UsageError: E2009 if there are not T positions left.
        """
        end = self.length + embeds.shape[1]
        self.check(end)
        feeds = {
            self.ports.embeds.name: embeds,
            self.ports.positions.name: np.arange(self.length, end, dtype=np.int64)[None],
        }
        if self.ports.mask is not None:
            mask = np.zeros((1, self.slots if self.static else end), np.int64)
            mask[:, :end] = 1
            feeds[self.ports.mask.name] = mask
        if self.ports.write_indices is not None:
            feeds[self.ports.write_indices.name] = np.array([self.length], np.int64)
        if self.ports.sequence is not None:
            feeds[self.ports.sequence.name] = np.array([self.number], np.int64)
        for spec, tensor in zip(self.ports.past, self.tensors, strict=True):
            feeds[spec.name] = tensor
        return feeds

    def take(self, outputs: dict[str, NDArray[Any]], count: int) -> None:
        """Keep what a call over ``count`` new tokens returned."""
        self.tensors = tuple(outputs[spec.name] for spec in self.ports.present)
        self.length += count

    def check(self, need: int) -> None:
        """Refuse more positions than the model has.

        Raises:
            UsageError: E2009, naming the limit and the need.
        """
        if need > self.limit:
            raise UsageError(
                "E2009",
                f"The request needs {need} positions, the bundle allows {self.limit}.",
                why="prompt, visual tokens and new tokens share the context",
                fix=(
                    "lower --max-new-tokens, shorten the prompt or give fewer pictures",
                    f"mbq-export build --max-context {need}, if the model was trained for it",
                ),
                context={"limit": self.limit, "need": need},
            )

    @property
    def filled_bytes(self) -> int:
        """Bytes of the filled positions: what attention to all of them reads."""
        return sum(tensor.nbytes for tensor in self.tensors) * self.length // max(self.slots, 1)


def _is_cache(spec: TensorSpec, *, static: bool) -> bool:
    """Whether a port is (batch, heads, positions, width); a static cache knows its positions."""
    if len(spec.shape) != CACHE_RANK:
        return False
    _, heads, slots, width = spec.shape
    return isinstance(heads, int) and isinstance(width, int) and isinstance(slots, int) is static


def _names(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(spec.name for spec in specs)
