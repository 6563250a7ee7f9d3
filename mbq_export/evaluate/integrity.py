"""The structure tier: is every file of a bundle there, unchanged, and what it should be. Runs nothing.

Damage is an error of the bundle, not a gate that says no, so what is found here is raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from mbq_export.bundle import Bundle, unlisted_files
from mbq_export.checkpoint import QuantCheckpoint
from mbq_export.errors import FormatError, IncompatibleError, located
from mbq_export.export.check import Limits, check_graph
from mbq_export.export.untiled import check_same_weights
from mbq_export.plugin_library import BUNDLE_FOLDER, FILE_NAME
from mbq_export.progress import Progress, silent
from mbq_export.reading import contained, read_json, sha256_of
from mbq_export.report import Check
from mbq_export.runtime import RECORD

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

TIER: Final = "structure"
LICENCES: Final = ("LICENSE*", "weights/LICENSE*")
SIDECARS: Final = ("engine.json", "layers.json")


def check_structure(
    bundle: Bundle, *, progress: Progress = silent
) -> tuple[list[Check], list[dict[str, str]]]:
    """Check hashes, checkpoint, graphs, engines and licence.

    Args:
        bundle: An opened bundle.
        progress: Called after each hashed file.

    Returns:
        Passed checks, whose values say how much was looked at (``plugins``: linears whose tiles are the
        checkpoint's weights, bit for bit), and warnings (code, text).

    Raises:
        FormatError: E46xx for the bundle, E41xx for the checkpoint, E44xx for graphs, E4501 for engines.
        IncompatibleError: E7003 for engines without their plugin library, E7004 or E7005 for newer versions.
    """
    records = bundle.manifest["files"]
    Bundle.open(bundle.root, verify=True, progress=progress)
    with located("weights"):
        checkpoint = QuantCheckpoint.open(bundle.checkpoint_folder, verify=True)
    graphs = read_json(bundle.onnx / RECORD, code="E4604")["graphs"] if bundle.has_graphs else []
    tiled = 0
    for graph in graphs:
        path = contained(bundle.onnx, graph["file"], code="E4605")
        check_graph(path, Limits(target=_target(graph)))
        tiled += check_same_weights(path, checkpoint)
    found = {
        "files": len(records),
        "checkpoint": len(checkpoint.linears),
        "graphs": len(graphs),
        **({"plugins": tiled} if tiled else {}),
        "engines": _engines(bundle.engines),
    }
    _check_plugins(bundle)
    checks = [Check(name=name, tier=TIER, ok=True, value=value) for name, value in found.items()]
    return checks, _warnings(bundle, records)


def _target(graph: Mapping[str, Any]) -> str | None:
    form = graph["form"] or {}
    return "trt" if form.get("target") == "trt" else None


def _engines(folder: Path) -> int:
    """Count engine files, each beside its description.

    Raises:
        FormatError: E4501.
    """
    engines = sorted(folder.rglob("*.engine")) if folder.is_dir() else []
    for engine in engines:
        missing = [name for name in SIDECARS if not (engine.parent / name).is_file()]
        if missing or not engine.stat().st_size:
            raise FormatError(
                "E4501",
                f"{engine.relative_to(folder)} is empty, or has no {' and '.join(missing)} beside it.",
                why="what an engine was built from and for is kept beside it",
                fix="build the bundle again",
            )
    return len(engines)


def _check_plugins(bundle: Bundle) -> None:
    """Compare the plugin libraries that engines were built with to those that the bundle carries.

    Raises:
        IncompatibleError: E7003.
    """
    carried = {
        sha256_of(path) for path in sorted(bundle.root.glob(f"{BUNDLE_FOLDER}/*/{FILE_NAME}"))
    }
    for path in sorted(bundle.engines.rglob(SIDECARS[0])):
        plugin = read_json(path, code="E4604").get("plugin")
        if plugin is not None and plugin["sha256"] not in carried:
            raise IncompatibleError(
                "E7003",
                f"The engines in {path.parent.relative_to(bundle.root)} want a plugin library that is not there.",
                why=f"its SHA-256 is {plugin['sha256'][:16]}..., the bundle has {len(carried)} others",
                fix=("copy the bundle again", "build the bundle again"),
            )


def _warnings(bundle: Bundle, records: list[dict[str, Any]]) -> list[dict[str, str]]:
    warnings = []
    extra = unlisted_files(bundle.root, records)
    if extra:
        text = f"{len(extra)} files are not in the manifest: {', '.join(extra[:5])}"
        warnings.append({"code": "MBQ-W4603", "text": text})
    if not any(path for pattern in LICENCES for path in bundle.root.glob(pattern)):
        text = "the bundle has no licence file: licence unknown"
        warnings.append({"code": "MBQ-W4010", "text": text})
    return warnings
