"""Load a plugin library in a child process and compare what it offers with what graphs ask for."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mbq_export.errors import (
    BuildError,
    FormatError,
    IncompatibleError,
    MachineError,
    ResourceError,
)
from mbq_export.native import ChildResult, run_child
from mbq_export.plugin_library import (
    FILE_NAME,
    PluginLibrary,
    build_command,
    bundle_folder,
    find_plugin_library,
    read_plugin_library,
)
from mbq_export.reading import read_json

LOAD_TIMEOUT_S: Final = 60.0
NAMESPACE: Final = "mbq"
VERSION: Final = "1"
PLUGINS: Final = ("W3Linear", "W4A16Linear", "W4A8Linear")
"""As in ``ops.OPS``; a test compares them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A library that was loaded.

    Attributes:
        library: What it is.
        creators: (name, version, namespace) of each, in its order.
    """

    library: PluginLibrary
    creators: tuple[tuple[str, str, str], ...]


def check_plugin_library(path: Path, *, timeout_s: float = LOAD_TIMEOUT_S) -> Offered:
    """Check a library, or the one of a bundle, by its file and by loading it in a child.

    Args:
        path: A library, or a folder that holds one or is a bundle.
        timeout_s: After it the child is ended.

    Raises:
        FormatError: E4001 for a folder without a library; E4701, E4703 or E4602, see `find_plugin_library`.
        IncompatibleError: E7003 if it does not offer exactly the plugins of this release.
        MachineError: E3005 if the loader refuses it.
        BuildError: E6003 if it crashes the child.
        ResourceError: E5006 if the child does not end.
    """
    library = _library_at(path)
    return Offered(library=library, creators=loaded(library.path, timeout_s=timeout_s))


def loaded(path: Path, *, timeout_s: float = LOAD_TIMEOUT_S) -> tuple[tuple[str, str, str], ...]:
    """Load a file in a child and list its creators.

    Raises:
        IncompatibleError, MachineError, BuildError, ResourceError: As `check_plugin_library`.
    """
    with tempfile.TemporaryDirectory(prefix="mbq-") as folder:
        result_file = Path(folder, "result.json")
        program = Path(__file__).with_name("_load.py")
        command = [sys.executable, "-I", str(program), str(path.absolute()), str(result_file)]
        result = run_child(command, log=Path(folder, "log"), timeout_s=timeout_s)
        said = read_json(result_file) if result.ok and result_file.is_file() else None
        if said is None:
            raise _died(path, result, timeout_s)
    if "refused" in said:
        raise MachineError(
            "E3005",
            f"{path} cannot be loaded.",
            why=str(said["refused"]),
            fix=(build_command(), "--plugin-lib FILE"),
        )
    creators = tuple((name, version, space) for name, version, space in said.get("creators", ()))
    wanted = tuple((name, VERSION, NAMESPACE) for name in PLUGINS)
    if set(creators) != set(wanted):
        raise IncompatibleError(
            "E7003",
            f"{path} does not offer the plugins of this release.",
            why=str(said.get("wrong", f"it offers {_names(creators)}; wanted {_names(wanted)}")),
            fix=(build_command(), "--plugin-lib FILE"),
        )
    return creators


def _library_at(path: Path) -> PluginLibrary:
    if not path.is_dir():
        return read_plugin_library(path, found="--plugin-lib")
    if (path / bundle_folder() / FILE_NAME).is_file():
        return find_plugin_library(bundle=path)
    if (path / FILE_NAME).is_file():
        return read_plugin_library(path / FILE_NAME, found="--plugin-lib")
    raise FormatError(
        "E4001",
        f"{path} holds no plugin library for this machine.",
        why=f"searched: {bundle_folder()}/{FILE_NAME}, {FILE_NAME}",
        fix=("name the library itself", build_command()),
    )


def _died(path: Path, result: ChildResult, timeout_s: float) -> BuildError | ResourceError:
    last = " | ".join(result.tail(3)) or "it said nothing"
    if result.timed_out:
        return ResourceError(
            "E5006",
            f"Loading {path} took longer than {timeout_s:.0f} s and was ended.",
            why=last,
            fix=build_command(),
        )
    how = result.signal or f"exit status {result.status}"
    return BuildError(
        "E6003",
        f"Loading {path} ended the child process with {how}.",
        why=last,
        fix=build_command(),
    )


def _names(creators: tuple[tuple[str, str, str], ...]) -> str:
    return ", ".join(f"{space}::{name} {version}" for name, version, space in creators) or "nothing"
