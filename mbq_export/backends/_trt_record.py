"""``engine.json`` and ``layers.json``: what was built, of what, for what. Written once, read before an engine is loaded.

TensorRT itself is never asked whether an engine fits: without a driver it calls good plans invalid, and it does not see
a changed byte. So flavour, version, device, hashes and the plugin library are compared here first.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from mbq_export.backends import _trt_layers
from mbq_export.backends._trt_flavour import Installed
from mbq_export.backends._trt_layers import LayerTable, profile_shapes
from mbq_export.backends._trt_preflight import AHEAD_OF_TIME, graph_files
from mbq_export.backends.base import EngineFile, EngineGraph, EngineRequest
from mbq_export.errors import FormatError, IncompatibleError
from mbq_export.native import LocalGpu
from mbq_export.reading import read_json, sha256_of
from mbq_export.writing import json_bytes, write_file

ENGINE_RECORD: Final = "engine.json"
LAYER_RECORD: Final = "layers.json"
SCHEMA: Final = 1
UNVERIFIED: Final = "built ahead of time, not run on a device"
NOT_RUN: Final = "built on its device, not run there yet"

OLDEST_DRIVER: Final = {"rtx": 580}
"""First driver branch that runs CUDA 13, which the RTX wheels are built for."""


def write_records(
    folder: Path,
    request: EngineRequest,
    installed: Installed,
    engines: Mapping[str, EngineFile],
    tables: Mapping[str, LayerTable],
) -> None:
    """Write both records: no times, no paths, so that two builds are equal."""
    record = {
        "schema": SCHEMA,
        "flavour": installed.flavour.name,
        "version": installed.version,
        "sm": [f"sm{device.sm}" for device in request.devices],
        "op_level": min(device.op_level for device in request.devices),
        "verified": False,
        "why": why_unverified(installed.flavour.name),
        "plugin": _plugin_entry(request),
        "engines": {
            graph.name: _engine_entry(graph, engines[graph.name], request)
            for graph in request.graphs
        },
    }
    layers = {
        "schema": _trt_layers.SCHEMA,
        "library": installed.label,
        "engines": {name: table.as_json() for name, table in tables.items()},
    }
    write_file(folder / ENGINE_RECORD, json_bytes(record))
    write_file(folder / LAYER_RECORD, json_bytes(layers))


def why_unverified(flavour: str) -> str:
    """Say what has not happened to an engine that was just built."""
    return UNVERIFIED if flavour in AHEAD_OF_TIME else NOT_RUN


def read_record(engine: Path) -> dict[str, Any]:
    """Read what an engine was built for.

    Returns:
        ``engine.json`` beside it, with the engine's own entry as ``engine``.

    Raises:
        FormatError: E4501 if there is no such engine or no record of it, E4602 if its bytes are others.
        IncompatibleError: E7004 for a record of a newer schema.
    """
    place = engine.parent / ENGINE_RECORD
    record = read_json(place, code="E4604") if place.is_file() else {}
    if record.get("schema", 0) > SCHEMA:
        raise IncompatibleError(
            "E7004",
            f"{ENGINE_RECORD} has schema {record['schema']}.",
            why=f"this release reads up to {SCHEMA}",
            fix="use the release of mbq-export that wrote it",
        )
    entry = record.get("engines", {}).get(engine.stem)
    if entry is None or not engine.is_file():
        raise FormatError(
            "E4501",
            f"{engine.name} is missing, or {ENGINE_RECORD} beside it does not describe it.",
            why="what an engine was built from and for is kept beside it",
            fix="build the bundle again",
        )
    if sha256_of(engine) != entry["sha256"]:
        raise FormatError(
            "E4602",
            f"{engine.name} is not what {ENGINE_RECORD} describes.",
            why="TensorRT does not notice a changed byte, so the hash is compared",
            fix=("copy the bundle again", "build the bundle again"),
        )
    return {**record, "engine": entry}


def check_fits(
    engine: Path, record: Mapping[str, Any], installed: Installed, gpu: LocalGpu
) -> None:
    """Refuse an engine that was built for something else than this machine.

    Args:
        engine: Its file, to be named.
        record: As `read_record` returns it.
        installed: The TensorRT that is to load it.
        gpu: The GPU that is to run it.

    Raises:
        IncompatibleError: E7006 for another flavour, E7001 for another version, E7002 for another device, E7007 for
            a driver that is too old; all differences at once, under the first of these codes.
    """
    flavour, oldest = installed.flavour.name, OLDEST_DRIVER.get(installed.flavour.name, 0)
    driver = gpu.driver.partition(".")[0]
    differences = [
        (code, text)
        for code, differs, text in (
            (
                "E7006",
                record["flavour"] != flavour,
                f"it is for {record['flavour']}, this is {flavour}",
            ),
            (
                "E7001",
                record["version"] != installed.version,
                f"it is for version {record['version']}, this is {installed.version}",
            ),
            (
                "E7002",
                f"sm{gpu.sm}" not in record["sm"],
                f"it is for {', '.join(record['sm'])}, this {gpu.name} is sm{gpu.sm}",
            ),
            (
                "E7007",
                driver.isdecimal() and int(driver) < oldest,
                f"it needs driver {oldest} or newer, this is {gpu.driver}",
            ),
        )
        if differs
    ]
    if differences:
        raise IncompatibleError(
            differences[0][0],
            f"{engine.name} does not run here: {'; '.join(text for _, text in differences)}.",
            why="an engine is code for one version of TensorRT and one kind of GPU",
            fix=(
                f"mbq-export build --model MODEL --target sm{gpu.sm}:{flavour} -o DIR",
                "--backend ort runs the same bundle",
            ),
            context={"differences": [text for _, text in differences]},
        )


def _plugin_entry(request: EngineRequest) -> dict[str, Any] | None:
    """The library that the engines need to be loaded; None if they need none."""
    needed = any(graph.plugin_layers for graph in request.graphs)
    library = request.plugins if needed else None
    return None if library is None else {"abi": library.abi, "sha256": library.sha256}


def _engine_entry(graph: EngineGraph, engine: EngineFile, request: EngineRequest) -> dict[str, Any]:
    """One engine in ``engine.json``."""
    options = request.options
    return {
        "file": engine.path.name,
        "sha256": engine.sha256,
        "bytes": engine.size,
        "onnx": {path.name: sha256_of(path) for path in graph_files(graph.onnx)},
        "lowering": graph.lowering,
        "op_level": graph.op_level,
        "kv": graph.kv,
        "dtype": graph.dtype,
        "inputs": [asdict(spec) for spec in graph.inputs],
        "outputs": [asdict(spec) for spec in graph.outputs],
        "profiles": [{spec.name: profile_shapes(spec, graph) for spec in graph.inputs}],
        "weight_streaming": options.weight_streaming,
        "workspace_mib": options.workspace_mib,
        "opt_level": options.opt_level,
        "timed": options.timing_cache is not None,
        "layers": engine.layers,
        "plugin_layers_expected": {op: len(names) for op, names in graph.plugin_layers.items()},
        "plugin_layers_found": dict(engine.plugin_layers),
        "checks": [check.as_json() for check in engine.checks],
    }
