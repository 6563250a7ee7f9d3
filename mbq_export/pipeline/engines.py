"""From exported graphs to one engine folder per device: what to compile, and what must come out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mbq_export.backends import BACKENDS
from mbq_export.backends.base import (
    Backend,
    EngineGraph,
    EngineRecord,
    EngineRequest,
    QuantizedLinear,
    SizeRange,
    TensorSpec,
)
from mbq_export.checkpoint import KEPT
from mbq_export.errors import InternalError
from mbq_export.export.record import ExportRecord, GraphRecord, Port
from mbq_export.pipeline.plan import Plan
from mbq_export.progress import Progress
from mbq_export.target import Target

TYPICAL_TILES: Final = 5
LARGEST_CHUNK: Final = 512
"""Tokens of one prefill call; a longer prompt is fed in chunks (TENSORRT 11)."""


def build_engines(
    plan: Plan, record: ExportRecord, *, onnx: Path, out: Path, progress: Progress
) -> dict[str, EngineRecord]:
    """Build vision and decoder engines for every target that this machine can serve.

    Args:
        plan: Targets, limits and skipped targets.
        record: What was exported.
        onnx: Folder of the graphs.
        out: ``engines`` folder of the bundle; one folder per flavour, version and device appears in it.
        progress: Called after each target.

    Returns:
        One record per target, by its name.
    """
    targets = [target for target in plan.targets if str(target) not in plan.skipped_engines]
    built: dict[str, EngineRecord] = {}
    for index, target in enumerate(targets):
        backend = BACKENDS[target.flavour]
        request = EngineRequest(
            graphs=tuple(_graphs(plan, record, onnx)),
            sm=_sm(target),
            out=out / _library_folder(backend) / target.folder,
            timeout_s=plan.request.engine_timeout_s,
            lowering="qdq",
            op_level=target.op_level,
        )
        if backend.build is None:
            raise InternalError("E9001", f"Backend {backend.name} builds no engines.")
        built[str(target)] = backend.build(request, progress)
        progress(index + 1, len(targets), str(target))
    return built


def _library_folder(backend: Backend) -> str:
    """Flavour and version, for example ``rtx-1.7.1.116``."""
    return backend.available().found.replace(" ", "-")


def _sm(target: Target) -> int:
    if target.sm is None:
        raise InternalError("E9001", f"Target {target} has no device.")
    return target.sm


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
                node=linear.node, shape=(linear.n, linear.k), group_size=linear.group_size
            )
            for linear in quantized
        ),
        attention_layers=graph.attention_layers or None,
        kv_updates=graph.kv_updates or None,
        weight_bytes=graph.weight_bytes if quantized else None,
    )


def _spec(port: Port) -> TensorSpec:
    return TensorSpec(name=port.name, dtype=port.dtype, shape=port.shape)
