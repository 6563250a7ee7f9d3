"""Which blocks and how many warps a Triton kernel gets: one fixed rule, so equal calls compute equal bits.

There is no search at run time: it would make results depend on the load of the machine, and has no meaning under
the interpreter. The numbers come from register counts of compiled kernels (tests/kernels/triton_registers.json), not
from timings.
"""

from dataclasses import dataclass
from typing import Final, Literal

from mbq_export.errors import InternalError

Op = Literal["weight_only", "int8"]

GEMV_ROWS: Final = 8
"""Rows of activations up to which each lane multiplies its own weights; from here on blocks are multiplied."""
TILE_ROWS: Final = 16
TILE_COLUMNS: Final = 128
WIDE_BLOCKS: Final = frozenset({90, 100, 103})
"""Compute capabilities whose dot reads shared memory, so that 128 rows fit the registers; elsewhere they spill."""
LARGE: Final = 4096
"""N and K of a layer that fills every block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemv:
    """A lane-axis multiplication.

    Attributes:
        n_tiles: Tiles of 16 rows of W per program.
        k_tiles: Tiles of 128 columns that a program reads at once.
        rows: Rows of activations that fit, a power of two.
        num_warps: Warps per program.
    """

    n_tiles: int
    k_tiles: int
    rows: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the kernel."""
        return {"NT": self.n_tiles, "KB": self.k_tiles, "MR": self.rows}

    @property
    def name(self) -> str:
        """For reports of compilations."""
        return f"gemv-m{self.rows}"

    def grid(self, *, n: int, m: int) -> tuple[int, int]:
        """Programs along N and along M, which one program covers."""
        if m > self.rows:
            raise InternalError("E9002", f"{m} rows of activations for a kernel of {self.rows}.")
        return -(-n // (TILE_ROWS * self.n_tiles)), 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemm:
    """A multiplication in blocks.

    Attributes:
        n_tiles: Tiles of 16 rows of W per program, at least 2: a dot has no fewer than 16 columns.
        rows: Rows of activations per program, at least 16.
        num_warps: Warps per program.
    """

    n_tiles: int
    rows: int
    num_warps: int

    @property
    def constants(self) -> dict[str, int]:
        """Compile-time arguments of the kernel."""
        return {"NT": self.n_tiles, "BM": self.rows}

    @property
    def name(self) -> str:
        """For reports of compilations."""
        return f"gemm-m{self.rows}"

    def grid(self, *, n: int, m: int) -> tuple[int, int]:
        """Programs along N and along M."""
        return -(-n // (TILE_ROWS * self.n_tiles)), -(-m // self.rows)


def select_config(op: Op, *, sm: int, n: int, k: int, m: int) -> Gemv | Gemm:
    """Choose for one call; every shape has a legal answer.

    Args:
        op: Which kernel.
        sm: Compute capability, for example 90; 0 for the interpreter.
        n: N, at least 1.
        k: K, at least 1.
        m: Rows of activations, at least 1.
    """
    if m <= GEMV_ROWS:
        rows = _power_of_two(m, 1, GEMV_ROWS)
        # A lane holds 8 columns of each row of x per tile it reads at once: more rows, fewer tiles.
        at_once = max(8 // rows, 4 if op == "int8" else 2)
        # On 12.x, eight 3-bit tiles with groups of 32 spill.
        most = 4 if sm >= 120 and op == "weight_only" else 8
        k_tiles = _power_of_two(-(-k // TILE_COLUMNS), 1, min(at_once, most))
        # The interpreter pays per program, not per element.
        n_tiles = 1 if sm else _power_of_two(-(-n // TILE_ROWS), 1, 4)
        return Gemv(n_tiles=n_tiles, k_tiles=k_tiles, rows=rows, num_warps=4)
    rows = _power_of_two(m, 16, 128 if sm in WIDE_BLOCKS else 64)
    # Few rows leave few programs: narrow blocks, which also keep four warps from spilling.
    n_tiles = _power_of_two(-(-n // TILE_ROWS), 2, 4 if rows >= 64 else 2)
    return Gemm(n_tiles=n_tiles, rows=rows, num_warps=8 if rows >= 64 else 4)


def main_configs(op: Op, *, sm: int) -> tuple[Gemv | Gemm, ...]:
    """Return what large layers get, for every number of rows: the configurations that are compiled ahead of time."""
    chosen = (
        select_config(op, sm=sm, n=LARGE, k=LARGE, m=m) for m in (1, 2, 4, 8, 16, 32, 64, 128)
    )
    return tuple(dict.fromkeys(chosen))


def _power_of_two(wanted: int, smallest: int, largest: int) -> int:
    """The power of two at or above ``wanted``, between two powers of two."""
    return min(max(1 << (wanted - 1).bit_length(), smallest), largest)
