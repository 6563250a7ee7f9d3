"""Gram matrices are the sums that their definition says, however they are stored and cut."""

import pytest
import torch
from torch import Tensor

from mbq_export.blocks.gram import SPLIT_COLUMNS, Gram, GroupGram
from mbq_export.blocks.loss import ClassWeights
from mbq_export.blocks.ratios import ALIKE
from mbq_export.families.base import ANSWER, PAD, PROMPT, VISION

SUMS_RELATIVE = 1e-6
"""Sums of some hundred float32 products against float64 (METHODS, golden G5)."""

WEIGHINGS = {"plain": ALIKE, "q": ClassWeights(vision=0.25, prompt=3.0)}


def random_rows(seed: int, tokens: int = 300, columns: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, columns, generator=generator)
    wanted = rows + 0.1 * torch.randn(tokens, columns, generator=generator)
    classes = torch.randint(0, 4, (tokens,), generator=generator, dtype=torch.int8)
    return rows, classes, wanted


def weight_of(classes: Tensor, weights: ClassWeights) -> Tensor:
    by = {PAD: 0.0, ANSWER: 1.0, VISION: weights.vision, PROMPT: weights.prompt}
    return torch.tensor([by[int(kind)] for kind in classes], dtype=torch.float64)


def summed(*, split: bool | None = None, parts: int = 1, seed: int = 0) -> Gram:
    rows, classes, wanted = random_rows(seed)
    gram = Gram(rows.shape[1], WEIGHINGS, shifted=True, split=split)
    for part in torch.arange(len(rows)).chunk(parts):
        gram.add(rows[part], classes[part], wanted[part])
    return gram


def test_classes_weigh_as_they_are_told() -> None:
    """Golden G3: x_V = (1, 0), x_A = (0, 1), x_P = (1, 1) with c = (.5, 1, 2)."""
    rows = torch.tensor([[1.0, 0], [0, 1], [1, 1], [9, 9]])
    classes = torch.tensor([VISION, ANSWER, PROMPT, PAD], dtype=torch.int8)
    for split in (True, False):
        gram = Gram(2, {"plain": ALIKE, "own": ClassWeights(vision=0.5, prompt=2.0)}, split=split)
        gram.add(rows, classes)
        assert gram.hessian("own").tolist() == [[2.5, 2], [2, 3]]
        assert gram.hessian("plain").tolist() == [[2, 1], [1, 2]]


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_the_definition(seed: int, split: bool) -> None:
    rows, classes, wanted = random_rows(seed)
    gram = summed(split=split, seed=seed)
    for name, weights in WEIGHINGS.items():
        c = weight_of(classes, weights)[:, None]
        x, target = rows.double(), wanted.double()
        hessian, shift = x.T @ (c * x), (target - x).T @ (c * x)
        assert relative(gram.hessian(name), hessian) < SUMS_RELATIVE
        # Differences of nearly equal rows lose what they have in common.
        assert relative(gram.shift(name), shift) < 10 * SUMS_RELATIVE


def test_folded_sums_are_the_mix_of_split_ones() -> None:
    """Golden G5."""
    split, folded = summed(split=True), summed(split=False)
    for name in WEIGHINGS:
        assert relative(split.hessian(name), folded.hessian(name).double()) < SUMS_RELATIVE
        assert relative(split.shift(name), folded.shift(name).double()) < 10 * SUMS_RELATIVE


@pytest.mark.parametrize("parts", [2, 7, 300])
def test_how_tokens_are_cut_does_not_matter(parts: int) -> None:
    whole, cut = summed(), summed(parts=parts)
    for name in WEIGHINGS:
        assert relative(whole.hessian(name), cut.hessian(name).double()) < SUMS_RELATIVE


def test_batches_are_read_like_their_tokens() -> None:
    rows, classes, _ = random_rows(0)
    flat, shaped = Gram(24, WEIGHINGS), Gram(24, WEIGHINGS)
    flat.add(rows, classes)
    shaped.add(rows.reshape(3, 100, 24), classes.reshape(3, 100))
    for name in WEIGHINGS:
        assert torch.equal(flat.hessian(name), shaped.hessian(name))


def test_a_hessian_is_symmetric_to_the_bit() -> None:
    found = summed().hessian("q")
    assert torch.equal(found, found.T)


def test_weighed_squares_of_outputs_are_the_trace() -> None:
    """METHODS 16.1, golden C2: sum of c |E x|^2 = tr(E H E')."""
    rows, classes, _ = random_rows(5)
    change = torch.randn(6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    c = weight_of(classes, WEIGHINGS["q"])
    wanted = float((c * (rows.double() @ change.T).square().sum(1)).sum())
    hessian = summed(seed=5).hessian("q").double()
    assert float(((change @ hessian) * change).sum()) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("size", [1, 8, 24])
def test_diagonal_blocks_are_cut_out_of_the_whole(size: int) -> None:
    gram = summed()
    whole = gram.hessian("q")
    blocks = gram.diagonal_blocks("q", size)
    assert blocks.shape == (24 // size, size, size)
    for group, block in enumerate(blocks):
        span = slice(group * size, (group + 1) * size)
        assert torch.equal(block, whole[span, span])


@pytest.mark.parametrize("size", [1, 8, 24])
def test_sums_inside_groups_alone_are_those_of_the_definition(size: int) -> None:
    """However tokens are cut, and the same to the bit when mirrored."""
    rows, classes, _ = random_rows(6)
    gram = GroupGram(24, WEIGHINGS, group_size=size)
    for part in (slice(0, 120), slice(120, None)):
        gram.add(rows[None, part], classes[None, part])
    for name, weights in WEIGHINGS.items():
        x = rows.double()
        whole = x.T @ (weight_of(classes, weights)[:, None] * x)
        blocks = gram.diagonal_blocks(name)
        assert torch.equal(blocks, blocks.transpose(1, 2))
        for group, block in enumerate(blocks):
            span = slice(group * size, (group + 1) * size)
            assert relative(block, whole[span, span]) < SUMS_RELATIVE


def test_storage_is_decided_by_width_and_number_of_weighings() -> None:
    assert Gram(8, WEIGHINGS).split
    assert not Gram(8, {"plain": ALIKE}).split
    assert not Gram(SPLIT_COLUMNS + 8, WEIGHINGS).split


def test_memory_is_a_matrix_per_class_or_weighing() -> None:
    assert summed(split=True).bytes == 2 * 3 * 24 * 24 * 4
    assert summed(split=False).bytes == 2 * 2 * 24 * 24 * 4


def test_tokens_that_weigh_nothing_leave_zeros() -> None:
    gram = Gram(3, {"plain": ALIKE})
    assert not gram.hessian("plain").any()
    gram.add(torch.ones(2, 3), torch.full((2,), PAD, dtype=torch.int8))
    assert not gram.hessian("plain").any()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())
