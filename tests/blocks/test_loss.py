"""Objectives on differences small enough to add up by hand."""

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.loss import (
    ClassWeights,
    Loss,
    class_totals,
    coefficients,
    token_counts,
    token_errors,
)
from mbq_export.families.base import ANSWER, PAD, PROMPT, VISION
from tests.reference.published import balanced_mae, balanced_mse, unbalanced_mse

D = torch.tensor([[1.0, -1], [2, 0], [3, -1], [9, 9]])
CLASSES = torch.tensor([VISION, VISION, ANSWER, PROMPT], dtype=torch.int8)


def objective(
    difference: Tensor,
    classes: Tensor,
    *,
    loss: Loss,
    weights: ClassWeights | None,
    pads: bool = False,
) -> float:
    totals = class_totals(token_errors(difference, loss=loss), classes)
    weigh = coefficients(
        token_counts(classes), width=difference.shape[-1], loss=loss, weights=weights, pads=pads
    )
    return float(totals @ weigh)


def test_balanced_absolute_error_counts_vision_by_r() -> None:
    """(4 + 0.5 * 4) / ((1 + 2) * 2)"""
    assert objective(D, CLASSES, loss="mae", weights=ClassWeights(vision=0.5)) == 1.0


def test_balanced_squared_error_is_a_mean_per_class() -> None:
    """5 + 0.5 * 1.5"""
    assert objective(D, CLASSES, loss="mse", weights=ClassWeights(vision=0.5)) == 5.75


def test_prompt_tokens_count_once_they_have_a_weight() -> None:
    """(4 + 0.5 * 4 + 0.25 * 18) / ((1 + 2 + 1) * 2) and 5 + 0.75 + 0.25 * 81"""
    weights = ClassWeights(vision=0.5, prompt=0.25)
    assert objective(D, CLASSES, loss="mae", weights=weights) == 10.5 / 8
    assert objective(D, CLASSES, loss="mse", weights=weights) == 26.0


def test_without_weights_all_real_tokens_count_alike() -> None:
    assert objective(D, CLASSES, loss="mae", weights=None) == 26 / 8
    assert objective(D, CLASSES, loss="mse", weights=None) == (6 + 10 + 162) / 8


def test_vision_tokens_are_counted_at_r_zero_too() -> None:
    assert objective(D, CLASSES, loss="mae", weights=ClassWeights(vision=0.0)) == 4 / 6


@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize("weights", [None, ClassWeights(vision=0.5)], ids=["plain", "balanced"])
def test_padding_changes_nothing(loss: Loss, weights: ClassWeights | None) -> None:
    padded = torch.cat([D, torch.full((3, 2), 1e6)])
    classes = torch.cat([CLASSES, torch.full((3,), PAD, dtype=torch.int8)])
    assert objective(padded, classes, loss=loss, weights=weights) == objective(
        D, CLASSES, loss=loss, weights=weights
    )


def test_the_published_mean_counts_padding() -> None:
    padded = torch.cat([D, torch.full((1, 2), 4.0)])
    classes = torch.cat([CLASSES, torch.full((1,), PAD, dtype=torch.int8)])
    assert objective(padded, classes, loss="mse", weights=None, pads=True) == (178 + 32) / 10


@pytest.mark.parametrize("loss", ["mae", "mse"])
@pytest.mark.parametrize("size", range(1, 25))
def test_any_partition_of_the_tokens_gives_the_same(loss: Loss, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    difference = torch.randn(24, 16, generator=generator)
    classes = torch.randint(0, 4, (24,), generator=generator).to(torch.int8)
    weigh = coefficients(
        token_counts(classes), width=16, loss=loss, weights=ClassWeights(vision=0.3)
    )
    whole = class_totals(token_errors(difference, loss=loss), classes) @ weigh
    parts = sum(
        class_totals(token_errors(part, loss=loss), kinds)
        for part, kinds in zip(difference.split(size), classes.split(size), strict=True)
    )
    assert float(parts @ weigh) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("r", [0.0, 0.07, 1.0])
def test_objectives_are_the_published_ones(r: float) -> None:
    generator = torch.Generator().manual_seed(7)
    difference = torch.randn(40, 8, generator=generator)
    classes = torch.randint(1, 4, (40,), generator=generator).to(torch.int8)
    vision, answer = classes == VISION, classes == ANSWER
    weights = ClassWeights(vision=r)
    assert objective(difference, classes, loss="mae", weights=weights) == pytest.approx(
        balanced_mae(difference, vision, answer, r), rel=1e-6
    )
    assert objective(difference, classes, loss="mse", weights=weights) == pytest.approx(
        balanced_mse(difference, vision, answer, r), rel=1e-6
    )
    assert objective(difference, classes, loss="mse", weights=None) == pytest.approx(
        unbalanced_mse(difference), rel=1e-6
    )


def test_a_class_without_tokens_adds_nothing() -> None:
    answers = torch.full((4,), ANSWER, dtype=torch.int8)
    weights = ClassWeights(vision=0.5)
    assert objective(D, answers, loss="mse", weights=weights) == 178 / 8
    assert objective(D, answers, loss="mae", weights=weights) == 26 / 8


def test_half_precision_differences_are_summed_in_float32() -> None:
    difference = torch.full((1, 4096), 20.0, dtype=torch.float16)
    assert token_errors(difference, loss="mse").item() == 400 * 4096
