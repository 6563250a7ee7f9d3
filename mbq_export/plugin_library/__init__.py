"""The compiled TensorRT plugins: what a library says of itself, and where one is found.

Search order: the file that is named (``--plugin-lib``), the bundle, the user's cache. A library carries a record in
its section ``.mbq_plugin``, so what it is gets known before anything of it runs:

    {"abi": 1, "kernel_abi": 1, "layout_version": 1, "trt_headers": "10.14.1"}
"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mbq_export import cache
from mbq_export.errors import FormatError, IncompatibleError, MachineError
from mbq_export.native import source_root, sources_sha256
from mbq_export.plugin_library.elf import SharedLibrary
from mbq_export.reading import parse_json, read_json, sha256_of

PLUGIN_ABI: Final = 1
"""Of the fields in a compiled engine; the same number as ``ops.PLUGIN_ABI``, which graphs and C++ have."""

FILE_NAME: Final = "libmbq_trt_plugins.so"
RECORD_NAME: Final = "plugin.json"
RECORD_SCHEMA: Final = "mbq-export/plugin@1"
CACHE_KIND: Final = "plugins"
BUNDLE_FOLDER: Final = "plugins"
SECTION: Final = ".mbq_plugin"


OLDEST_SM: Final = 80
"""Compute capability that the kernels need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginLibrary:
    """One compiled library, read but not loaded.

    Attributes:
        path: Absolute.
        sha256: Of the file.
        abi: Of the fields it writes into engines.
        archs: GPUs it has code for: ``sm_89`` machine code, ``compute_120`` PTX for that one and newer.
        headers: Version of the TensorRT headers it was compiled with, for example ``10.14.1``.
        found: Where: ``--plugin-lib``, ``bundle`` or ``cache``.
    """

    path: Path
    sha256: str
    abi: int
    archs: tuple[str, ...]
    headers: str
    found: str

    @property
    def record(self) -> dict[str, Any]:
        """What ``plugin.json`` beside it says of it."""
        return {
            "schema": RECORD_SCHEMA,
            "abi": self.abi,
            "sha256": self.sha256,
            "archs": list(self.archs),
            "trt_headers": self.headers,
        }

    def serves(self, sm: int) -> bool:
        """Whether a GPU can run it: machine code of the same generation and not newer, or PTX not newer."""
        # The CUDA runtime inside the library brings code for older GPUs, which our kernels do not have.
        if sm < OLDEST_SM:
            return False
        images = [(kind, int(number)) for kind, _, number in (a.partition("_") for a in self.archs)]
        return any(of <= sm and (kind == "compute" or of // 10 == sm // 10) for kind, of in images)


def bundle_folder() -> str:
    """Folder of this machine's library inside a bundle: ``plugins/linux-x86_64``."""
    return f"{BUNDLE_FOLDER}/{platform.system().lower()}-{platform.machine()}"


def find_plugin_library(
    *,
    named: Path | None = None,
    bundle: Path | None = None,
    sms: Sequence[int] = (),
    sha256: str | None = None,
) -> PluginLibrary:
    """Find the library that engines of this release load. It is read, not loaded.

    Args:
        named: File of ``--plugin-lib``; nothing else is searched if it is given.
        bundle: Folder of a bundle that may carry one.
        sms: Compute capabilities it must serve, for example ``(89, 120)``.
        sha256: The only file that will do, as a manifest says; None for any that fits.

    Raises:
        MachineError: E3005 if there is none; names the command that builds one.
        FormatError: E4701 for a file that is no library, E4602 for one that is not what its bundle says, E4703 for
            one in an unsafe place.
        IncompatibleError: E7003 for a library of another release or another hash, E7008 for other GPUs.
    """
    if named is not None:
        return _fitting(read_plugin_library(named, found="--plugin-lib"), sms, sha256)
    packed = bundle / bundle_folder() / FILE_NAME if bundle is not None else None
    if packed is not None and packed.is_file():
        _check_place(packed)
        library = read_plugin_library(packed, found="bundle")
        _check_record(library)
        return _fitting(library, sms, sha256)
    built = cached_libraries()
    right = [library for library in built if sha256 in {None, library.sha256}]
    serving = [library for library in right if all(map(library.serves, sms))]
    if serving:
        return max(serving, key=lambda each: (len(each.archs), each.sha256))
    if built:
        return _fitting((right or built)[0], sms, sha256)
    places = [*([str(packed)] if packed else []), f"{cache.folder(CACHE_KIND)} (for these sources)"]
    raise MachineError(
        "E3005",
        "There is no compiled plugin library for this release.",
        why=f"searched: --plugin-lib, {', '.join(places)}",
        fix=(build_command(sms), "--plugin-lib FILE", "--lowering qdq needs no plugins"),
    )


def build_command(sms: Sequence[int] = ()) -> str:
    """The command that compiles a library for some GPUs."""
    return "mbq-export plugins build" + "".join(f" --target sm{sm}" for sm in sorted(set(sms)))


def cached_libraries() -> list[PluginLibrary]:
    """Libraries in the user's cache that were compiled from the sources of this release."""
    sources = sources_sha256(source_root())
    return [
        read_plugin_library(entry / FILE_NAME, found="cache")
        for entry in cache.entries(CACHE_KIND)
        if (entry / FILE_NAME).is_file()
        and read_json(entry / RECORD_NAME).get("sources_sha256") == sources
    ]


def read_plugin_library(path: Path, *, found: str) -> PluginLibrary:
    """Say what a file is, from its bytes.

    Raises:
        FormatError: E4701 for a file that is no shared library for this machine.
        IncompatibleError: E7003 for a library that is not ours or of another release.
    """
    library = SharedLibrary.read(path)
    section = library.sections.get(SECTION, b"").rstrip(b"\0")
    record = parse_json(section, name=f"{SECTION} of {path.name}", code="E4701") if section else {}
    if record.get("abi") != PLUGIN_ABI:
        was = f"its plugin ABI is {record['abi']}" if record else f"it has no section {SECTION}"
        raise IncompatibleError(
            "E7003",
            f"{path} does not hold the plugins of this release.",
            why=f"{was}; wanted: plugin ABI {PLUGIN_ABI}",
            fix=(build_command(), "--plugin-lib FILE"),
        )
    return PluginLibrary(
        path=path.absolute(),
        sha256=sha256_of(path),
        abi=PLUGIN_ABI,
        archs=library.architectures,
        headers=str(record.get("trt_headers", "unknown")),
        found=found,
    )


def _fitting(library: PluginLibrary, sms: Sequence[int], sha256: str | None) -> PluginLibrary:
    if sha256 is not None and library.sha256 != sha256:
        raise IncompatibleError(
            "E7003",
            f"{library.path} is another plugin library than the engine was built with.",
            why=f"its SHA-256 is {library.sha256[:16]}..., the manifest says {sha256[:16]}...",
            fix=("build the engine again with this library", "--plugin-lib FILE"),
        )
    missing = [sm for sm in sms if not library.serves(sm)]
    if missing:
        raise IncompatibleError(
            "E7008",
            f"{library.path} has no code for {', '.join(f'sm{sm}' for sm in missing)}.",
            why=f"it holds {', '.join(library.archs) or 'no device code'}",
            fix=(build_command(sms),),
        )
    return library


def _check_place(path: Path) -> None:
    """Refuse a library that somebody else could have put there: loading it runs it."""
    for each in (path, path.parent):
        status = each.stat()
        if status.st_uid not in {os.getuid(), 0} or status.st_mode & 0o002:
            raise FormatError(
                "E4703",
                f"{path} is not loaded: others may write to {each}.",
                why=f"it belongs to user {status.st_uid} with mode {status.st_mode & 0o777:o}",
                fix=(f"chmod o-w {each}", f"--plugin-lib {path} if you trust it"),
            )


def _check_record(library: PluginLibrary) -> None:
    record = read_json(library.path.with_name(RECORD_NAME), code="E4604")
    if record.get("sha256") != library.sha256:
        raise FormatError(
            "E4602",
            f"{library.path} is not what {RECORD_NAME} beside it describes.",
            why=f"its SHA-256 is {library.sha256[:16]}..., not {str(record.get('sha256'))[:16]}...",
            fix=("copy the bundle again", build_command()),
        )
