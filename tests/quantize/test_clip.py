"""Clipping against what every token's output loses, and what must hold for any weight and any inputs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mbq_export.errors import FormatError
from mbq_export.quantize.clip import (
    SHRINKS,
    ClippedGrids,
    best_shrinks,
    clip_facts,
    round_clipped,
)
from mbq_export.quantize.gptq import factorise, feed_back, round_linear, weighted_square
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import dequantize, quantize
from mbq_export.schemes.base import CHANNEL
from tests.reference import clip as reference
from tests.reference import feedback as textbook
from tests.reference.feedback import Format

FORMATS = [
    (name, size)
    for name in ("w3a16", "w4a16", "w4a8", "w8a8", "w4a4")
    for size in SCHEMES[name].group_sizes
]
TWO_BITS = replace(SCHEMES["w3a16"], name="two", weight_bits=2)
OF_STORED_SCALES = 2e-3
"""Relative; the worked example has scales in float32, a grid has them in fp16: 2**-11 of each weight."""
TOKEN_FORM = 1e-5


def inputs(seed: int, columns: int, *, tokens: int = 40) -> tuple[Tensor, Tensor]:
    """Correlated inputs of unlike channels in float64, and a weight per token."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, columns, generator=generator).double()
    rows = rows @ torch.randn(columns, columns, generator=generator).double()
    rows *= torch.logspace(-1, 1, columns, dtype=torch.float64)[
        torch.randperm(columns, generator=generator)
    ]
    return rows, torch.tensor([0.0, 0.3, 1.0, 4.0])[torch.arange(tokens) % 4]


