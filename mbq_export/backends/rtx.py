"""TensorRT for RTX: builds engines for RTX cards, on any machine; running them is left to a later release."""

import shutil
from pathlib import Path
from typing import Final, NoReturn

from mbq_export.backends import _tensorrt
from mbq_export.backends.base import Availability, Backend, EngineRecord, EngineRequest
from mbq_export.errors import MachineError, UsageError
from mbq_export.progress import Progress

FLAVOUR: Final = "rtx"
NVIDIA: Final = "0x10de"
PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
RUNS_HERE: Final = "--backend ort runs the same bundle on this machine"


def available() -> Availability:
    """Whether engines can be built here; no GPU is needed for that."""
    return _tensorrt.availability(FLAVOUR)


def build(request: EngineRequest, progress: Progress) -> EngineRecord:
    """Build the engines of a request, ahead of time, in child processes. See `_tensorrt.build`."""
    return _tensorrt.build(FLAVOUR, request, progress)


def open_engine(path: Path) -> NoReturn:
    """Refuse to run an engine, naming what is missing and what works instead.

    Raises:
        MachineError: E3001 without a GPU, E3002 without its driver.
        UsageError: E2015 where both are there: this release has no runner for engines.
    """
    if not _has_nvidia_gpu(PCI_DEVICES):
        raise MachineError(
            "E3001",
            f"{path.name} cannot run: this machine has no NVIDIA GPU.",
            why="an engine holds code for one kind of GPU",
            fix=RUNS_HERE,
        )
    if shutil.which("nvidia-smi") is None:
        raise MachineError(
            "E3002",
            f"{path.name} cannot run: the NVIDIA driver is not installed.",
            why="there is a GPU, but no nvidia-smi on PATH",
            fix=("install the driver", RUNS_HERE),
        )
    raise UsageError(
        "E2015",
        f"{path.name} is not run yet: this release builds TensorRT for RTX engines only.",
        why="the engine runner is not part of this release",
        fix=RUNS_HERE,
    )


def _has_nvidia_gpu(devices: Path) -> bool:
    return any(file.read_text().strip() == NVIDIA for file in sorted(devices.glob("*/vendor")))


BACKEND: Final = Backend(
    name=FLAVOUR,
    lowerings=("plugin", "qdq"),
    isolated=True,
    available=available,
    open=open_engine,
    build=build,
)
