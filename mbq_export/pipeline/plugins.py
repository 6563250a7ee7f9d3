"""Which form of the decoder engines get, and the plugin library they need: searched, checked, and put into the bundle."""

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mbq_export.errors import MbqError
from mbq_export.pipeline.lowering import AUTO, engine_lowering
from mbq_export.plugin_library import (
    FILE_NAME,
    RECORD_NAME,
    RECORD_SCHEMA,
    PluginLibrary,
    bundle_folder,
    find_plugin_library,
)
from mbq_export.schemes.base import QuantScheme
from mbq_export.target import Target
from mbq_export.writing import explained, json_bytes, write_file

logger = logging.getLogger(__name__)

PLUGIN: Final = "plugin"
QDQ: Final = "qdq"
MODE: Final = 0o644
"""A library that others may write to is not loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineForm:
    """How the decoder's linears get into engines.

    Attributes:
        lowering: Name of the form; None if there is no graph for engines.
        library: The plugins; None if the form has none, or no engine is built here.
        reason: Why it is not the form with plugins, where that would have been chosen; else empty.
    """

    lowering: str | None
    library: PluginLibrary | None = None
    reason: str = ""


def engine_form(
    asked: str,
    *,
    targets: Sequence[Target],
    scheme: QuantScheme | None,
    group_size: int,
    built: Sequence[Target],
    named: Path | None = None,
) -> EngineForm:
    """Decide the form of the decoder and find its plugins.

    Args:
        asked: ``plugin``, ``qdq`` or ``auto``, which takes plugins where they fit and a library is found.
        targets: Devices that engines are for.
        scheme: Number format; None for the unquantized baseline.
        group_size: Columns that share a scale.
        built: Those of them whose engines are built here.
        named: File of ``--plugin-lib``.

    Raises:
        UsageError: E2001, E2002, E2006, see `engine_lowering`.
        MachineError: E3005 if plugins are wanted, or nothing else fits, and there is no library.
        FormatError: E4701, E4703 for a file that is no library of ours.
        IncompatibleError: E7003, E7008 for a library of another release or for other GPUs.
    """

    def lowering(name: str) -> str | None:
        return engine_lowering(name, targets=targets, scheme=scheme, group_size=group_size)

    chosen = lowering(asked)
    if chosen != PLUGIN or not built:
        return EngineForm(lowering=chosen)
    try:
        sms = [target.sm for target in built if target.sm is not None]
        library = find_plugin_library(named=named, sms=sms)
    except MbqError as error:
        if asked != AUTO or named is not None or not _fits(lowering):
            raise
        reason = f"{error.message} {error.fix[0]}"
        logger.warning("engines get the %s form, without plugins: %s", QDQ, reason)
        return EngineForm(lowering=QDQ, reason=reason)
    return EngineForm(lowering=chosen, library=library)


def pack_library(library: PluginLibrary, bundle: Path) -> Path:
    """Copy a library into a bundle and describe it there.

    Returns:
        Its folder.
    """
    folder = bundle / bundle_folder()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library.path, folder / FILE_NAME)
        (folder / FILE_NAME).chmod(MODE)
    record = {
        "schema": RECORD_SCHEMA,
        "abi": library.abi,
        "sha256": library.sha256,
        "archs": list(library.archs),
        "trt_headers": library.headers,
    }
    write_file(folder / RECORD_NAME, json_bytes(record))
    return folder


def _fits(lowering: Callable[[str], str | None]) -> bool:
    """Whether standard operators hold the format."""
    try:
        return lowering(QDQ) == QDQ
    except MbqError:
        return False
