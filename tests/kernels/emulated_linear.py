"""Run problems with known answers on the emulated kernel library, under every order that threads may take."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbq_export.errors import MachineError
from mbq_kernels.comparison import Family
from mbq_kernels.library import KernelLibrary, LinearCall
from mbq_kernels.testing import Problem, assert_close
from tests.kernels.emulated import ROOT, BlockOrder, Buffer, Schedule, loaded

FORCED_GEMM: Final = 101
"""Smallest gemm config: also for the few rows that selection gives to skinny."""
LARGEST_SKINNY: Final = 8
DTYPE_NAMES: Final = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a right kernel's result does not depend on.

    Attributes:
        schedule: Who goes on when a thread waits.
        block_order: Which block comes next.
        seed: Of both.
        poison: What shared memory, workspace and output are filled with before.
    """

    schedule: Schedule = Schedule.FORWARD
    block_order: BlockOrder = BlockOrder.FORWARD
    seed: int = 0
    poison: int = 0xFF


SETTINGS: Final = (
    Setting(),
    Setting(schedule=Schedule.REVERSE, block_order=BlockOrder.REVERSE, poison=0x5A),
    Setting(schedule=Schedule.SKEWED, block_order=BlockOrder.ROTATED, seed=1),
    Setting(schedule=Schedule.SHUFFLED, block_order=BlockOrder.SHUFFLED, seed=2, poison=0x5A),
)
"""All schedules, all block orders, both poisons: 0xFF is NaN in every float format, 0x5A a large integer."""


def library_path(mutant: int = 0, source: str = "") -> Path:
    """The emulated library, made if it is stale; with a planted defect in one source if `mutant` is not 0.

    Extra flags of the compiler, a sanitizer's for example, come from the environment: MBQ_EMULATED_FLAGS.
    """
    flags = [f"--flag={flag}" for flag in os.environ.get("MBQ_EMULATED_FLAGS", "").split()]
    name = f"mutant_{mutant}_{source}" if mutant else "linear"
    out = ROOT / "build" / "emulation" / f"{name}{'_flags' if flags else ''}.so"
    defines = ["--define", f"MBQ_MUTANT={mutant}", "--define-in", source] if mutant else []
    command = [sys.executable, ROOT / "kernels/build.py", "--emulated", "-o", out, *defines, *flags]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    return out


class FaultError(AssertionError):
    """The emulation found something wrong with a kernel."""


def as_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor of any dtype."""
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


class Emulator:
    """The emulated kernel library, with memory whose edges are watched."""

    def __init__(self, path: Path) -> None:
        self.library = KernelLibrary(loaded(path), path)

    @classmethod
    @functools.cache
    def unbroken(cls) -> "Emulator":
        """The library as it is; one per process."""
        return cls(library_path())

    def set_up(self, setting: Setting, buffers: list[Buffer]) -> None:
        """Choose the order of things and allow access to nothing but these buffers."""
        cdll = self.library.cdll
        assert (
            cdll.mbq_emulation_configure(setting.schedule, setting.seed, setting.block_order) == 0
        )
        cdll.mbq_emulation_poison(setting.poison)
        cdll.mbq_emulation_forget_all()
        for buffer in buffers:
            buffer.register(cdll)

    def finish(self, buffers: list[Buffer]) -> None:
        """Look for stray writes."""
        self.library.cdll.mbq_emulation_forget_all()
        for buffer in buffers:
            buffer.assert_guards_intact()

    def linear(self, problem: Problem, setting: Setting, config: int | None = None) -> Tensor:
        """(M, N) output of one call.

        Raises:
            FaultError: If the emulation reports one.
        """
        case = problem.case
        buffers, call = described(problem)
        size = self.library.workspace_bytes(call, max_m=case.m)
        y = Buffer(problem.poisoned_output().nbytes, writable=True)
        scratch = Buffer(size, writable=True)
        y.bytes[:], scratch.bytes[:] = setting.poison, setting.poison
        everything = [*buffers.values(), y, *([scratch] if size else [])]
        self.set_up(setting, everything)
        try:
            self.library.linear(
                call,
                m=case.m,
                x=buffers["x"].pointer,
                y=y.pointer,
                workspace=(scratch.pointer, size) if size else (0, 0),
                config=config,
            )
        except MachineError as error:
            raise FaultError(self.library.cdll.mbq_emulation_message().decode()) from error
        finally:
            self.finish(everything)
        shape = problem.answer.reference.shape
        return torch.from_numpy(y.bytes.copy()).view(case.dtype).view(shape)


def described(problem: Problem) -> tuple[dict[str, Buffer], LinearCall]:
    """The inputs of a problem in watched memory, and the call that names them."""
    case, tiled = problem.case, problem.tiled
    buffers = {
        "codes": Buffer.of(tiled.codes),
        "scales": Buffer.of(tiled.scales),
        "x": Buffer.of(as_bytes(problem.x)),
    }
    if tiled.zeros is not None:
        buffers["zeros"] = Buffer.of(tiled.zeros)
    if tiled.bias is not None:
        bias = torch.from_numpy(np.ascontiguousarray(tiled.bias)).to(case.dtype)
        buffers["bias"] = Buffer.of(as_bytes(bias))
    if problem.residual is not None:
        buffers["residual"] = Buffer.of(as_bytes(problem.residual))
    call = LinearCall(
        scheme=case.scheme,
        dtype=DTYPE_NAMES[case.dtype],
        n=case.n,
        k=case.k,
        group_size=max(case.group_size, 0),
        epilogue=case.epilogue.value.replace("-", "_"),
        **{name: buffer.pointer for name, buffer in buffers.items() if name != "x"},
    )
    return buffers, call


def checked(
    emulator: Emulator,
    problem: Problem,
    config: int | None = None,
    settings: tuple[Setting, ...] = SETTINGS,
) -> Tensor:
    """The output: within tolerance, and the same bytes under all settings.

    Raises:
        AssertionError: If it is neither, or the emulation reports a fault.
    """
    outputs = [emulator.linear(problem, setting, config) for setting in settings]
    skinny = problem.case.m <= LARGEST_SKINNY if config is None else config < FORCED_GEMM
    assert_close(outputs[0], problem, family=Family.SKINNY if skinny else Family.GEMM)
    first = as_bytes(outputs[0]).tobytes()
    for setting, other in zip(settings, outputs, strict=True):
        assert as_bytes(other).tobytes() == first, f"{problem.case.name} differs under {setting}"
    return outputs[0]
