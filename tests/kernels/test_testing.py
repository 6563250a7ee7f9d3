"""Cases have the answer of the schemes' oracles, and every planted mistake is noticed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.layouts import dense
from mbq_kernels.base import SCHEMES_WITH_KERNELS
from mbq_kernels.cases import DTYPES, adversarial_cases, epilogue_cases
from mbq_kernels.comparison import Family, tolerance_for
from mbq_kernels.testing import Case, Epilogue, Kind, Problem, assert_close

CASES = [
    case
    for scheme in SCHEMES_WITH_KERNELS
    for dtype in DTYPES
    for case in (*adversarial_cases(scheme, dtype), *epilogue_cases(scheme, dtype))
]
W3 = Case(scheme="w3a16", dtype=torch.float16, m=3, n=48, k=256, group_size=128)
W4A8 = Case(scheme="w4a8", dtype=torch.float16, m=3, n=48, k=256, group_size=CHANNEL)


def integers_and_scales(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(N, K) u - z and (N, K) scales, from the packed weight."""
    packed = problem.packed
    codes = dense.unpack(packed.words, bits=packed.bits, columns=packed.k).astype(np.float64)
    width = packed.k // packed.groups
    zeros = np.full(packed.scales.shape, 2 ** (packed.bits - 1))
    zeros = zeros if packed.zeros is None else packed.zeros
    scales = packed.scales.astype(np.float64)
    return codes - np.repeat(zeros, width, axis=1), np.repeat(scales, width, axis=1)


def rounded(y: np.ndarray, problem: Problem) -> Tensor:
    return torch.from_numpy(y).to(problem.case.dtype)


def right_answer(problem: Problem) -> Tensor:
    if problem.answer.exact is None:
        return rounded(problem.answer.reference, problem)
    poisoned = torch.from_numpy(problem.answer.poisoned)
    return torch.where(poisoned[:, None], torch.nan, problem.answer.exact)


def int8_answer(problem: Problem, steps: np.ndarray, step_sizes: np.ndarray) -> Tensor:
    """Per-channel int8 linear of given steps, as kernels compute it."""
    integers, scales = integers_and_scales(problem)
    sums = (steps.astype(np.float64) @ integers.T).astype(np.float32)
    return rounded(sums * scales[:, 0].astype(np.float32) * step_sizes[:, None], problem)


@pytest.mark.parametrize("seed", range(3))
def test_the_rounded_answer_is_accepted_in_every_case_and_family(seed: int) -> None:
    for case in CASES:
        problem = case.make(seed)
        for family in Family:
            assert_close(right_answer(problem), problem, family=family)


@pytest.mark.parametrize("scheme", SCHEMES_WITH_KERNELS)
def test_the_answer_is_that_of_the_schemes_oracle(scheme: str) -> None:
    for case in adversarial_cases(scheme, torch.float16):
        problem = case.make(5)
        clean = ~problem.answer.poisoned
        oracle = SCHEMES[scheme].linear_reference(problem.x.float().numpy()[clean], problem.packed)
        np.testing.assert_allclose(problem.answer.reference[clean], oracle, rtol=1e-5, atol=1e-6)
        if problem.answer.exact is not None:
            exact = problem.answer.exact.numpy()[clean]
            np.testing.assert_array_equal(exact, oracle.astype(np.float32).astype(np.float16))


def test_silu_mul_joins_tiles_in_pairs() -> None:
    plain = Case(scheme="w3a16", dtype=torch.float16, m=2, n=64, k=128, group_size=64)
    fused = Case(
        **{name: getattr(plain, name) for name in ("scheme", "dtype", "m", "n", "k", "group_size")},
        epilogue=Epilogue.SILU_MUL,
    )
    sums = plain.make(3).answer.reference
    gate, up = sums[:, [*range(16), *range(32, 48)]], sums[:, [*range(16, 32), *range(48, 64)]]
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(fused.make(3).answer.reference, expected, rtol=1e-12)


