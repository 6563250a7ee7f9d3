"""Known defects, one compiled in at a time: the tests of the kernels have to see each of them."""

from dataclasses import dataclass, replace
from typing import Final

import pytest
import torch

from mbq_kernels.testing import Case, Kind
from tests.kernels.emulated_linear import Emulator, checked, library_path

W3: Final = Case(scheme="w3a16", dtype=torch.float16, m=3, n=80, k=384, group_size=128, bias=True)
MANY_STEPS: Final = replace(W3, k=1152)
RAGGED: Final = replace(W3, k=192, group_size=64)
FOUR_PARTS: Final = replace(W3, m=8, n=1024, k=1024, kind=Kind.OUTLIERS)
W4A8: Final = replace(W3, scheme="w4a8", group_size=0)

SKINNY: Final = 1
SKINNY_FOUR_PARTS: Final = 3
GEMM: Final = 101
GEMM_FOUR_PARTS: Final = 103


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One defect in one place.

    Attributes:
        number: Value of MBQ_MUTANT.
        what: The defect, in words.
        source: The translation unit that gets it.
        case: A problem that shows it.
        config: Config that the problem runs with.
    """

    number: int
    what: str
    source: str
    case: Case = W3
    config: int = SKINNY


FAST: Final = (
    Mutant(number=1, what="no barrier before the warps' sums are read", source="skinny_w3a16"),
    Mutant(number=2, what="no wait for copies", source="gemm_w3a16", config=GEMM),
    Mutant(number=4, what="rows g and g + 8 exchanged", source="skinny_w3a16"),
)
SLOW: Final = (
    Mutant(number=1, what="no barrier before outputs are read", source="gemm_w3a16", config=GEMM),
    Mutant(number=3, what="waits for one group too few", source="gemm_w3a16", config=GEMM),
    Mutant(number=5, what="k bits s and h exchanged", source="skinny_w3a16"),
    Mutant(
        number=6,
        what="slot filled one step early",
        source="gemm_w3a16",
        case=MANY_STEPS,
        config=GEMM,
    ),
    Mutant(number=7, what="sums of absent rows stored", source="skinny_w3a16"),
    Mutant(number=7, what="absent rows read", source="gemm_w3a16", config=GEMM),
    Mutant(number=8, what="columns past k read", source="skinny_w3a16", case=RAGGED),
    Mutant(number=8, what="columns past k read", source="gemm_w3a16", case=RAGGED, config=GEMM),
    Mutant(
        number=9,
        what="tickets not zeroed",
        source="launch",
        case=FOUR_PARTS,
        config=SKINNY_FOUR_PARTS,
    ),
    Mutant(
        number=10,
        what="parts added in order of arrival",
        source="skinny_w3a16",
        case=FOUR_PARTS,
        config=SKINNY_FOUR_PARTS,
    ),
    Mutant(
        number=10,
        what="parts added in order of arrival",
        source="gemm_w3a16",
        case=FOUR_PARTS,
        config=GEMM_FOUR_PARTS,
    ),
    Mutant(number=11, what="zero points of the wrong half", source="skinny_w3a16"),
    Mutant(number=11, what="zero points of the wrong half", source="gemm_w3a16", config=GEMM),
    Mutant(number=12, what="scales of the group before", source="skinny_w3a16"),
    Mutant(number=13, what="int8 bytes in natural order", source="elementwise", case=W4A8),
    Mutant(number=14, what="vector load off by half a vector", source="skinny_w3a16"),
    Mutant(number=15, what="bias added after rounding", source="gemm_w4a8", case=W4A8, config=GEMM),
)


def assert_seen(mutant: Mutant) -> None:
    """The problem passes on the right library and fails on the other."""
    problem = mutant.case.make(0)
    checked(Emulator.unbroken(), problem, mutant.config)
    broken = Emulator(library_path(mutant.number, mutant.source))
    with pytest.raises(AssertionError):
        checked(broken, problem, mutant.config)


def name(mutant: Mutant) -> str:
    return f"{mutant.number}-{mutant.source}"


@pytest.mark.parametrize("mutant", FAST, ids=name)
def test_the_defects_that_matter_most_are_seen(mutant: Mutant) -> None:
    assert_seen(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", SLOW, ids=name)
def test_every_other_planted_defect_is_seen(mutant: Mutant) -> None:
    assert_seen(mutant)


def test_all_fifteen_defects_are_planted() -> None:
    assert {mutant.number for mutant in (*FAST, *SLOW)} == set(range(1, 16))
