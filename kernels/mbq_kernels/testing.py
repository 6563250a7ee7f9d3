"""Problems with known answers for every kernel of this project, and what counts as equal.

One `Case` names a problem; `Case.make` draws it from a seed: weight, tiles, activations, the exact answer.
The emulated CUDA kernels, the Triton kernels, the tests on a GPU and the benchmark's correctness gate all use
these, so none of them can be right about a different question. Needs numpy and torch, no test framework.

Activations always lie in a larger buffer whose rest is NaN: a kernel that reads a column past K of the last row,
or a row past M, and multiplies it by a padded zero, returns NaN.

The tolerances of the kernels live here and not in ``mbq_export/evaluate/tolerances.py``, because this package
may not import ``evaluate`` and the GPU machine needs nothing but it.
"""

import enum
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, SMALLEST_SCALE, PackedWeight
from mbq_export.schemes.integers import quantize_activations
from mbq_export.schemes.layouts import dense
from mbq_export.schemes.layouts.tiles import TiledWeight, tile
from mbq_kernels.comparison import Family, Tolerance, difference, tolerance_for

Float = TypeVar("Float", np.float32, np.float64)

TILE_ROWS: Final = 16
SMALLEST_CHANNEL_SCALE: Final = 1e-5 / 7
"""What the quantizer gives an all-zero row: max(absmax, 1e-5) / 7."""
OUTLIER: Final = 1e4
OUTLIERS_PER_ROW: Final = 4
"""Few enough that no sum leaves fp16: 4 * 1e4 * 15 * 2**-6 is 9375."""
GUARD_ROWS: Final = 8
GUARD_COLUMNS: Final = 256


class Kind(enum.Enum):
    """What is special about the values of a case."""

    RANDOM = "random"
    MAX_CODES = "max-codes"
    """Every code at its maximum, zero points 0: the largest positive weights."""
    MIN_CODES = "min-codes"
    """Every code 0, zero points at their maximum: the largest negative weights."""
    LARGEST_SUMS = "largest-sums"
    """Largest negative weights and x = 1 throughout: nothing cancels."""
    ONE_HOT = "one-hot"
    """Row m of x is 1 at column (seed * M + m) mod K: each answer is one column of W, so one place of the tile."""
    OUTLIERS = "outliers"
    """Four activations of each row are +-1e4."""
    SMALL_SCALES = "small-scales"
    """Every scale is the smallest a checkpoint may hold."""
    ZEROS = "zeros"
    """x is zero throughout."""
    NOT_A_NUMBER = "not-a-number"
    """One NaN in x; it must reach its own output row and no other."""
    INFINITE = "infinite"
    """One infinity in x, likewise."""
    TIES = "ties"
    """x is a half-integer multiple of the token's int8 step: shows rounding that is not half to even."""


