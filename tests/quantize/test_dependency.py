"""How sites depend on each other, against numbers made by hand and against the definition, number by number."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mbq_export.blocks.stream import Batch
from mbq_export.families.base import ANSWER, PROMPT, VISION
from mbq_export.quantize import dependency
from mbq_export.quantize.dependency import (
    DEEPEST,
    conditional_entropy,
    draw_numbers,
    joint_distribution,
    mutual_information,
    partition,
    soft_levels,
)
from tests.reference import joint as reference

FLOAT32 = 2e-5
"""Soft levels are float32 sums; entropies are of order one."""


def test_v1_a_number_on_a_level_shares_with_its_neighbour() -> None:
    found = soft_levels(torch.tensor([0.0]), torch.tensor([0.0, 1.0]))
    assert found[0].tolist() == pytest.approx([0.731059, 0.268941], abs=1e-6)


def test_v2_equal_sites_leave_nothing_open() -> None:
    joint = torch.eye(4, dtype=torch.float64) / 4
    assert conditional_entropy(joint) == 0.0
    assert mutual_information(joint) == pytest.approx(math.log(4), abs=1e-12)


def test_v2_independent_sites_leave_everything_open() -> None:
    joint = torch.full((4, 4), 1 / 16, dtype=torch.float64)
    assert conditional_entropy(joint) == pytest.approx(1.386294, abs=1e-6)
    assert mutual_information(joint) == pytest.approx(0.0, abs=1e-12)


def test_v3_a_weak_link_ends_a_block_and_so_does_the_third_site() -> None:
    assert partition([3, 1, 3, 3, 3]) == ((0, 1), (2, 3, 4), (5,))


@pytest.mark.parametrize("links", [[], [2.0], [1.0] * 7])
def test_equal_links_make_blocks_of_three(links: list[float]) -> None:
    sites = range(len(links) + 1)
    expected = [tuple(sites[start : start + 3]) for start in range(0, len(sites), 3)]
    assert partition(links) == tuple(expected)


@given(st.lists(st.floats(0, 4), max_size=20))
def test_every_site_is_in_one_block_and_blocks_obey_the_rule(links: list[float]) -> None:
    blocks = partition(links)
    assert [site for block in blocks for site in block] == list(range(len(links) + 1))
    least = float(np.median(links)) if links else 0.0
    for block in blocks:
        assert len(block) <= DEEPEST
        for end in block[1:]:
            assert np.mean(links[block[0] : end]) >= least
        after = block[-1] + 1
        if len(block) < DEEPEST and after <= len(links):
            assert np.mean(links[block[0] : after]) < least


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("tied", [0.0, 0.7, 1.0])
def test_both_measures_are_those_of_the_definition(bits: int, tied: float) -> None:
    generator = torch.Generator().manual_seed(bits)
    first = torch.randn(200, generator=generator)
    second = 3 * (tied * first + (1 - tied) * torch.randn(200, generator=generator))
    joint = joint_distribution(first, second, bits=bits)
    conditional, mutual = reference.dependency(first.tolist(), second.tolist(), bits)
    assert conditional_entropy(joint) == pytest.approx(conditional, abs=FLOAT32)
    assert mutual_information(joint) == pytest.approx(mutual, abs=FLOAT32)


def test_the_number_of_numbers_at_a_time_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    whole = joint_distribution(first, second, bits=3)
    monkeypatch.setattr(dependency, "_CHUNK", 8 * 7)
    torch.testing.assert_close(joint_distribution(first, second, bits=3), whole, atol=1e-6, rtol=0)


def test_units_of_a_site_do_not_matter() -> None:
    first, second = torch.randn(2, 500, generator=torch.Generator().manual_seed(1))
    small = joint_distribution(first, second, bits=3)
    torch.testing.assert_close(
        joint_distribution(first * 1e3, second, bits=3), small, atol=1e-5, rtol=0
    )


def test_a_site_that_never_changes_leaves_nothing_open() -> None:
    joint = joint_distribution(torch.randn(50), torch.full((50,), 3.0), bits=3)
    assert conditional_entropy(joint) == 0.0
    assert mutual_information(joint) == pytest.approx(0.0, abs=1e-12)


@dataclass
class Case:
    tokens: int
    classes: list[list[list[int]]]
    expected: list[list[int]]


A, V, P = ANSWER, VISION, PROMPT
CASES = {
    "room for all": Case(9, [[[P, V, A]], [[V, V, P], [A, P, V]]], [[1, 2], [0, 1, 3, 5]]),
    "answers first": Case(2, [[[P, V, A]], [[V, V, P], [A, P, V]]], [[2], [3]]),
    "a batch with none": Case(1, [[[P, V, P]], [[V, A]]], [[], [1]]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_answers_are_drawn_before_vision_and_prompts_never(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dependency, "TOKENS", case.tokens)
    batches = [batch_of(classes) for classes in case.classes]
    places, channels = draw_numbers(batches, 300, seed=[0])
    assert [place.tolist() for place in places] == case.expected
    assert len(set(channels.tolist())) == dependency.CHANNELS
    again, _ = draw_numbers(batches, 300, seed=[0])
    assert [place.tolist() for place in again] == case.expected


def batch_of(classes: list[list[int]]) -> Batch:
    nothing = torch.empty(0)
    found = torch.tensor(classes, dtype=torch.int8)
    samples = tuple(range(len(classes)))
    return Batch(samples=samples, ids=nothing, classes=found, hidden=nothing, arguments=())
