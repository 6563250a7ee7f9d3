"""ONNX Runtime: runs the graphs as they are, on the CPU or on CUDA where that is present.

Two defaults of ONNX Runtime would be silent, so neither is left to it: blocked INT4 products round the
activations to int8 unless told not to (0.4 to 0.9 % error per linear; EXPORT.md 7.4), and a provider that
cannot start is replaced by the CPU.
"""

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Self

from numpy.typing import NDArray

from mbq_export.backends._feeds import checked_feeds
from mbq_export.backends.base import Availability, Backend, TensorSpec
from mbq_export.errors import BuildError, FormatError, MachineError, MbqError, ResourceError

logger = logging.getLogger(__name__)

EXACT: Final = 0
FAST: Final = 4
"""Accuracy levels of 4-bit products: float32 activations, or activations rounded to int8."""

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"

# Both unpack into one folder, so the second one installed breaks the first.
PACKAGES: Final = ("onnxruntime", "onnxruntime-gpu")
INSTALL: Final = 'pip install "mbq-export[cpu]"'
INSTALL_GPU: Final = 'pip install "mbq-export[gpu]"'

DEVICE_FILES: Final = ("/dev/nvidiactl", "/dev/nvhost-gpu")
"""One of them exists where a CUDA driver serves a GPU: desktop and server, Jetson."""

CPU_QUOTA: Final = "/sys/fs/cgroup/cpu.max"

WARNINGS: Final = 2
FATAL_ONLY: Final = 4
"""Severities of ONNX Runtime's own log. Its errors reach us as exceptions, so printing them too is noise."""

DATA_FOLDER: Final = "session.model_external_initializers_file_folder_path"
"""Where a graph that is loaded from memory finds its external data."""

DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


