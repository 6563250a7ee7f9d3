"""Text and pictures to the tensors a model takes, without torchvision.

The model's own chat template, tokenizer and picture settings are used as they lie in its folder; the
only thing done here is to expand each picture's placeholder to as many tokens as it has feature rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from mbq_export.families.base import ModelFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInputs:
    """One sample, ready for a model.

    Attributes:
        input_ids: (T,), image tokens expanded; with an answer, its end-of-turn token is the last.
        pixel_values: (tiles, 3, h, w) float32, the tiles of all pictures one after the other;
            (0, 3, h, w) without pictures.
        image_sizes: (I, 2), height and width of each picture before any resizing.
        tiles_per_image: (I,).
        token_classes: (T,), constants of `families.base`.
    """

    input_ids: NDArray[np.int64]
    pixel_values: NDArray[np.float32]
    image_sizes: NDArray[np.int64]
    tiles_per_image: NDArray[np.int64]
    token_classes: NDArray[np.int8]


class Processor:
    """Tokenizer, picture processor and chat template of one model folder."""

    @classmethod
    def from_folder(cls, folder: Path, family: ModelFamily) -> Processor:
        """Read tokenizer and picture settings."""
        raise NotImplementedError

    @property
    def image_token_id(self) -> int:
        """Id of the token that stands for one row of image features."""
        raise NotImplementedError

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a turn: those of generation_config.json, the config and the tokenizer."""
        raise NotImplementedError

    def inputs(
        self, prompt: str, images: Sequence[Image] = (), answer: str | None = None
    ) -> ModelInputs:
        """Build the inputs of one turn.

        Args:
            prompt: The user's text; special tokens in it are plain text.
            images: Pictures, before the text.
            answer: Teacher-forced answer; None ends with the generation prompt.
        """
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens left out."""
        raise NotImplementedError