def weight_of(seed: int, rows: int, columns: int) -> Tensor:
    """Heavy tails, which are what there is to clip."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(rows, columns, generator=generator) ** 3


def kind_of(scheme: str, group_size: int) -> Format:
    found = SCHEMES[scheme]
    return Format(bits=found.weight_bits, symmetric=found.symmetric, group_size=group_size)


def blocks_of(hessian: Tensor, size: int) -> Tensor:
    parts = [hessian[at : at + size, at : at + size] for at in range(0, len(hessian), size)]
    return torch.stack(parts)


def grids_of(hessian: Tensor, scheme: str, group_size: int) -> ClippedGrids:
    blocks = blocks_of(hessian, group_size or len(hessian))
    return ClippedGrids(blocks, scheme=SCHEMES[scheme], channel=group_size == CHANNEL)


def assert_reference(weight: Tensor, rows: Tensor, c: Tensor, scheme: str, size: int) -> None:
    grids = grids_of((rows * c[:, None]).T @ rows, scheme, size)
    found = round_clipped(weight, grids, scheme=SCHEMES[scheme], group_size=size)
    wanted = reference.shrinks(weight, rows, c, kind_of(scheme, size))
    assert torch.stack(grids.shrinks, dim=1).tolist() == torch.tensor(wanted).tolist()
    assert torch.equal(dequantize(found), reference.clipped(weight, rows, c, kind_of(scheme, size)))


@pytest.mark.parametrize(("scheme", "size"), FORMATS)
def test_the_range_is_the_one_that_costs_tokens_least(scheme: str, size: int) -> None:
    """Golden C2 for the choice: the Gram form and the sum over tokens agree in every row and group."""
    columns = 2 * (size or 24)
    assert_reference(weight_of(size, 4, columns), *inputs(size, columns), scheme, size)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a8"])
def test_the_gram_form_is_the_sum_over_tokens(scheme: str) -> None:
    """Golden C2."""
    rows, c = inputs(3, 128)
    weight = weight_of(3, 5, 128)
    block = (rows * c[:, None]).T @ rows
    for shrink in SHRINKS:
        made = reference.real(weight, shrink, kind_of(scheme, 128))
        for row, to in zip(weight, made, strict=True):
            by_tokens = reference.loss(row, to, rows, c)
            assert weighted_square((to - row).double()[None], block) == pytest.approx(
                by_tokens, rel=TOKEN_FORM
            )


@pytest.mark.parametrize(
    ("diagonal", "tried", "best"),
    [
        ((1.0, 1.0, 1.0, 0.01), (1.0, 0.9, 0.5, 0.3), 0.3),
        ((1.0, 1.0, 1.0, 1.0), (1.0, 0.9, 0.5, 0.3), 0.9),
    ],
)
def test_the_worked_example(
    diagonal: tuple[float, ...], tried: tuple[float, ...], best: float
) -> None:
    """Golden C1: the large weight matters little, so its range is given up."""
    weight, block = torch.tensor([[-0.1, 0.0, 0.1, 1.0]]), torch.diag(torch.tensor(diagonal))
    found = best_shrinks(weight, block, scheme=TWO_BITS, channel=False, shrinks=tried)
    assert found.tolist() == pytest.approx([best])


def test_the_errors_of_the_worked_example() -> None:
    """Golden C1: figures by hand, of float32 scales."""
    weight, block = torch.tensor([[-0.1, 0.0, 0.1, 1.0]]), torch.diag(torch.tensor([1, 1, 1, 0.01]))
    kind = Format(bits=2, symmetric=False, group_size=4)
    for shrink, wanted in ((1.0, 0.0201), (0.9, 0.020001), (0.5, 0.018969), (0.3, 0.014589)):
        change = reference.real(weight, shrink, kind) - weight
        assert weighted_square(change, block) == pytest.approx(wanted, rel=OF_STORED_SCALES)


@pytest.mark.parametrize(("scheme", "size"), FORMATS)
def test_of_equal_errors_the_larger_range_is_kept(scheme: str, size: int) -> None:
    """Nothing is read, or nothing is there: every range costs the same."""
    columns = size or 24
    for weight, block in (
        (weight_of(1, 3, columns), torch.zeros(columns, columns)),
        (torch.zeros(3, columns), torch.eye(columns)),
    ):
        found = best_shrinks(weight, block, scheme=SCHEMES[scheme], channel=size == CHANNEL)
        assert found.tolist() == [1.0] * 3


def test_what_no_range_changes_keeps_the_first_of_equals_not_the_last() -> None:
    """Only the zero is read: it is exact on every grid whose zero point is a code."""
    weight = torch.linspace(-1, 1, 32)[None].clone()
    weight[0, 5] = 0.0
    block = torch.zeros(32, 32)
    block[5, 5] = 1.0
    found = best_shrinks(weight, block, scheme=SCHEMES["w4a16"], channel=False)
    assert found.tolist() == [1.0]


@pytest.mark.parametrize(("scheme", "size"), [("w3a16", 32), ("w4a8", 128), ("w4a8", CHANNEL)])
@pytest.mark.parametrize("place", [0, 17, 31])
def test_one_column_that_is_read_decides_alone(scheme: str, size: int, place: int) -> None:
    """One-hot inputs: nothing but the error of that weight counts."""
    columns = size or 32
    weight, rows = weight_of(place, 6, columns), torch.zeros(1, columns).double()
    rows[0, place] = 1.0
    assert_reference(weight, rows, torch.ones(1), scheme, size)
    grids = grids_of(rows.T @ rows, scheme, size)
    clipped = dequantize(round_clipped(weight, grids, scheme=SCHEMES[scheme], group_size=size))
    plain = dequantize(quantize(weight, scheme=SCHEMES[scheme], group_size=size))
    missed, before = ((made - weight)[:, place].abs() for made in (clipped, plain))
    assert bool((missed <= before).all())


@pytest.mark.parametrize("scheme", ["w3a16", "w4a16"])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_one_huge_weight_is_the_references(scheme: str, sign: float) -> None:
    """A range on one side of zero; fp16's largest scale; a row of one value."""
    rows, c = inputs(5, 64)
    weight = weight_of(5, 5, 64).abs() * sign
    weight[0, 7] = sign * 5e4
    weight[1] = sign
    weight[2, 1:] = 0.0
    weight[3] *= 1e-6
    assert_reference(weight, rows, c, scheme, 64)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("scheme", "size"), [("w3a16", 64), ("w4a8", 128), ("w4a8", CHANNEL)])
def test_no_group_is_worse_than_unclipped(scheme: str, size: int, seed: int) -> None:
    rows, c = inputs(seed, 128, tokens=20 + 40 * seed)
    weight = weight_of(seed, 6, 128)
    hessian = (rows * c[:, None]).T @ rows
    grids = grids_of(hessian, scheme, size)
    clipped = dequantize(round_clipped(weight, grids, scheme=SCHEMES[scheme], group_size=size))
    plain = dequantize(quantize(weight, scheme=SCHEMES[scheme], group_size=size))
    better = 0
    for at in range(0, 128, size or 128):
        part = slice(at, at + (size or 128))
        for row in range(6):
            after, before = (
                weighted_square((made - weight)[row : row + 1, part].double(), hessian[part, part])
                for made in (clipped, plain)
            )
            assert after <= before
            better += after < before
    assert better


