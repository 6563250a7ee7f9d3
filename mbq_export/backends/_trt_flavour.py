"""Which TensorRT is installed, found without importing it, and the environment its child needs.

The parser of TensorRT for RTX opens ``libtensorrt_rtx.so`` by that name when it adds a plugin, and aborts the
process if there is none; the wheel ships only ``libtensorrt_rtx.so.1``. So each child gets a private folder
with a link of the plain name, first on its library path. Nothing in site-packages is changed.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import mbq_export
from mbq_export.errors import MachineError

LINKS: Final = "lib"
"""Folder with the link, relative: the child runs in the folder that holds it."""

OWN_FREE_LISTS: Final = "glibc.malloc.tcache_count=65535"
"""Memory that one thread of the library frees is not reused by another. Without it 11 of 60 builds of a
two-layer decoder on a busy machine ordered a table in the plan differently; with it none of 60."""

UNKNOWN: Final = "unknown"
"""Version of a package that does not tell it."""

PASSED_ON: Final = ("LD_LIBRARY_PATH", "PYTHONPATH", "PATH", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flavour:
    """One packaging of TensorRT.

    Attributes:
        name: ``rtx`` or ``trt``.
        title: What people call it.
        modules: Import names, newest first.
        distributions: Packages that tell its version, the first that is there.
        libraries: Package that holds the shared libraries, or nothing where the module finds its own.
        link: Name by which its parser opens the library, or nothing.
        extra: Extra of this project that installs it.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    libraries: str
    link: str
    extra: str

    @property
    def install(self) -> str:
        """Command that installs it."""
        return f'pip install "mbq-export[{self.extra}]"'


FLAVOURS: Final = {
    "rtx": Flavour(
        name="rtx",
        title="TensorRT for RTX",
        modules=("tensorrt_rtx_bindings", "tensorrt_rtx"),
        distributions=("tensorrt-rtx-cu13-bindings", "tensorrt-rtx"),
        libraries="tensorrt_rtx_libs",
        link="libtensorrt_rtx.so",
        extra="rtx",
    ),
    "trt": Flavour(
        name="trt",
        title="TensorRT",
        modules=("tensorrt",),
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        libraries="",
        link="",
        extra="trt",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Installed:
    """A flavour found on this machine.

    Attributes:
        flavour: Which.
        module: Name to import, in the child only.
        version: Of its package, for example ``1.7.1.116``.
        library: The shared library that the link must lead to; None where there is no link.
    """

    flavour: Flavour
    module: str
    version: str
    library: Path | None

    @property
    def label(self) -> str:
        """Flavour and version: ``rtx 1.7.1.116``."""
        return f"{self.flavour.name} {self.version}"


def find(name: str) -> Installed:
    """Look a flavour up.

    Raises:
        MachineError: E3003 if its module or its library is missing.
    """
    flavour = FLAVOURS[name]
    module = next((each for each in flavour.modules if importlib.util.find_spec(each)), None)
    if module is None:
        raise missing(flavour, f"searched: {', '.join(flavour.modules)}")
    library = _library(flavour) if flavour.libraries else None
    if flavour.libraries and library is None:
        raise missing(flavour, f"{module} is there, {flavour.link}.* of {flavour.libraries} is not")
    return Installed(flavour=flavour, module=module, version=_version(flavour), library=library)


def missing(flavour: Flavour, found: str) -> MachineError:
    """Say that a flavour cannot be used, and how to get it."""
    return MachineError(
        "E3003",
        f"{flavour.title} is not installed.",
        why=found,
        fix=(
            flavour.install,
            "leave --target out: the bundle runs on ONNX Runtime without an engine",
        ),
    )


def child_environment(installed: Installed, workdir: Path) -> dict[str, str]:
    """Prepare the environment of one child that runs in ``workdir``.

    Args:
        installed: The flavour.
        workdir: Private folder of this call; the link folder is made in it and vanishes with it.

    Returns:
        What the child needs and no more: the environment's length shifts the heap, and with it the order of
        tables in a plan.
    """
    links = workdir / LINKS
    links.mkdir(mode=0o700)
    if installed.library is not None:
        (links / installed.flavour.link).symlink_to(installed.library)
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    root = str(Path(mbq_export.__file__).parents[1])
    return {
        **kept,
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [LINKS, kept.get("LD_LIBRARY_PATH")])),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")])),
        "PYTHONHASHSEED": "0",
        "GLIBC_TUNABLES": OWN_FREE_LISTS,
        "OPENBLAS_NUM_THREADS": "1",  # numpy's threads would allocate at times of their own
        "LC_ALL": "C.UTF-8",
        "TMPDIR": ".",
    }


def _library(flavour: Flavour) -> Path | None:
    """The real file behind the flavour's versioned library name."""
    spec = importlib.util.find_spec(flavour.libraries)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob(f"{flavour.link}.*")):
            return path.resolve()
    return None


def _version(flavour: Flavour) -> str:
    for distribution in flavour.distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return UNKNOWN
