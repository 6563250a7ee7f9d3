"""From exported graphs to one engine folder per device: what to compile, and what must come out."""

from collections.abc import Mapping
from dataclasses import replace
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
from mbq_export.pipeline.levels import GROWING, growing_sizes
from mbq_export.pipeline.plan import Plan
from mbq_export.progress import Progress, silent
from mbq_export.reading import read_json
from mbq_export.schemes import SCHEMES

ENGINE_FACTS: Final = (
    "bytes", "sha256", "layers", "lowering", "op_level", "kv", "dtype", "plugin_layers_expected", "plugin_layers_found", "checks",
)  # fmt: skip
"""What a manifest repeats of each engine."""


def build_engines(
    plan: Plan, record: ExportRecord, *, onnx: Path, out: Path, logs: Path, progress: Progress
) -> dict[str, EngineRecord]:
    """Build vision, decoder and, if asked for, embedding engines for every target that this machine can serve.

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
    options = plan.request.engines
    shared = options.plans(targets)
    built: dict[str, EngineRecord] = {}
    for index, (target, *also) in enumerate(shared):
        backend = BACKENDS[target.flavour]
        if backend.build is None:
            raise InternalError("E9001", f"Backend {backend.name} builds no engines.")
        library = backend.available().found.replace(" ", "-")
        folder = "-".join(dict.fromkeys(each.folder for each in (target, *also)))
        request = EngineRequest(
            graphs=graphs,
            target=target,
            also=tuple(also),
            out=out / library / folder,
            plugins=plan.form.library,
            options=options.builder(),
            logs=logs / f"{folder}-{library}",
            timeout_s=plan.request.engine_timeout_s,
        )
        name = "+".join(map(str, (target, *also)))
        with located(name):
            built[name] = backend.build(request, silent)
            if plan.request.gate == "on":
                _demand(built[name])
        progress(index + 1, len(shared), name)
    return built


def engine_facts(folder: Path) -> list[dict[str, Any]]:
    """What the engines of a bundle are, from their own records: the same after a resumed build."""
    facts = []
    for path in sorted(folder.rglob(ENGINE_RECORD)):
        record = read_json(path, code="E4604")
        kept = ("flavour", "version", "sm", "op_level", "verified", "why", "plugin")
        facts.append(
            {
                "folder": path.parent.relative_to(folder).as_posix(),
                **{key: record[key] for key in kept},
                "engines": {
                    name: {key: engine[key] for key in ENGINE_FACTS}
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
    options, graphs = plan.request.engines, []
    decoders = [graph for graph in record.graphs if graph.form and graph.form.target == "trt"]
    dtypes = {graph.dtype for graph in decoders}
    for graph in record.graphs:
        if graph in decoders:
            sizes = options.decoder_sizes(plan.max_context)
            if graph.form is not None and graph.form.kv == GROWING:
                sizes = growing_sizes(sizes, plan.max_context)
            graphs.append(engine_graph("decoder", graph, onnx, sizes))
        elif graph.name == "vision_encoder" and graph.dtype in dtypes:
            sizes = options.vision_sizes(str(graph.inputs[0].shape[0]))
            graphs.append(engine_graph("vision", graph, onnx, sizes))
        elif graph.name == "embed_tokens" and graph.dtype in dtypes and options.embed_engine:
            table = engine_graph("embed", graph, onnx, options.embed_sizes(plan.max_context))
            graphs.append(replace(table, weight_bytes=graph.weight_bytes))
    return graphs


def engine_graph(
    name: str, graph: GraphRecord, onnx: Path, sizes: Mapping[str, SizeRange]
) -> EngineGraph:
    """Say what to compile of an exported graph, and what must come out.

    Args:
        name: Of the engine.
        graph: What the exporter recorded.
        onnx: Its folder.
        sizes: One range per symbol of its inputs.
    """
    quantized = [linear for linear in graph.linears if linear.scheme != KEPT]
    plugins = {name for names in graph.plugin_layers.values() for name in names}
    standard = [linear for linear in quantized if linear.node not in plugins]
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
                bits=8 if SCHEMES[linear.scheme].weight_bits == 8 else 4,
            )
            for linear in standard
        ),
        plugin_layers=graph.plugin_layers,
        lowering="none" if graph.form is None else graph.form.lowering,
        op_level=graph.op_level,
        kv="none" if graph.form is None else graph.form.kv,
        dtype=graph.dtype,
        attention_layers=graph.attention_layers or None,
        kv_updates=graph.kv_updates or None,
        weight_bytes=graph.weight_bytes if quantized else None,
    )


def _spec(port: Port) -> TensorSpec:
    return TensorSpec(name=port.name, dtype=port.dtype, shape=port.shape)