@pytest.mark.parametrize(("scheme", "size"), FORMATS)
def test_grids_that_nothing_shrinks_give_nearest_rounding(scheme: str, size: int) -> None:
    columns = 2 * (size or 24)
    weight = weight_of(2, 4, columns)
    grids = grids_of(torch.zeros(columns, columns), scheme, size)
    found = round_clipped(weight, grids, scheme=SCHEMES[scheme], group_size=size)
    wanted = quantize(weight, scheme=SCHEMES[scheme], group_size=size)
    for name in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
    assert found.clamped == wanted.clamped


@pytest.mark.parametrize(("scheme", "size"), [("w3a16", 32), ("w4a16", 128), ("w4a8", CHANNEL)])
def test_feedback_rounds_on_clipped_grids_as_the_textbook_does(
    scheme: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The range comes from the weights as the columns before leave them, and only from them."""
    columns = 2 * (size or 48)
    rows, _ = inputs(7, columns, tokens=300)
    weight, ones = weight_of(7, 4, columns), torch.ones(len(rows))
    hessian = rows.T @ rows
    kind, whole, starts = kind_of(scheme, size), textbook.grid, iter(range(0, columns, size or 96))

    def clipped_grid(group: Tensor, kind: Format) -> tuple[Tensor, Tensor]:
        at = next(starts)
        one = replace(kind, group_size=kind.group_size and len(group[0]))
        with monkeypatch.context() as inside:
            inside.setattr(reference, "grid", whole)
            read = rows[:, at : at + group.shape[1]]
            chosen = reference.shrinks(group.float(), read, ones, one)
        return whole(group.float() * torch.tensor(chosen), kind)

    monkeypatch.setattr(textbook, "grid", clipped_grid)
    wanted = textbook.feed_back(weight, hessian, kind)
    grids = grids_of(hessian, scheme, size)
    found = feed_back(
        weight,
        factorise(hessian, damp=0.01),
        scheme=SCHEMES[scheme],
        group_size=size,
        clipped=grids,
    )
    assert torch.equal(dequantize(found), wanted)
    assert any(bool((chosen < 1).any()) for chosen in grids.shrinks)


def test_what_feedback_keeps_knows_whether_it_was_clipped() -> None:
    rows, _ = inputs(8, 64, tokens=300)
    other, _ = inputs(9, 64, tokens=300)
    weight, hessian = weight_of(8, 4, 64), rows.T @ rows
    for factor, clipped in (
        (factorise(hessian, damp=0.01), True),
        (factorise(other.T @ other, damp=1e-6), False),
    ):
        grids = grids_of(hessian, "w3a16", 64)
        found = round_linear(
            weight, hessian, factor, scheme=SCHEMES["w3a16"], group_size=64, clipped=grids
        )
        assert (found.rounding == "gptq") == clipped
        assert found.clipped is (grids if clipped else None)


def test_a_range_beyond_fp16_is_refused_as_without_clipping() -> None:
    weight = torch.full((1, 32), 1e6)
    grids = grids_of(torch.eye(32), "w3a16", 32)
    with pytest.raises(FormatError) as caught:
        round_clipped(weight, grids, scheme=SCHEMES["w3a16"], group_size=32)
    assert caught.value.code == "E4112"


def test_the_record_counts_every_group_once() -> None:
    rows, c = inputs(10, 128)
    grids = grids_of((rows * c[:, None]).T @ rows, "w3a16", 32)
    round_clipped(weight_of(10, 9, 128), grids, scheme=SCHEMES["w3a16"], group_size=32)
    facts = clip_facts(grids, "plain")
    assert facts["hessian"] == "plain"
    assert sum(facts["groups"].values()) == 9 * 4
    assert set(facts["groups"]) <= {f"{shrink:g}" for shrink in SHRINKS}
    values = torch.stack(grids.shrinks).flatten().tolist()
    wanted = {f"{f:g}": sum(abs(value - f) < 1e-6 for value in values) for f in SHRINKS}
    assert facts["groups"] == {name: count for name, count in wanted.items() if count}
