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
from mbq_export.backends._trt_preflight import graph_files
from mbq_export.backends.base import EngineFile, EngineGraph, EngineRequest
from mbq_export.reading import sha256_of
from mbq_export.writing import json_bytes, write_file

ENGINE_RECORD: Final = "engine.json"
LAYER_RECORD: Final = "layers.json"
SCHEMA: Final = 1
UNVERIFIED: Final = "built ahead of time, not run on a device"


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
        "why": UNVERIFIED,
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
