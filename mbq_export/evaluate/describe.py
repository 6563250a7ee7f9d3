"""What a file or folder contains, without running or loading anything in it.

folder with manifest.json     bundle
folder with mbq.json          quantized checkpoint
folder with calib.json        calibration result
folder with mbq_export.json   graphs as export writes them
folder with config.json       model as transformers saves it
*.safetensors                 tensors
*.onnx                        graph
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from mbq_export.backends._trt_layers import PLUGIN_ROW
from mbq_export.backends._trt_record import ENGINE_RECORD, LAYER_RECORD
from mbq_export.bundle import MANIFEST, ONNX, Bundle, unlisted_files
from mbq_export.channel_scales import ChannelScales
from mbq_export.checkpoint import CHECKPOINT_FILE, QuantCheckpoint
from mbq_export.errors import FormatError
from mbq_export.evaluate.describe_graphs import (
    LARGEST_PROTO_BYTES,
    describe_graph,
    describe_graphs,
    graph_table,
    plugin_operators,
)
from mbq_export.evaluate.description import Description, Table
from mbq_export.evaluate.width_table import HEADER, width_rows, width_summary
from mbq_export.families.locate import family_of, read_config
from mbq_export.progress import Progress, silent
from mbq_export.reading import read_json, safetensors_header
from mbq_export.runtime import RECORD
from mbq_export.schemes.base import group_name


class _Reader(Protocol):
    def __call__(self, path: Path, *, verify: bool, progress: Progress) -> Description: ...


def describe(
    path: Path, *, verify: bool = False, layers: bool = False, progress: Progress = silent
) -> Description:
    """Describe a file or folder.

    Args:
        path: What to look at.
        verify: Hash everything that has a recorded hash.
        layers: Add the layer tables that were recorded when a bundle's engines were built.
        progress: Called after each hashed file.

    Raises:
        FormatError: E4006 if it is none of the known kinds; otherwise what its reader finds wrong.
    """
    if path.is_dir():
        for name, reader in _FOLDERS.items():
            if (path / name).is_file():
                found = reader(path, verify=verify, progress=progress)
                return replace(found, tables=_layer_tables(path)) if layers else found
    elif path.suffix == ".safetensors" and path.is_file():
        return _tensors(path)
    elif path.suffix == ".onnx" and path.is_file():
        return describe_graph(path)
    reason = "does not exist" if not path.exists() else "is nothing that can be described"
    raise FormatError(
        "E4006",
        f"{path} {reason}.",
        why=f"known: a folder with {', '.join(_FOLDERS)}; a .safetensors or .onnx file",
        fix="check the path"
        if not path.exists()
        else ("name one of the known kinds", "mbq-export report PATH shows results"),
    )


def _bundle(path: Path, *, verify: bool, progress: Progress) -> Description:
    bundle = Bundle.open(path, verify=verify, progress=progress)
    manifest, files = bundle.manifest, bundle.manifest["files"]
    quant, source = manifest["quant"], manifest["source"]
    gates = manifest.get("gates", [])
    facts = {
        "sha256": bundle.sha256,
        "model": source["model"],
        "family": source["family"],
        "scheme": quant["scheme"]["name"],
        **_widths(quant),
        "method": quant["method"]["name"],
        "head": head_name(quant.get("lm_head")),
        "files": len(files),
        "bytes": sum(record["bytes"] for record in files),
        "gates": f"{sum(bool(gate.get('pass')) for gate in gates)} of {len(gates)} passed",
        "gate override": manifest.get("gate_override"),
        "integrity": "every hash compared"
        if verify
        else "sizes compared; --verify compares hashes",
        "unlisted files": unlisted_files(path, files),
    }
    by_folder: Counter[str] = Counter()
    for record in files:
        by_folder[record["path"].split("/")[0]] += record["bytes"]
    tables = [
        Table(title="bytes by folder", header=("folder", "bytes"), rows=sorted(by_folder.items())),
        Table(
            title="files",
            header=("path", "bytes", "sha256"),
            rows=[(r["path"], r["bytes"], r["sha256"][:16]) for r in files],
        ),
    ]
    return Description(
        kind="bundle", facts=facts, tables=[*graph_table(bundle.onnx), *tables, *_engines(bundle)]
    )


def _graphs(path: Path, *, verify: bool, progress: Progress) -> Description:
    del verify
    progress(1, 1, RECORD)
    return describe_graphs(path)


def _engines(bundle: Bundle) -> list[Table]:
    """What the build recorded about engines; an engine itself is never opened."""
    rows = []
    for path in sorted(bundle.engines.rglob(ENGINE_RECORD)):
        record = read_json(path, code="E4604")
        place = path.parent.relative_to(bundle.engines).as_posix()
        for name, engine in record["engines"].items():
            rows.append(
                (
                    f"{place}/{name}",
                    engine["bytes"],
                    engine["layers"],
                    _plugin_count(engine),
                    record["verified"],
                    record["why"],
                )
            )
    header = ("engine", "bytes", "layers", "plugins", "verified", "why not")
    return [Table(title="engines", header=header, rows=rows)] if rows else []


def _plugin_count(engine: dict[str, Any]) -> str:
    """Plugin layers found, of those planned, by operator; - without any."""
    found = engine.get("plugin_layers_found") or {}
    expected = engine.get("plugin_layers_expected") or {}
    return ", ".join(f"{found.get(op, 0)} of {n} {op}" for op, n in expected.items()) or "-"


def _row_type(layer: dict[str, Any], operators: dict[str, str]) -> str:
    """Type of a row; a plugin's operator where the export's record tells."""
    named = sorted({operators[node] for node in layer["onnx"] if node in operators})
    return f"plugin {' '.join(named)}" if layer["type"] == PLUGIN_ROW and named else layer["type"]


def _layer_tables(root: Path) -> list[Table]:
    """One table per engine: rows of the build log as they were recorded, plugins under their operator's name."""
    operators = plugin_operators(root / ONNX)
    tables = []
    for path in sorted(root.rglob(LAYER_RECORD)):
        for name, engine in read_json(path, code="E4604", limit=LARGEST_PROTO_BYTES)[
            "engines"
        ].items():
            rows = [
                (
                    _row_type(layer, operators),
                    ", ".join(sorted({kind for _, kind, _ in layer["const"]})),
                    " ".join(layer["onnx"]),
                )
                for layer in engine["layers"]
            ]
            title = f"layers of {path.parent.relative_to(root).as_posix()}/{name}"
            tables.append(Table(title=title, header=("type", "constants", "onnx nodes"), rows=rows))
    return tables


