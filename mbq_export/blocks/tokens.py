"""Tokens by class, and the rows that a decoder sees: embeddings with image features in their places."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mbq_export.errors import FormatError
from mbq_export.families.base import TOKEN_CLASSES, VISION

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from mbq_export.families.base import LoadedModel
    from mbq_export.families.inputs import ModelInputs


def class_mask(classes: Tensor) -> Tensor:
    """One row per token class.

    Args:
        classes: (...) int8 of the constants in `families.base`.

    Returns:
        (classes, ...) float64, 1 where a token is of that class; the rows add up to 1.
    """
    kinds = torch.arange(len(TOKEN_CLASSES), dtype=classes.dtype)
    return (classes[None] == kinds.reshape(-1, *[1] * classes.dim())).double()


def count_classes(inputs: Iterable[ModelInputs]) -> dict[str, int]:
    """Tokens per class over all samples, padding left out."""
    counts = {name: 0 for kind, name in TOKEN_CLASSES.items() if kind}
    for sample in inputs:
        for kind, name in TOKEN_CLASSES.items():
            if kind:
                counts[name] += int((sample.token_classes == kind).sum())
    return counts


def hash_inputs(inputs: Iterable[ModelInputs]) -> str:
    """Identity of the samples as the model sees them."""
    digest = hashlib.sha256()
    for sample in inputs:
        for array in (
            sample.input_ids,
            sample.token_classes,
            sample.image_sizes,
            sample.pixel_values,
        ):
            digest.update(str((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@torch.no_grad()
def embed(model: LoadedModel, inputs: ModelInputs, *, vision: nn.Module) -> Tensor:
    """Build the decoder's input rows of one sample.

    Args:
        model: Gives the embedding, the learned newline and the packing of tiles.
        inputs: One sample.
        vision: The family's `vision_module` of the model.

    Returns:
        (T, hidden) in the model's dtype.

    Raises:
        FormatError: E4204 if image tokens and rows of image features differ in number.
    """
    rows: Tensor = model.module.get_submodule(model.family.embed)(
        torch.from_numpy(inputs.input_ids)
    )
    places = torch.from_numpy(inputs.token_classes == VISION)
    if not len(inputs.pixel_values) and not bool(places.any()):
        return rows
    tiles = vision(torch.from_numpy(inputs.pixel_values).to(rows.dtype))
    features = model.family.merge_images(
        tiles.float().numpy(),
        image_sizes=inputs.image_sizes,
        tiles_per_image=inputs.tiles_per_image,
        newline=model.module.get_parameter(model.family.newline).float().numpy(),
        config=model.config,
    )
    if len(features) != int(places.sum()):
        raise FormatError(
            "E4204",
            f"{int(places.sum())} image tokens meet {len(features)} rows of image features.",
            why="each image token stands for one row",
            fix="use the processor files that belong to the model",
        )
    rows = rows.clone()
    rows[places] = torch.from_numpy(features).to(rows.dtype)
    return rows