class OrtEngine:
    """A graph loaded into ONNX Runtime.

    Attributes:
        provider: Where its nodes run, for example ``CPUExecutionProvider``.
    """

    def __init__(self, session: Any, *, name: str) -> None:
        """Wrap an ``onnxruntime.InferenceSession``."""
        self._session = session
        self._name = name
        self._inputs = tuple(_spec(port) for port in session.get_inputs())
        self._outputs = tuple(_spec(port) for port in session.get_outputs())
        self.provider = str(session.get_providers()[0])

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` wants, in graph order."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns, in graph order."""
        return self._outputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once. Float feeds are cast to the graph's float type.

        Raises:
            FormatError: E4102 for a missing, superfluous or misshapen feed.
            BuildError: E6011 if ONNX Runtime fails inside the graph.
            ResourceError: E5004, E5005 if it runs out of memory.
        """
        if self._session is None:
            raise BuildError(
                "E6011",
                f"{self._name} is closed.",
                why="an engine runs until close()",
                fix="open it again",
            )
        checked = checked_feeds(self._inputs, feeds, name=self._name)
        try:
            values = self._session.run(None, checked)
        except _ort_errors() as error:
            raise _failure("E6011", f"ONNX Runtime failed in {self._name}", error) from error
        return {spec.name: value for spec, value in zip(self._outputs, values, strict=True)}

    def close(self) -> None:
        """Free the session. Closing twice is allowed."""
        self._session = None

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the engine."""
        self.close()


def open_graph(
    path: Path,
    *,
    providers: Sequence[str] | None = None,
    threads: int = 0,
    accuracy_level: int = EXACT,
    proto: bytes | None = None,
) -> OrtEngine:
    """Load a graph.

    Args:
        path: ONNX file, external data beside it.
        providers: In order of preference; None takes CUDA where a device is present, else the CPU.
        threads: CPU threads; 0 takes all that this process may use.
        accuracy_level: `EXACT` or `FAST`.
        proto: Load this form of the file's protobuf instead, for example one with more outputs; external data
            are still those beside the file.

    Raises:
        MachineError: E3003 without ONNX Runtime, E3008 with two of them, E3006 without a provider.
        FormatError: E4404 if there is no such file.
        BuildError: E6010 if it refuses the graph.
        ResourceError: E5004, E5005 if the graph does not fit into memory.
    """
    runtime = _onnxruntime()
    wanted = tuple(providers) if providers else default_providers(runtime.get_available_providers())
    _check_offered(wanted, runtime.get_available_providers())
    if not path.is_file():
        raise FormatError(
            "E4404",
            f"There is no graph {path.name} in {path.parent}.",
            why="graphs are written by export",
            fix="mbq-export build, or export, writes them",
        )
    options = _session_options(runtime, threads=threads, accuracy_level=accuracy_level)
    if proto is not None:
        options.add_session_config_entry(DATA_FOLDER, str(path.parent.resolve()))
    try:
        session = runtime.InferenceSession(
            str(path) if proto is None else proto,
            options,
            # TF32 would keep 10 bits of every factor: not what an exact path promises.
            providers=[(name, {"use_tf32": "0"}) if name == CUDA else name for name in wanted],
            enable_fallback=0,
        )
    except _ort_errors() as error:
        raise _failure("E6010", f"ONNX Runtime refuses {path.name}", error) from error
    if session.get_providers()[0] != wanted[0]:
        raise _no_provider(wanted[0], f"it started on {session.get_providers()[0]} instead")
    return OrtEngine(session, name=path.name)


def default_providers(offered: Sequence[str]) -> tuple[str, ...]:
    """Return CUDA before the CPU where this package offers it and a device is present, else the CPU."""
    device = any(Path(name).exists() for name in DEVICE_FILES)
    return (CUDA, CPU) if CUDA in offered and device else (CPU,)


def installed_packages() -> dict[str, str]:
    """Return name and version of each ONNX Runtime distribution that is installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def check_packages(found: Mapping[str, str]) -> None:
    """Demand exactly one ONNX Runtime.

    Args:
        found: As `installed_packages` returns it.

    Raises:
        MachineError: E3003 for none, E3008 for two.
    """
    if not found:
        raise MachineError(
            "E3003",
            "ONNX Runtime is not installed.",
            why=f"this command runs ONNX graphs; one of {', '.join(PACKAGES)} is needed",
            fix=(INSTALL, f"{INSTALL_GPU}, with a CUDA GPU"),
        )
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in found.items())
        raise MachineError(
            "E3008",
            f"Two ONNX Runtimes are installed: {both}.",
            why="both unpack into the same folder, so one has overwritten files of the other",
            fix=f"pip uninstall {' '.join(PACKAGES)}, then {INSTALL} or {INSTALL_GPU}",
        )


def available() -> Availability:
    """Say whether ONNX Runtime works here, without importing it."""
    found = installed_packages()
    shown = ", ".join(f"{name} {version}" for name, version in found.items()) or "nothing"
    needed = f"one of {', '.join(PACKAGES)}"
    try:
        check_packages(found)
    except MachineError as error:
        return Availability(ok=False, found=shown, needed=needed, fix=error.fix[0])
    return Availability(ok=True, found=shown, needed=needed)


def granted_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, cut by the quota of its cgroup."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path(CPU_QUOTA).read_text().split()
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or the quota is "max"
        return max(1, cpus)


def _onnxruntime() -> Any:
    check_packages(installed_packages())
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MachineError(
            "E3003",
            f"ONNX Runtime does not import: {error}.",
            why="a library it needs is missing or of another version",
            fix=f"{INSTALL} in a fresh environment",
        ) from error


def _ort_errors() -> tuple[type[Exception], ...]:
    """Exception types of ONNX Runtime: they share no base class. It also lets pybind's own through."""
    native = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [value for value in vars(native).values() if isinstance(value, type)]
    return (
        *(kind for kind in own if issubclass(kind, Exception)),
        RuntimeError,
        ValueError,
        MemoryError,
    )


def _session_options(runtime: Any, *, threads: int, accuracy_level: int) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or granted_cpus()
    # Every step of a growing cache has its own shapes; a memory plan per shape would only pile up.
    options.enable_mem_pattern = False
    options.log_severity_level = WARNINGS if logger.isEnabledFor(logging.DEBUG) else FATAL_ONLY
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    # Without VNNI an x86 CPU would add pairs of int8 products in 16 bits, and saturate where weights have 8.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Sessions take turns (embedding, decoder, other bundles of a comparison): idle threads must not spin.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _check_offered(wanted: Sequence[str], offered: Sequence[str]) -> None:
    for name in wanted:
        if name not in offered:
            raise _no_provider(name, f"this package offers {', '.join(offered)}")


def _no_provider(name: str, found: str) -> MachineError:
    return MachineError(
        "E3006",
        f"ONNX Runtime cannot use {name}: {found}.",
        why="what was asked for is never replaced by something else",
        fix=(f"{INSTALL_GPU} and its CUDA libraries", "mbq-export doctor"),
    )


def _failure(code: str, what: str, error: Exception) -> MbqError:
    """Turn an exception of ONNX Runtime into ours, its words kept."""
    words = str(error).strip() or type(error).__name__
    if "alloc" in words.lower():
        kind = "E5005" if "cuda" in words.lower() else "E5004"
        return ResourceError(
            kind,
            f"{what}: out of memory.",
            why=words,
            fix=("use a shorter prompt, fewer images or fewer new tokens", "close other programs"),
        )
    return BuildError(
        code,
        f"{what}.",
        why=words,
        fix=("mbq-export inspect BUNDLE --verify", "export the model again"),
    )


def _spec(port: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else str(size or "?") for size in port.shape)
    return TensorSpec(name=port.name, dtype=DTYPES.get(port.type, port.type), shape=shape)


BACKEND: Final = Backend(
    name="ort", lowerings=("qdq", "reference"), isolated=False, available=available, open=open_graph
)
