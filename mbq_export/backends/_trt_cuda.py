"""As much of the CUDA driver as an engine needs: memory, copies, a stream, a recorded graph. Through ctypes.

The driver's own library is there wherever a GPU works, whatever toolkit is installed; its primary context is the one
that TensorRT uses. Names and signatures: CUDA Driver API.
"""

import ctypes
from typing import Any, Final

from mbq_export.backends._trt_job import Refused

LIBRARY: Final = "libcuda.so.1"
OUT_OF_MEMORY: Final = 2
RELAXED: Final = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED: TensorRT may call what other modes forbid."""
NON_BLOCKING: Final = 1


class Cuda:
    """The first GPU's primary context, one stream, and what is allocated there."""

    def __init__(self, library: Any | None = None) -> None:
        """Load the driver and make a stream.

        Args:
            library: Its functions; None loads them.

        Raises:
            Refused: ``gpu-missing`` without a driver or a GPU, ``gpu-memory`` or ``gpu-error`` if it fails.
        """
        try:
            self._cu = ctypes.CDLL(LIBRARY) if library is None else library
        except OSError as error:
            raise Refused("gpu-missing", f"The NVIDIA driver is not installed: {error}.") from error
        if self._cu.cuInit(0):
            raise Refused("gpu-missing", "The NVIDIA driver finds no GPU.")
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        self.stream = stream.value or 0

    def allocate(self, size: int) -> int:
        """Return the address of ``size`` bytes, zeroed: what is never written must not be NaN."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        self.zero(address.value, size)
        return address.value

    def zero(self, address: int, size: int) -> None:
        """Set bytes to 0, in the stream's order."""
        self._call(
            "cuMemsetD8Async",
            ctypes.c_uint64(address),
            ctypes.c_ubyte(0),
            ctypes.c_size_t(size),
            ctypes.c_void_p(self.stream),
        )

    def upload(self, address: int, data: int, size: int) -> None:
        """Copy from host memory at ``data``, in the stream's order."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_uint64(address),
            ctypes.c_void_p(data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(self.stream),
        )

    def download(self, data: int, address: int, size: int) -> None:
        """Copy to host memory at ``data``, in the stream's order."""
        self._call(
            "cuMemcpyDtoHAsync_v2",
            ctypes.c_void_p(data),
            ctypes.c_uint64(address),
            ctypes.c_size_t(size),
            ctypes.c_void_p(self.stream),
        )

    def wait(self) -> None:
        """Wait until the stream is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def begin_capture(self) -> None:
        """Record what is put into the stream instead of running it."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(self.stream), RELAXED)

    def end_capture(self) -> int:
        """Return what was recorded, ready to run; 0 if it cannot be recorded."""
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        if self._cu.cuStreamEndCapture(ctypes.c_void_p(self.stream), ctypes.byref(graph)):
            return 0
        if self._cu.cuGraphInstantiateWithFlags(ctypes.byref(ready), graph, ctypes.c_uint64(0)):
            return 0
        return ready.value or 0

    def launch(self, ready: int) -> None:
        """Run what was recorded."""
        self._call("cuGraphLaunch", ctypes.c_void_p(ready), ctypes.c_void_p(self.stream))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cu, name)(*arguments)
        if status:
            kind = "gpu-memory" if status == OUT_OF_MEMORY else "gpu-error"
            raise Refused(kind, f"{name} returned CUDA error {status}.")
