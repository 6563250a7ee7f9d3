"""From exported graphs to one engine folder per device: what to compile, and what must come out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from mbq_export.backends import BACKENDS
from mbq_export.backends._trt_record import ENGINE_RECORD
from mbq_export.backends.base import (
    EngineGraph,
    EngineRecord,
    EngineRequest,
    QuantizedLinear,
    SizeRange,
    TensorSpec,
)
from mbq_export.checkpoint import KEPT
from mbq_export.errors import GateError, InternalError, located
from mbq_export.export.record import ExportRecord, GraphRecord, Port
from mbq_export.pipeline.plan import Plan
from mbq_export.progress import Progress, silent
from mbq_export.reading import read_json
from mbq_export.schemes import SCHEMES

TYPICAL_TILES: Final = 5
LARGEST_CHUNK: Final = 512
"""Tokens of one prefill call; a longer prompt is fed in chunks (TENSORRT 11)."""


def build_engines(
    plan: Plan, record: ExportRecord, *, onnx: Path, out: Path, logs: Path, progress: Progress
) -> dict[str, EngineRecord]:
    """Build vision and decoder engines for every target that this machine can serve.

    Args:
        plan: Targets, limits and skipped targets.
        record: What was exported.
        onnx: Folder of the graphs.
        out: ``engines`` folder of the bundle; one folder per flavour, version and device appears in it.
        logs: Where logs of a failed build stay.
        progress: Called after each target.

    Returns:
        One record per target, by its name.

    Raises:
        GateError: E1108 if an engine holds something else than was asked for, unless the gate is off.
    """
    targets = [target for target in plan.targets if str(target) not in plan.skipped_engines]
    graphs = tuple(_graphs(plan, record, onnx))
    built: dict[str, EngineRecord] = {}
    for index, target in enumerate(targets):
        backend = BACKENDS[target.flavour]
        if backend.build is None:
            raise InternalError("E9001", f"Backend {backend.name} builds no engines.")
        library = backend.available().found.replace(" ", "-")
        request = EngineRequest(
            graphs=graphs,
            target=target,
            out=out / library / target.folder,
            logs=logs / f"{target.folder}-{library}",
            timeout_s=plan.request.engine_timeout_s,
        )
        with located(str(target)):
            built[str(target)] = backend.build(request, silent)
            if plan.request.gate == "on":
                _demand(built[str(target)])
        progress(index + 1, len(targets), str(target))
    return built


def engine_facts(folder: Path) -> list[dict[str, Any]]:
    """What the engines of a bundle are, from their own records: the same after a resumed build."""
    facts = []
    for path in sorted(folder.rglob(ENGINE_RECORD)):
        record = read_json(path, code="E4604")
        kept = ("flavour", "version", "sm", "op_level", "verified", "why")
        facts.append(
            {
                "folder": path.parent.relative_to(folder).as_posix(),
                **{key: record[key] for key in kept},
                "engines": {
                    name: {
                        key: engine[key]
                        for key in ("bytes", "sha256", "layers", "lowering", "checks")
                    }
                    for name, engine in record["engines"].items()
                },
            }
        )
    return facts


def _demand(record: EngineRecord) -> None:
    """Refuse an engine that dequantizes at run time, or has other inputs than the graph."""
    if record.failed:
        first = record.failed[0]
        raise GateError(
            "E1108",
            f"{len(record.failed)} checks of the engine's layer table failed, the first is {first.name}.",
            why=first.why,
            fix="mbq-export inspect BUNDLE --layers, after a build with --gate warn",
        )


def _graphs(plan: Plan, record: ExportRecord, onnx: Path) -> list[EngineGraph]:
    graphs = []
    for graph in record.graphs:
        if graph.form is not None and graph.form.target == "trt":
            graphs.append(_decoder(plan, graph, onnx))
        elif graph.name == "vision_encoder" and graph.dtype == "fp16":
            graphs.append(_engine_graph("vision", graph, onnx, _vision_sizes(graph)))
    return graphs


def _decoder(plan: Plan, graph: GraphRecord, onnx: Path) -> EngineGraph:
    chunk = min(LARGEST_CHUNK, plan.max_context)
    sizes = {
        "batch_size": SizeRange(smallest=1, typical=1, largest=1),
        "sequence_length": SizeRange(smallest=1, typical=1, largest=chunk),
    }
    return _engine_graph("decoder", graph, onnx, sizes)


def _vision_sizes(graph: GraphRecord) -> dict[str, SizeRange]:
    symbol = str(graph.inputs[0].shape[0])
    return {symbol: SizeRange(smallest=1, typical=TYPICAL_TILES, largest=2 * TYPICAL_TILES)}


def _engine_graph(
    name: str, graph: GraphRecord, onnx: Path, sizes: Mapping[str, SizeRange]
) -> EngineGraph:
    quantized = [linear for linear in graph.linears if linear.scheme != KEPT]
    return EngineGraph(
        name=name,
        onnx=onnx / graph.file,
        inputs=tuple(_spec(port) for port in graph.inputs),
        outputs=tuple(_spec(port) for port in graph.outputs),
        sizes=dict(sizes),
        linears=tuple(
            QuantizedLinear(
                node=linear.node,
                shape=(linear.n, linear.k),
                group_size=linear.group_size,
                act_bits=SCHEMES[linear.scheme].act_bits,
            )
            for linear in quantized
        ),
        attention_layers=graph.attention_layers or None,
        kv_updates=graph.kv_updates or None,
        weight_bytes=graph.weight_bytes if quantized else None,
    )


def _spec(port: Port) -> TensorSpec:
    return TensorSpec(name=port.name, dtype=port.dtype, shape=port.shape)
