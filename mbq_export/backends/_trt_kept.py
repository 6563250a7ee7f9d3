"""A decoder engine that keeps its cache: what a run is fed, and what may be run next.

    static    mask over all slots, filled ones 1         tokens written at ``write_indices``
    grows     mask 0 1 1 .. 1, one per position          past of one position more than there are tokens

TensorRT wants sizes of at least 1, so a cache that grows begins with a position that nobody sees.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from mbq_export.backends._trt_job import Refused

if TYPE_CHECKING:
    from mbq_export.backends._trt_session import LoadedEngine

MASK, POSITIONS, WRITE, SEQUENCE = "attention_mask", "position_ids", "write_indices", "sequence"
HIDDEN_POSITIONS: Final = 1
"""At the beginning of a cache that grows."""


@dataclass(kw_only=True)
class KeptDecoder:
    """Embeddings, positions and a sequence's number in, logits out.

    Attributes:
        engine: The engine.
        slots: Positions of the cache.
        chunk: Most tokens of one run.
        logits: Name of the output.
        width: Columns of the logits.
        sequence: Number of the sequence in the cache; 0 at first.
        length: Positions of it that are filled.
    """

    engine: "LoadedEngine"
    slots: int
    chunk: int
    logits: str
    width: int
    sequence: int = 0
    length: int = 0

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run (1, T, hidden) new tokens, in parts if they are more than one run takes.

        Returns:
            (1, 1, V) logits of the last position.

        Raises:
            Refused: ``trt-run`` for positions beyond the cache, which TensorRT would drop without a word, and for
                ones that do not continue what is in it.
        """
        embeds, positions = feeds["inputs_embeds"], feeds[POSITIONS]
        number = int(feeds[SEQUENCE][0])
        if number != self.sequence:
            self.engine.forget()
            self.sequence, self.length = number, 0
        first, count = int(positions[0, 0]), embeds.shape[1]
        if first != self.length:
            raise Refused(
                "trt-run", f"Position {first} does not continue {self.length} in the cache."
            )
        if first + count > self.slots:
            raise Refused("trt-run", f"Position {first + count} is beyond {self.slots} slots.")
        outputs: dict[str, NDArray[Any]] = {}
        for start in range(0, count, self.chunk):
            part = slice(start, min(start + self.chunk, count))
            at = first + part.start
            outputs = self.engine.run(
                {
                    "inputs_embeds": embeds[:, part],
                    POSITIONS: positions[:, part],
                    **self._cache_feeds(at, at + part.stop - part.start),
                },
                {self.logits: (1, 1, self.width)},
                past=at + HIDDEN_POSITIONS,
            )
        self.length = first + count
        return outputs

    def _cache_feeds(self, at: int, end: int) -> dict[str, NDArray[Any]]:
        """Which positions are there, and where the new ones go."""
        if self.engine.grows:
            mask = np.ones((1, HIDDEN_POSITIONS + end), np.int64)
            mask[:, :HIDDEN_POSITIONS] = 0
            return {MASK: mask}
        mask = np.zeros((1, self.slots), np.int64)
        mask[:, :end] = 1
        return {MASK: mask, WRITE: np.array([at], np.int64)}
