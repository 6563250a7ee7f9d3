"""TensorRT for RTX: builds engines for RTX cards on any machine, and runs them on such a card."""

from pathlib import Path
from typing import Final

from mbq_export.backends import _tensorrt, _trt_host
from mbq_export.backends.base import Availability, Backend, Engine, EngineRecord, EngineRequest
from mbq_export.progress import Progress

FLAVOUR: Final = "rtx"


def available() -> Availability:
    """Whether engines can be built here; no GPU is needed for that."""
    return _tensorrt.availability(FLAVOUR)


def build(request: EngineRequest, progress: Progress) -> EngineRecord:
    """Build the engines of a request, ahead of time, in child processes. See `_tensorrt.build`."""
    return _tensorrt.build(FLAVOUR, request, progress)


def open_engine(path: Path) -> Engine:
    """Load an engine in a process of its own. See `_trt_host.open_hosted`."""
    return _trt_host.open_hosted(FLAVOUR, path)


BACKEND: Final = Backend(
    name=FLAVOUR,
    lowerings=("plugin", "qdq"),
    isolated=True,
    available=available,
    open=open_engine,
    build=build,
)
