"""Between a person and the graphs: pictures and text to feeds, image features to embedding rows.

ids ──► embed_tokens ──► (T, hidden) ──┐
tiles ──► vision_encoder ──► features ─┴─► rows at image tokens replaced ──► decoder
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mbq_export.errors import FormatError
from mbq_export.families.base import Config, ModelFamily
from mbq_export.families.inputs import ModelInputs
from mbq_export.families.pictures import read_picture
from mbq_export.tensor_file import BFLOAT16


def open_pictures(paths: tuple[Path, ...] | list[Path]) -> list[Image.Image]:
    """Decode pictures exactly as calibration does.

    Raises:
        FormatError: E4304 for one that is missing or cannot be decoded, E4306 for one that is too large.
    """
    return [read_picture(path) for path in paths]


@dataclass(frozen=True, kw_only=True)
class HostMerge:
    """Puts image features where the prompt has image tokens.

    Attributes:
        family: Whose rule packs features.
        config: The model's config.
        newline: (hidden,), the learned end of an image row.
        image_token_id: Id of the token that stands for one row.
    """

    family: ModelFamily
    config: Config
    newline: NDArray[Any]
    image_token_id: int

    def __call__(
        self, embeds: NDArray[Any], features: NDArray[Any], inputs: ModelInputs
    ) -> NDArray[Any]:
        """Merge.

        Args:
            embeds: (T, hidden) embeddings of the prompt.
            features: (tiles, tokens per tile, hidden).
            inputs: The request.

        Returns:
            (T, hidden) in the dtype of `embeds`.

        Raises:
            FormatError: E4204 if image tokens and rows differ in number.
        """
        # Pictures are shrunk with float arithmetic, which numpy does not define for bfloat16 throughout.
        wide = features.astype(np.float32) if features.dtype == BFLOAT16 else features
        rows = self.family.merge_images(
            wide,
            image_sizes=inputs.image_sizes,
            tiles_per_image=inputs.tiles_per_image,
            newline=self.newline,
            config=self.config,
        )
        return replace_rows(embeds, inputs.input_ids, self.image_token_id, rows)


def replace_rows(
    embeds: NDArray[Any], ids: NDArray[np.int64], image_token_id: int, features: NDArray[Any]
) -> NDArray[Any]:
    """Replace the rows at image tokens, in order; the graph set's record calls this ``replace_rows``.

    Args:
        embeds: (T, hidden).
        ids: (T,).
        image_token_id: Which positions.
        features: (image tokens, hidden).

    Returns:
        (T, hidden), a copy in the dtype of `embeds`.

    Raises:
        FormatError: E4204 if the numbers differ.
    """
    places = ids == image_token_id
    if int(places.sum()) != len(features):
        raise FormatError(
            "E4204",
            f"{int(places.sum())} image tokens meet {len(features)} rows of image features.",
            why="each image token stands for one row",
            fix="use the processor files that belong to the model",
        )
    merged = embeds.copy()
    merged[places] = features.astype(embeds.dtype)
    return merged
