"""Full TensorRT, 10.3 to 11.4: builds engines on the device that they run on, and runs them there.

Written to its documented API and to what the lean runtimes have of it. No machine of this project has it: whoever builds
an engine with it is the first to, and is asked to say so (docs/verification.md).
"""

from pathlib import Path
from typing import Final

from mbq_export.backends import _tensorrt, _trt_host
from mbq_export.backends.base import Availability, Backend, Engine, EngineRecord, EngineRequest
from mbq_export.progress import Progress

FLAVOUR: Final = "trt"


def available() -> Availability:
    """Whether it is installed."""
    return _tensorrt.availability(FLAVOUR)


def build(request: EngineRequest, progress: Progress) -> EngineRecord:
    """Build the engines of a request for the GPU of this machine. See `_tensorrt.build`."""
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