class Epilogue(enum.Enum):
    """What follows the sum, before the one rounding to dtype."""

    NONE = "none"
    SILU_MUL = "silu-mul"
    """Rows alternate by 16 between gate and up; y has N / 2 columns, silu(gate) * up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel problem, without its numbers.

    Attributes:
        scheme: Name of a scheme.
        dtype: torch.float16 or torch.bfloat16; of x, y and bias.
        m: Rows of activations.
        n: Output features, any number.
        k: Input features, a multiple of 8 and of the group size.
        group_size: Columns per scale; `CHANNEL` for one scale per row.
        bias: True if the linear has one.
        residual: True if an (M, N) tensor is added before rounding.
        epilogue: What is done with the sums.
        kind: What is special about the values.
    """

    scheme: str
    dtype: torch.dtype
    m: int
    n: int
    k: int
    group_size: int
    bias: bool = False
    residual: bool = False
    epilogue: Epilogue = Epilogue.NONE
    kind: Kind = Kind.RANDOM

    @property
    def name(self) -> str:
        """A name that tells cases apart in a test report."""
        group = "channel" if self.group_size == CHANNEL else f"g{self.group_size}"
        flags = [
            *(["bias"] if self.bias else []),
            *(["residual"] if self.residual else []),
            *([] if self.epilogue is Epilogue.NONE else [self.epilogue.value]),
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"m{self.m}-n{self.n}-k{self.k}-{group}"
        return "-".join([self.scheme, dtype, shape, *flags, self.kind.value])

    @property
    def integer_sums(self) -> bool:
        """True if one int32 sum per output decides the answer, so that it is known to the last bit."""
        return (
            SCHEMES[self.scheme].act_bits == 8
            and self.group_size == CHANNEL
            and self.epilogue is Epilogue.NONE
        )

    def seeds(self) -> range:
        """Seeds that together show every place: for one-hot as many as reach every column, else one."""
        return range(-(-self.k // self.m)) if self.kind is Kind.ONE_HOT else range(1)

    def make(self, seed: int) -> "Problem":
        """Draw the numbers and work out the exact answer; the same seed gives the same problem."""
        rng = np.random.default_rng([seed, self.m, self.n, self.k, self.group_size])
        integers, scales, packed = _draw_weight(self, rng)
        buffer = _draw_activations(self, rng, seed)
        residual = _draw_tensor(rng, (self.m, self.n), self.dtype) if self.residual else None
        answer = _answer(self, packed, (integers, scales), buffer[: self.m * self.k], residual)
        return Problem(
            case=self,
            packed=packed,
            tiled=tile(packed, scheme=SCHEMES[self.scheme]),
            x_buffer=buffer,
            residual=residual,
            answer=answer,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a kernel has to return.

    Attributes:
        reference: (M, N) float64, not rounded; N / 2 columns after silu-mul. NaN in poisoned rows.
        slack: Same shape, float64: how far y moves if every product moves by its own size; 0 in poisoned rows.
        exact: Same shape, the dtype of the case: the only right bits, or None where sums are fp32.
        poisoned: (M,) bool, rows of x that hold a NaN or an infinity.
    """

    reference: NDArray[np.float64]
    slack: NDArray[np.float64]
    exact: Tensor | None
    poisoned: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A case with numbers.

    Attributes:
        case: Where it comes from.
        packed: The weight as a checkpoint holds it; its bias is float32 with values of the case's dtype.
        tiled: The same weight as kernels read it.
        x_buffer: Activations, row after row, and NaN behind them.
        residual: (M, N) in the case's dtype, or None.
        answer: What has to come out.
    """

    case: Case
    packed: PackedWeight
    tiled: TiledWeight
    x_buffer: Tensor
    residual: Tensor | None
    answer: Answer

    @property
    def x(self) -> Tensor:
        """(M, K) activations, a view of the start of the buffer."""
        return self.x_on("cpu")

    def x_on(self, device: str | torch.device) -> Tensor:
        """(M, K) activations on a device, still in front of their NaN."""
        case = self.case
        return self.x_buffer.to(device)[: case.m * case.k].view(case.m, case.k)

    def poisoned_output(self, device: str | torch.device = "cpu") -> Tensor:
        """An output full of NaN: what a kernel forgets to write is seen."""
        shape = self.answer.reference.shape
        return torch.full(shape, torch.nan, dtype=self.case.dtype, device=device)


def assert_close(y: Tensor, problem: Problem, *, family: Family = Family.SKINNY) -> None:
    """Compare a kernel's output with the answer.

    Args:
        y: (M, N) in the case's dtype, on any device.
        problem: What was computed.
        family: How the kernel computes, which decides the tolerance.

    Raises:
        AssertionError: Naming the case, the worst element and the figure that was exceeded.
    """
    case, answer = problem.case, problem.answer
    wrong = _wrong_form(y, problem)
    if not wrong and answer.exact is not None:
        wrong = _wrong_bits(y.cpu(), answer)
    elif not wrong:
        wrong = difference(
            y.detach().cpu().double().numpy()[~answer.poisoned],
            answer.reference[~answer.poisoned],
            slack=answer.slack[~answer.poisoned],
            tolerance=tolerance_of(case, family),
        )
    if wrong:
        raise AssertionError(f"{case.name}: {wrong}")


def tolerance_of(case: Case, family: Family) -> Tolerance:
    """Bounds of a case that is not exact."""
    tolerance = tolerance_for(family, case.dtype)
    # An error of gate and one of up both reach y.
    factor = 1 if case.epilogue is Epilogue.NONE else 2
    return replace(tolerance, relative_l2=factor * tolerance.relative_l2)


def _wrong_form(y: Tensor, problem: Problem) -> str:
    answer = problem.answer
    if tuple(y.shape) != answer.reference.shape or y.dtype != problem.case.dtype:
        return f"output is {y.dtype} {tuple(y.shape)}, expected {answer.reference.shape}"
    finite = torch.isfinite(y.detach().cpu()).numpy()
    if finite[answer.poisoned].any():
        return "a NaN or infinity inside x did not reach its whole row"
    if not finite[~answer.poisoned].all():
        row, column = (int(i) for i in np.argwhere(~finite & ~answer.poisoned[:, None])[0])
        return f"y[{row}, {column}] is {float(y[row, column])}: nothing in its row of x is"
    return ""


def _wrong_bits(y: Tensor, answer: Answer) -> str:
    if answer.exact is None:
        return ""
    clean = torch.from_numpy(~answer.poisoned)
    differ = (y.view(torch.int16) != answer.exact.view(torch.int16)) & clean[:, None]
    if not differ.any():
        return ""
    row, column = (int(i) for i in torch.nonzero(differ)[0])
    got, right = float(y[row, column]), float(answer.exact[row, column])
    return (
        f"{int(differ.sum())} bit patterns differ, first y[{row}, {column}] = {got!r} for {right!r}"
    )


def _draw_tensor(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(dtype)


def _draw_weight(
    case: Case, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.float32], PackedWeight]:
    """(N, K) integers u - z, (N, G) scales, and both packed."""
    scheme = SCHEMES[case.scheme]
    groups = 1 if case.group_size == CHANNEL else case.k // case.group_size
    codes = rng.integers(0, scheme.levels, (case.n, case.k), dtype=np.uint8)
    zeros = rng.integers(0, scheme.levels, (case.n, groups), dtype=np.uint8)
    scales = np.exp2(rng.uniform(-9, -6, (case.n, groups))).astype(np.float32)
    if case.kind is Kind.MAX_CODES:
        codes[:], zeros[:] = scheme.largest_code, 0
    if case.kind in {Kind.MIN_CODES, Kind.LARGEST_SUMS}:
        codes[:], zeros[:] = 0, scheme.largest_code
    if case.kind is Kind.SMALL_SCALES:
        scales[:] = SMALLEST_CHANNEL_SCALE if case.group_size == CHANNEL else SMALLEST_SCALE
    stored = scales if case.group_size == CHANNEL else scales.astype(np.float16)
    bias = _draw_tensor(rng, (case.n,), case.dtype).float().numpy() if case.bias else None
    packed = PackedWeight(
        words=dense.pack(codes, bits=scheme.weight_bits),
        scales=stored,
        zeros=None if scheme.symmetric else zeros,
        k=case.k,
        bits=scheme.weight_bits,
        group_size=case.group_size,
        bias=bias,
    )
    middle = np.full_like(zeros, scheme.levels // 2) if scheme.symmetric else zeros
    columns = np.repeat(middle.astype(np.int32), case.k // groups, axis=1)
    return codes.astype(np.int32) - columns, stored.astype(np.float32), packed


def _draw_activations(case: Case, rng: np.random.Generator, seed: int) -> Tensor:
    """The first M * K elements are x, the rest NaN."""
    x = rng.standard_normal((case.m, case.k), dtype=np.float32)
    rows = np.arange(case.m)
    if case.kind is Kind.LARGEST_SUMS:
        x[:] = 1
    if case.kind is Kind.ZEROS:
        x[:] = 0
    if case.kind is Kind.ONE_HOT:
        x[:] = 0
        x[rows, (seed * case.m + rows) % case.k] = 1
    if case.kind is Kind.OUTLIERS:
        columns = rng.integers(0, case.k, (case.m, OUTLIERS_PER_ROW))
        x[rows[:, None], columns] = OUTLIER * rng.choice([-1, 1], columns.shape)
    if case.kind is Kind.TIES:
        # Steps 1, 3, 5, 7 by row: only an odd step tells division from multiplying by its reciprocal.
        step = 1 + 2 * (rows[:, None] % 4)
        x = (rng.integers(-127, 127, x.shape) + 0.5).astype(np.float32) * step
        x[:, rng.integers(case.k)] = 127 * step[:, 0]
    if case.kind in {Kind.NOT_A_NUMBER, Kind.INFINITE}:
        bad = np.nan if case.kind is Kind.NOT_A_NUMBER else np.inf
        x[rng.integers(case.m), rng.integers(case.k)] = bad
    buffer = torch.full((case.m * case.k + GUARD_ROWS * case.k + GUARD_COLUMNS,), torch.nan)
    buffer[: case.m * case.k] = torch.from_numpy(x.reshape(-1))
    return buffer.to(case.dtype)


def _answer(
    case: Case,
    packed: PackedWeight,
    weight: tuple[NDArray[np.int32], NDArray[np.float32]],
    x_flat: Tensor,
    residual: Tensor | None,
) -> Answer:
    integers, scales = weight
    x = x_flat.float().numpy().reshape(case.m, case.k)
    poisoned: NDArray[np.bool_] = ~np.isfinite(x).all(axis=1)
    x = np.where(poisoned[:, None], np.float32(0), x)
    real = integers * np.repeat(scales.astype(np.float64), case.k // scales.shape[1], axis=1)
    added: list[NDArray[np.floating]] = [] if packed.bias is None else [packed.bias]
    added += [] if residual is None else [residual.float().numpy()]
    seen, exact = x.astype(np.float64), None
    if SCHEMES[case.scheme].act_bits == 8:
        steps, step_sizes = quantize_activations(x)
        seen = steps.astype(np.float64) * step_sizes[:, None]
        if case.integer_sums:
            sums = (steps.astype(np.float64) @ integers.T).astype(np.float32)
            scaled = sums * scales[:, 0] * step_sizes[:, None]
            exact = torch.from_numpy(_plus(scaled, added)).to(case.dtype)
    total = _plus(seen @ real.T, added)
    slack = _plus(np.abs(seen) @ np.abs(real.T), [np.abs(term) for term in added])
    if case.epilogue is Epilogue.SILU_MUL:
        total, slack = _silu_mul(total, slack)
    total[poisoned], slack[poisoned] = np.nan, 0
    return Answer(reference=total, slack=slack, exact=exact, poisoned=poisoned)


def _plus(total: NDArray[Float], terms: list[NDArray[np.floating]]) -> NDArray[Float]:
    """Add bias and residual in this order, in the dtype of the total."""
    for term in terms:
        total = total + term.astype(total.dtype)
    return total


def _silu_mul(
    total: NDArray[np.float64], slack: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(M, N) sums, gate and up alternating by 16 rows of W, to (M, N / 2)."""

    def parts(of: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        tiles = of.reshape(len(of), -1, 2, TILE_ROWS)
        return tiles[:, :, 0].reshape(len(of), -1), tiles[:, :, 1].reshape(len(of), -1)

    (gate, up), (gate_slack, up_slack) = parts(total), parts(slack)
    activated = gate * (1 + np.tanh(gate / 2)) / 2  # gate / (1 + exp(-gate)), without overflow
    # The slope of silu is never steeper than 1.1.
    return activated * up, 1.1 * np.abs(up) * gate_slack + np.abs(activated) * up_slack
