"""Memory for the emulated kernel library, which lets a kernel touch only what it was shown."""

import ctypes
from collections.abc import Iterable

from torch import Tensor

from mbq_export.errors import MachineError
from mbq_kernels.bench.entrant import Setting
from mbq_kernels.library import KernelLibrary


def check_emulated(library: KernelLibrary) -> None:
    """Refuse a library that only a GPU can run.

    Raises:
        MachineError: E3005.
    """
    if not hasattr(library.cdll, "mbq_emulation_register"):
        raise MachineError(
            "E3005",
            f"{library.path} is not the emulated library.",
            why="a dry run has no GPU to run it on",
            fix="python kernels/build.py --emulated",
        )


def show(setting: Setting, *, reads: Iterable[Tensor | None], writes: Iterable[Tensor]) -> None:
    """Tell an emulated library what the next launch may touch; nothing on a GPU, which has no such rule.

    Args:
        setting: Where the launch will run.
        reads: What it may read.
        writes: What it may write as well.
    """
    library = setting.library
    if setting.on_gpu or library is None:
        return
    library.cdll.mbq_emulation_forget_all()
    register = library.cdll.mbq_emulation_register
    register.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensors, writable in ((reads, 0), (writes, 1)):
        for tensor in tensors:
            if tensor is not None and tensor.nbytes:
                library.check(
                    register(tensor.data_ptr(), tensor.nbytes, writable), what="show a buffer"
                )