def test_the_same_seed_gives_the_same_problem_and_another_seed_another() -> None:
    first, again, other = W3.make(1), W3.make(1), W3.make(2)
    assert first.tiled.codes.tobytes() == again.tiled.codes.tobytes()
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)


def test_names_of_cases_are_unique() -> None:
    names = [case.name for case in dict.fromkeys(CASES)]
    assert len(set(names)) == len(names)


def test_one_hot_seeds_reach_every_column() -> None:
    case = Case(
        scheme="w3a16",
        dtype=torch.float16,
        m=3,
        n=16,
        k=128,
        group_size=128,
        kind=Kind.ONE_HOT,
    )
    hits = {int(k) for seed in case.seeds() for k in case.make(seed).x.argmax(dim=1)}
    assert hits == set(range(128))


def test_activations_lie_in_front_of_nan() -> None:
    problem = W3.make(0)
    behind = problem.x_buffer[W3.m * W3.k :]
    assert torch.isfinite(problem.x).all()
    assert len(behind) > W3.k
    assert torch.isnan(behind).all()


def fails(y: Tensor, problem: Problem, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        assert_close(y, problem)


def test_rows_that_change_places_in_a_tile_are_noticed() -> None:
    problem = W3.make(0)
    y = right_answer(problem)
    fails(y.reshape(3, 3, 2, 8).flip(2).reshape(3, 48), problem, r"y\[\d, \d+\]")


def test_a_scale_of_the_next_group_is_noticed() -> None:
    problem = W3.make(0)
    integers, scales = integers_and_scales(problem)
    y = problem.x.double().numpy() @ (integers * np.roll(scales, 128, axis=1)).T
    fails(rounded(y, problem), problem, "off by")


def test_a_zero_point_of_the_wrong_half_is_noticed() -> None:
    problem = W3.make(0)
    integers, scales = integers_and_scales(problem)
    zeros = np.repeat(problem.packed.zeros.astype(np.float64), 128, axis=1)
    other = zeros.reshape(3, 2, 8, -1)[:, ::-1].reshape(48, -1)
    y = problem.x.double().numpy() @ ((integers + zeros - other) * scales).T
    fails(rounded(y, problem), problem, "off by")


@pytest.mark.parametrize("swap", [(0, 1), (0, 2), (1, 2)])
def test_columns_that_change_places_in_a_tile_are_noticed(swap: tuple[int, int]) -> None:
    case = Case(
        scheme="w3a16", dtype=torch.float16, m=8, n=16, k=128, group_size=128, kind=Kind.ONE_HOT
    )
    caught = 0
    for seed in case.seeds():
        problem = case.make(seed)
        integers, scales = integers_and_scales(problem)
        weight = (integers * scales).reshape(16, 16, 2, 2, 2)  # rows, lanes and blocks, s, h, p
        weight = weight.swapaxes(2 + swap[0], 2 + swap[1]).reshape(16, 128)
        y = rounded(problem.x.double().numpy() @ weight.T, problem)
        try:
            assert_close(y, problem)
        except AssertionError:
            caught += 1
    assert caught == len(case.seeds())


def test_reading_past_the_last_column_is_noticed() -> None:
    case = Case(scheme="w3a16", dtype=torch.float16, m=3, n=16, k=160, group_size=32)
    problem = case.make(0)
    integers, scales = integers_and_scales(problem)
    padded = np.zeros((16, 256))
    padded[:, :160] = integers * scales
    rows = [problem.x_buffer[160 * m : 160 * m + 256].double().numpy() for m in range(3)]
    y = np.stack(rows) @ padded.T  # columns past K are multiplied by 0, which keeps NaN
    fails(rounded(y, problem), problem, r"y\[2, 0\] is nan: nothing in its row of x is")


def test_what_was_not_written_is_noticed() -> None:
    problem = W3.make(0)
    y = problem.poisoned_output()
    y[:, :47] = right_answer(problem)[:, :47]
    fails(y, problem, r"y\[0, 47\] is nan")


@pytest.mark.parametrize("kind", [Kind.NOT_A_NUMBER, Kind.INFINITE])
def test_a_nan_that_vanishes_is_noticed(kind: Kind) -> None:
    case = Case(scheme="w3a16", dtype=torch.float16, m=3, n=16, k=128, group_size=128, kind=kind)
    problem = case.make(0)
    integers, scales = integers_and_scales(problem)
    x = np.nan_to_num(problem.x.double().numpy(), nan=0, posinf=0)
    fails(rounded(x @ (integers * scales).T, problem), problem, "did not reach its whole row")


def test_a_bias_that_is_added_after_rounding_is_noticed() -> None:
    case = Case(scheme="w4a8", dtype=torch.float16, m=3, n=48, k=256, group_size=CHANNEL, bias=True)
    problem = case.make(0)
    bias = torch.from_numpy(problem.packed.bias).half()
    plain = problem.answer.reference - problem.packed.bias
    fails(rounded(plain, problem) + bias, problem, "bit patterns differ")


def test_one_wrong_last_bit_is_noticed_where_integers_decide() -> None:
    problem = W4A8.make(0)
    y = right_answer(problem)
    assert_close(y.clone(), problem)
    y.view(torch.int16)[2, 5] ^= 1
    fails(y, problem, r"1 bit patterns differ, first y\[2, 5\]")


def test_a_reciprocal_in_place_of_a_division_is_noticed() -> None:
    problem = Case(
        scheme="w4a8",
        dtype=torch.float16,
        m=4,
        n=48,
        k=256,
        group_size=CHANNEL,
        kind=Kind.TIES,
    ).make(0)
    x = problem.x.float().numpy()
    largest = np.abs(x).max(axis=1)
    steps = np.rint(x * (np.float32(127) / largest)[:, None])
    fails(int8_answer(problem, steps, largest / np.float32(127)), problem, "bit patterns differ")


def test_rounding_half_up_is_noticed() -> None:
    problem = Case(
        scheme="w4a8",
        dtype=torch.float16,
        m=4,
        n=48,
        k=256,
        group_size=CHANNEL,
        kind=Kind.TIES,
    ).make(0)
    x = problem.x.float().numpy()
    step_sizes = np.abs(x).max(axis=1) / np.float32(127)
    right = int8_answer(problem, np.rint(x / step_sizes[:, None]), step_sizes)
    assert_close(right, problem)
    wrong = int8_answer(problem, np.floor(x / step_sizes[:, None] + 0.5), step_sizes)
    fails(wrong, problem, "bit patterns differ")


def test_an_output_of_another_form_is_refused() -> None:
    problem = W3.make(0)
    fails(right_answer(problem).float(), problem, "output is torch.float32")
    fails(right_answer(problem)[:2], problem, r"expected \(3, 48\)")


def test_weights_rounded_once_exceed_the_skinny_tolerance_but_not_that_of_gemm() -> None:
    problem = Case(scheme="w4a16", dtype=torch.float16, m=9, n=256, k=512, group_size=128).make(0)
    integers, scales = integers_and_scales(problem)
    weight = (integers * scales).astype(np.float16).astype(np.float64)
    y = rounded(problem.x.double().numpy() @ weight.T, problem)
    assert_close(y, problem, family=Family.GEMM)
    with pytest.raises(AssertionError, match=r"relative L2|off by"):
        assert_close(y, problem, family=Family.SKINNY)


def test_a_looser_family_never_has_a_tighter_bound() -> None:
    for dtype in DTYPES:
        skinny, gemm = tolerance_for(Family.SKINNY, dtype), tolerance_for(Family.GEMM, dtype)
        assert skinny.relative_l2 < gemm.relative_l2
        assert skinny.per_slack < gemm.per_slack
