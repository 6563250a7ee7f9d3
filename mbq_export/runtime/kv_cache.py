"""Keys and values of the tokens seen so far, fed to the decoder and taken back after every call.

    concat   past (1, H, P, D)  + T new   ──►  present (1, H, P + T, D)      grows; what ONNX Runtime reads
    static   past (1, H, C, D), write at P ──► present (1, H, C, D)          C slots from the start

Which of the two a graph wants is read off its inputs: only static graphs have ``write_indices``. Both give
the same logits (EXPORT.md 4.3); keys are stored after the rotation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from mbq_export.backends.base import TensorSpec
from mbq_export.errors import FormatError, UsageError

PAST: Final = "past_key_values."
PRESENT: Final = "present."
WRITE_INDICES: Final = "write_indices"
MASK: Final = "attention_mask"
POSITIONS: Final = "position_ids"
EMBEDS: Final = "inputs_embeds"
LOGITS: Final = "logits"


@dataclass(kw_only=True)
class KvCache:
    """The cache of one sequence, batch 1.

    Attributes:
        tensors: Input name -> (1, H, P, D) or (1, H, capacity, D).
        capacity: Slots of a static cache; None if the cache grows.
        limit: Positions the model may use in all.
        length: Positions filled so far, P.
    """

    tensors: dict[str, NDArray[Any]]
    capacity: int | None
    limit: int
    length: int = field(default=0)

    @classmethod
    def empty(cls, inputs: Sequence[TensorSpec], *, limit: int) -> Self:
        """Make an empty cache for a decoder.

        Args:
            inputs: The decoder's inputs.
            limit: Positions the model may use in all; a static cache lowers it to its slots.

        Raises:
            FormatError: E4409 if the graph has no cache, or its sizes are not those of one.
        """
        caches = [spec for spec in inputs if spec.name.startswith(PAST)]
        static = any(spec.name == WRITE_INDICES for spec in inputs)
        if not caches:
            raise _no_cache(f"has inputs {', '.join(spec.name for spec in inputs)}")
        tensors = {}
        capacity = None
        for spec in caches:
            heads, slots, width = (*spec.shape, 0, 0, 0, 0)[1:4]
            if len(spec.shape) != 4 or isinstance(heads, str) or isinstance(width, str):
                raise _no_cache(f"has {spec.name} of shape {list(spec.shape)}")
            if static:
                if isinstance(slots, str):
                    raise _no_cache(f"writes into {spec.name}, whose slots are {slots!r}")
                capacity = slots
            tensors[spec.name] = np.zeros((1, heads, capacity or 0, width), spec.dtype)
        return cls(tensors=tensors, capacity=capacity, limit=min(limit, capacity or limit))

    def feeds(self, count: int) -> dict[str, NDArray[Any]]:
        """Return everything a call over ``count`` new tokens needs beside their embeddings.

        Raises:
            UsageError: E2009 if they do not fit.
        """
        self.check(count)
        end = self.length + count
        mask = np.zeros((1, self.capacity or end), np.int64)
        mask[:, :end] = 1
        feeds = {
            MASK: mask,
            POSITIONS: np.arange(self.length, end, dtype=np.int64)[None],
            **self.tensors,
        }
        if self.capacity is not None:
            feeds[WRITE_INDICES] = np.array([self.length], np.int64)
        return feeds

    def take(self, outputs: Mapping[str, NDArray[Any]], count: int) -> None:
        """Keep what a call over ``count`` new tokens returned."""
        for name in self.tensors:
            self.tensors[name] = outputs[PRESENT + name.removeprefix(PAST)]
        self.length += count

    def check(self, count: int) -> None:
        """Refuse more tokens than the model has positions for.

        Raises:
            UsageError: E2009, naming the limit and the need.
        """
        need = self.length + count
        if need > self.limit:
            raise UsageError(
                "E2009",
                f"{need} positions are needed, the bundle allows {self.limit}.",
                why="prompt, visual tokens and new tokens share the context",
                fix=(
                    "use a lower --max-new-tokens, fewer images or a shorter prompt",
                    f"mbq-export build --max-context {need}, if the model was trained for it",
                ),
                context={"limit": self.limit, "need": need},
            )

    @property
    def nbytes(self) -> int:
        """Bytes that a call over one new token reads: the filled part only."""
        total = sum(tensor.nbytes for tensor in self.tensors.values())
        return total if self.capacity is None else total * self.length // self.capacity


def _no_cache(found: str) -> FormatError:
    return FormatError(
        "E4409",
        f"The decoder graph {found}.",
        why=f"a decoder has inputs {PAST}N.key and .value of shape [batch, heads, past, width]",
        fix="export the model again",
    )