def head_name(head: Mapping[str, Any] | None) -> str:
    """Number format of an output head, as `mbq.json` says it."""
    if head is None:
        return "16 bits"
    untied = ", no longer the embedding" if head.get("untied") else ""
    return f"{head['scheme']} {group_name(head['group_size'])}{untied}"


def _checkpoint(path: Path, *, verify: bool, progress: Progress) -> Description:
    checkpoint = QuantCheckpoint.open(path, verify=verify)
    progress(1, 1, CHECKPOINT_FILE)
    linears = checkpoint.info.get("linears", [])
    facts = {
        "scheme": checkpoint.scheme_name,
        **_widths(checkpoint.info),
        "group size": checkpoint.group_size,
        "method": checkpoint.info.get("method", {}).get("name"),
        "head": head_name(checkpoint.info.get("lm_head")),
        "quantized linears": len(checkpoint.linears),
        "quantized weights": sum(record["n"] * record["k"] for record in linears),
        "kept tensors": len(checkpoint.tensors),
    }
    rows = [
        (r["name"], r["n"], r["k"], r["scheme"], r["group_size"], r.get("alpha")) for r in linears
    ]
    table = Table(
        title="linears", header=("linear", "n", "k", "scheme", "group", "alpha"), rows=rows
    )
    mixed = width_rows(checkpoint.info.get("mixed"))
    chosen = [Table(title="widths of units", header=HEADER, rows=mixed)] if mixed else []
    return Description(kind="checkpoint", facts=facts, tables=[*chosen, table])


def _widths(quant: Mapping[str, Any]) -> dict[str, str]:
    """A fact about units of widths of their own; none where they have that of the scheme."""
    told = width_summary(quant.get("mixed"))
    return {"widths": told} if told else {}


def _calibration(path: Path, *, verify: bool, progress: Progress) -> Description:
    del verify
    scales = ChannelScales.read(path)
    progress(1, 1, "calib.json")
    facts = {
        "method": scales.switches.method,
        "data": scales.calib.get("data"),
        "median ratio": scales.sensitivity.get("median"),
        "units": len(scales.scales),
    }
    rows = [
        (u["layer"], u["unit"], u.get("alpha"), u.get("r")) for u in scales.calib.get("units", [])
    ]
    return Description(
        kind="calibration",
        facts=facts,
        tables=[Table(title="units", header=("layer", "unit", "alpha", "r"), rows=rows)],
    )


def _model(path: Path, *, verify: bool, progress: Progress) -> Description:
    del verify
    config = read_config(path)
    family = family_of(config)
    text, vision = family.text_shape(config), family.vision_shape(config)
    headers = [safetensors_header(file) for file in sorted(path.glob("*.safetensors"))]
    progress(1, 1, "config.json")
    entries = [(name, entry) for header in headers for name, entry in header.items()]
    modules: Counter[str] = Counter()
    for name, entry in entries:
        modules[".".join(name.split(".")[:2])] += entry.end - entry.start
    facts = {
        "family": family.name,
        "blocks": text.layers,
        "hidden": text.hidden,
        "heads": f"{text.heads} query, {text.kv_heads} key/value, {text.head_dim} wide",
        "mlp": text.intermediate,
        "vocabulary": text.vocab,
        "tied head": text.tied_head,
        "image tokens per tile": vision.tokens_per_tile,
        "tensors": len(entries),
        "bytes": sum(modules.values()),
    }
    table = Table(title="bytes by module", header=("module", "bytes"), rows=sorted(modules.items()))
    return Description(kind="model", facts=facts, tables=[table])


def _tensors(path: Path) -> Description:
    header = safetensors_header(path)
    rows = [
        (name, entry.dtype, str(list(entry.shape)), entry.end - entry.start)
        for name, entry in sorted(header.items())
    ]
    facts = {"tensors": len(header), "bytes": path.stat().st_size}
    return Description(
        kind="tensors",
        facts=facts,
        tables=[Table(title="tensors", header=("name", "dtype", "shape", "bytes"), rows=rows)],
    )


_FOLDERS: Final[dict[str, _Reader]] = {
    MANIFEST: _bundle,
    RECORD: _graphs,
    CHECKPOINT_FILE: _checkpoint,
    "calib.json": _calibration,
    "config.json": _model,
}
