"""The machine that was measured: card, driver, versions, sources; clocks, power and temperature as found.

Read through NVML where the driver brings it, never set. What nobody tells is null beside the reason.
"""

import ctypes
import hashlib
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch

from mbq_export import __version__

NVML: Final = "libnvidia-ml.so.1"
CLOCK_SM, CLOCK_MEMORY, SENSOR_GPU = 1, 2, 0
NO_GPU: Final = "no GPU"
PACKAGES: Final = ("torch", "triton", "numpy")
ROOT: Final = Path(__file__).parents[3]
READ_BYTES: Final = 1 << 20
GIT_HASH: Final = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The GPU that is timed, or the CPU of a rehearsal.

    Attributes:
        name: As the driver spells it.
        sm: 10 * major + minor; None on a CPU.
        sm_count: Streaming multiprocessors.
        l2_bytes: Its last cache.
        memory_bytes: Of the device.
        smem_optin: Bytes of shared memory one block may have.
    """

    name: str
    sm: int | None
    sm_count: int
    l2_bytes: int
    memory_bytes: int
    smem_optin: int

    @classmethod
    def of(cls, device: torch.device) -> "Device":
        """Describe a device of torch."""
        if device.type != "cuda":
            return cls(name=NO_GPU, sm=None, sm_count=0, l2_bytes=0, memory_bytes=0, smem_optin=0)
        found = torch.cuda.get_device_properties(device)
        return cls(
            name=found.name,
            sm=10 * found.major + found.minor,
            sm_count=found.multi_processor_count,
            l2_bytes=found.L2_cache_size,
            memory_bytes=found.total_memory,
            smem_optin=found.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # stubs lack it
        )

    def as_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "name": self.name,
            "sm": self.sm,
            "sm_count": self.sm_count,
            "l2_bytes": self.l2_bytes,
            "memory_bytes": self.memory_bytes,
        }


def software(library: Path | None) -> dict[str, Any]:
    """Versions of everything that takes part, the revision of the sources and the hash of the library."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "mbq_export": __version__,
        "python": platform.python_version(),
        **versions,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "revision": revision(ROOT),
        "sources_sha256": sources_sha256(ROOT / "kernels"),
        "library_sha256": None if library is None else _sha256(library),
    }


def revision(root: Path) -> str | None:
    """Commit that a checkout is at, read from its ``.git`` folder; None outside a checkout."""
    head = root / ".git" / "HEAD"
    if not head.is_file():
        return None
    text = head.read_text().strip()
    if not text.startswith("ref: "):
        return text[:GIT_HASH]
    name = text.removeprefix("ref: ")
    loose, packed = root / ".git" / name, root / ".git" / "packed-refs"
    if loose.is_file():
        return loose.read_text().strip()
    lines = packed.read_text().splitlines() if packed.is_file() else []
    return next((line.split()[0] for line in lines if line.endswith(f" {name}")), None)


def sources_sha256(kernels: Path) -> str | None:
    """One hash over the names and bytes of all device sources; None where there are none."""
    files = sorted(
        path
        for folder in ("include", "src", "mbq_kernels")
        for path in (kernels / folder).rglob("*")
        if path.suffix in {".h", ".cuh", ".cu", ".inc", ".py"}
    )
    if not files:
        return None
    whole = hashlib.sha256()
    for path in files:
        whole.update(
            f"{path.relative_to(kernels).as_posix()}\0".encode() + path.read_bytes() + b"\0"
        )
    return whole.hexdigest()


class Sensors:
    """Clocks, power and temperature of one card through NVML; answers nothing where NVML is missing."""

    def __init__(self, device: torch.device) -> None:
        """Open the card by its UUID, since NVML and CUDA may count cards differently."""
        self._nvml: ctypes.CDLL | None = None
        self._card = ctypes.c_void_p()
        self.why = "no GPU is timed"
        if device.type != "cuda":
            return
        try:
            nvml = ctypes.CDLL(NVML)
        except OSError as error:
            self.why = f"NVML does not load: {error}"
            return
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        status = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(
            uuid, ctypes.byref(self._card)
        )
        if status:
            self.why = f"NVML status {status}"
            return
        self._nvml, self.why = nvml, ""

    def read(self) -> dict[str, Any]:
        """Return what the card shows now."""
        if self._nvml is None:
            return {"sensors": None, "sensors_why": self.why}
        return {
            "sensors": {
                "sm_mhz": self._number("nvmlDeviceGetClockInfo", CLOCK_SM),
                "memory_mhz": self._number("nvmlDeviceGetClockInfo", CLOCK_MEMORY),
                "power_mw": self._number("nvmlDeviceGetPowerUsage"),
                "temperature_c": self._number("nvmlDeviceGetTemperature", SENSOR_GPU),
                "throttle_reasons": self._reasons(),
            }
        }

    def _number(self, function: str, *which: int) -> int | None:
        value = ctypes.c_uint()
        status = getattr(self._nvml, function)(self._card, *which, ctypes.byref(value))
        return None if status else value.value

    def _reasons(self) -> int | None:
        """Bits of nvmlClocksThrottleReasons; 0 and 1 (idle) mean that nothing slows the card."""
        value = ctypes.c_ulonglong()
        assert self._nvml is not None
        status = self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons(
            self._card, ctypes.byref(value)
        )
        return None if status else value.value


def _driver() -> str | None:
    """The driver's version; None where NVML is missing."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return None
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return None
    return text.value.decode()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _sha256(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            whole.update(part)
    return whole.hexdigest()
