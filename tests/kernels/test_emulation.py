"""The CUDA kernels, unmodified, on a CPU: right answers, and the same bytes in whatever order threads run."""

from dataclasses import replace
from typing import Final

import pytest
import torch

from mbq_export.schemes import SCHEMES
from mbq_kernels.cases import DTYPES, adversarial_cases, epilogue_cases
from mbq_kernels.library import SCHEME_IDS, DeviceStruct
from mbq_kernels.testing import Case, Problem
from tests.kernels.emulated import BlockOrder, Schedule
from tests.kernels.emulated_linear import (
    FORCED_GEMM,
    LARGEST_SKINNY,
    SETTINGS,
    Emulator,
    Setting,
    as_bytes,
    checked,
    described,
)

H100: Final = DeviceStruct(sm=90, sm_count=132, smem_optin=232448, l2_bytes=52428800)
ROWS: Final = (*range(1, 10), 16, 33)
SKINNY: Final = 1


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator.unbroken()


def base_case(scheme: str, dtype: torch.dtype) -> Case:
    """More than one block and more than one k-tile for every family, nothing a multiple of the largest block."""
    return Case(scheme=scheme, dtype=dtype, m=3, n=80, k=384, group_size=SCHEMES[scheme].group_size)


def legal_configs(emulator: Emulator, problem: Problem) -> list[dict[str, int]]:
    """Configs that may run a problem on an H100."""
    _, call = described(problem)
    return [
        config
        for config in emulator.library.configs()
        if emulator.library.legal(call, m=problem.case.m, config=config["id"], device=H100) == 0
    ]


each_scheme = pytest.mark.parametrize("scheme", SCHEME_IDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_scheme
@each_dtype
def test_every_row_count_and_group_size_is_right(
    emulator: Emulator, scheme: str, dtype: torch.dtype
) -> None:
    for group_size in SCHEMES[scheme].group_sizes:
        for m in ROWS:
            problem = replace(base_case(scheme, dtype), m=m, group_size=group_size).make(m)
            checked(emulator, problem)
            if m <= LARGEST_SKINNY:
                checked(emulator, problem, FORCED_GEMM)


@each_scheme
@each_dtype
def test_adversarial_problems_are_right(
    emulator: Emulator, scheme: str, dtype: torch.dtype
) -> None:
    for case in (*adversarial_cases(scheme, dtype), *epilogue_cases(scheme, dtype)):
        for seed in case.seeds():
            problem = case.make(seed)
            few = SETTINGS if seed == 0 else SETTINGS[:1]
            checked(emulator, problem, settings=few)
            if case.m <= LARGEST_SKINNY:
                checked(emulator, problem, FORCED_GEMM, settings=few)


@each_scheme
def test_every_config_is_right_and_the_same_in_every_order(emulator: Emulator, scheme: str) -> None:
    seen = set()
    for m in (5, 19, 64, 130):
        case = replace(base_case(scheme, torch.float16), m=m, n=272, k=1152, bias=True)
        problem = case.make(m)
        for config in legal_configs(emulator, problem):
            if config["id"] not in seen:
                checked(emulator, problem, config["id"])
                seen.add(config["id"])
    never = {config["id"] for config in emulator.library.configs()} - seen
    crowded = {
        c["id"] for c in emulator.library.configs() if c["family"] == SKINNY and c["warps"] > 8
    }
    assert never <= crowded, "configs that no problem of this test may use"


@each_scheme
def test_each_block_may_come_last_when_parts_of_k_meet(emulator: Emulator, scheme: str) -> None:
    for m in (2, 12):
        problem = replace(base_case(scheme, torch.float16), m=m, n=64, k=1024, bias=True).make(0)
        splitting = [c for c in legal_configs(emulator, problem) if c["splits"] > 1]
        assert splitting
        for config in splitting:
            if config["family"] == SKINNY and config["warps"] != 4:
                continue
            blocks = -(-problem.case.n // (16 * config["n_tiles"])) * config["splits"]
            rotations = tuple(
                Setting(block_order=BlockOrder.ROTATED, seed=seed, poison=(0xFF, 0x5A)[seed % 2])
                for seed in range(blocks)
            )
            checked(emulator, problem, config["id"], rotations)


@each_scheme
def test_a_row_is_the_same_alone_and_in_a_batch(emulator: Emulator, scheme: str) -> None:
    for config, m in ((1, 8), (FORCED_GEMM, 16)):
        problem = replace(base_case(scheme, torch.float16), m=m).make(7)
        together = emulator.linear(problem, Setting(), config)
        for row in (0, m - 1):
            alone = replace(
                problem,
                case=replace(problem.case, m=1),
                x_buffer=problem.x_buffer[row * problem.case.k :],
                answer=replace(problem.answer, reference=problem.answer.reference[row : row + 1]),
            )
            y = emulator.linear(alone, Setting(), config)
            assert as_bytes(y).tobytes() == as_bytes(together[row]).tobytes()


def test_calls_repeat_bit_for_bit(emulator: Emulator) -> None:
    problem = replace(base_case("w3a16", torch.float16), k=1024).make(0)
    for config in (None, FORCED_GEMM):
        outputs = {
            as_bytes(emulator.linear(problem, Setting(), config)).tobytes() for _ in range(3)
        }
        assert len(outputs) == 1


def test_settings_cover_every_schedule_block_order_and_both_poisons() -> None:
    assert {setting.schedule for setting in SETTINGS} == set(Schedule)
    assert {setting.block_order for setting in SETTINGS} == set(BlockOrder)
    assert {setting.poison for setting in SETTINGS} == {0xFF, 0x5A}
