"""Stage 3 alone: a checkpoint becomes ONNX graphs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final

import typer

from mbq_export.commands import graph_options, options
from mbq_export.commands.console import Console

AUTO: Final = "auto"
ONNX: Final = "onnx"


def command(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Argument(help="A folder made by quantize, or weights/ of a bundle.")
    ],
    out: options.Out,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="onnx; awq, gptq or compressed-tensors write a checkpoint that other engines read.",
        ),
    ] = ONNX,
    lowering: Annotated[
        str,
        typer.Option(
            "--lowering",
            help="qdq, reference or plugin, several with a comma; auto: plugin for trt, else qdq.",
        ),
    ] = "auto",
    runtime: Annotated[
        str, typer.Option("--runtime", help="ort, or trt for any flavour of TensorRT.")
    ] = "ort",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="fp32 or fp16; for trt also bf16, of plugins, w4a8 and the baseline. Default: fp16 for trt, else fp32.",
            show_default=False,
        ),
    ] = None,
    kv: graph_options.Cache = None,
    logits: Annotated[
        str, typer.Option("--logits", help="all positions, or the last one.")
    ] = "all",
    op_level: graph_options.OpLevel = "auto",
    max_context: Annotated[
        int | None,
        typer.Option("--max-context", help="Longest sequence.", min=1, show_default=False),
    ] = None,
    force: options.Force = False,
) -> None:
    """Write vision, embedding and decoder graphs.

    mbq-export export out/weights --lowering plugin,qdq --runtime trt -o graphs
    """
    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.export import PREFERRED, GraphForm, export, fitting_lowering
    from mbq_export.export.profile import has_static_cache
    from mbq_export.export.record import RECORD
    from mbq_export.families.locate import family_of
    from mbq_export.writing import refuse_existing, refuse_inside, staging

    console: Console = context.obj
    if to != ONNX:
        _refuse_graph_options(to, context)
        _hand_over(console, checkpoint, out, to=to, force=force)
        return
    for_trt = runtime == "trt"
    form = GraphForm(
        target=runtime,
        dtype=dtype or ("fp16" if for_trt else "fp32"),
        kv=kv or ("static" if for_trt and has_static_cache(op_level) else "concat"),
        logits=logits,
        max_context=max_context,
        op_level=op_level,
    )
    refuse_inside(out, checkpoint)
    options.refuse_unfinished(out)
    opened = QuantCheckpoint.open(checkpoint)
    refuse_existing(out, record=RECORD, force=force)
    best = fitting_lowering(
        PREFERRED[runtime],
        scheme=opened.scheme_name,
        group_size=opened.group_size,
        target=runtime,
    )
    names = [best if name == AUTO else name for name in lowering.split(",")]
    forms = tuple(replace(form, lowering=name) for name in names)
    with staging(out), console.progress("export") as progress:
        record = export(
            opened,
            out,
            family=family_of(opened.config),
            forms=forms,
            force=force,
            progress=progress,
        )
    rows = [
        (
            graph.file,
            sum(graph.nodes.values()),
            graph.opset,
            graph.weight_bytes,
            sum(map(len, graph.plugin_layers.values())),
        )
        for graph in record.graphs
    ]
    console.table(("graph", "nodes", "opset", "weight bytes", "plugins"), rows)
    console.finish(record.as_json(), what=f"{out}  {len(record.graphs)} graphs")


def _hand_over(console: Console, folder: Path, out: Path, *, to: str, force: bool) -> None:
    """Write the checkpoint in a format of others."""
    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.quantize.formats import FORMATS
    from mbq_export.quantize.handover import ORIGIN_FILE, check_holds, hand_over
    from mbq_export.writing import refuse_existing, refuse_inside, staging

    form = FORMATS[to]
    refuse_inside(out, folder)
    options.refuse_unfinished(out)
    refuse_existing(out, record=ORIGIN_FILE, force=force)
    opened = QuantCheckpoint.open(folder)
    check_holds(opened, form)
    with staging(out), console.progress("export") as progress:
        hand_over(opened, form, out, force=force, progress=progress)
    linears = len(opened.linears)
    console.finish(
        {"folder": str(out), "format": form.name, "scheme": opened.scheme_name, "linears": linears},
        what=f"{out}  {form.name}, {linears} linears",
    )


def _refuse_graph_options(to: str, context: typer.Context) -> None:
    """Refuse options of graphs where none are written.

    Raises:
        UsageError: E2002.
    """
    from mbq_export.errors import UsageError

    graph = {"lowering", "runtime", "dtype", "kv", "logits", "op_level", "max_context"}
    given = sorted(
        name
        for name in graph & set(context.params)
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    )
    if given:
        raise UsageError(
            "E2002",
            f"--to {to} contradicts --{given[0].replace('_', '-')}.",
            why="graphs are written with --to onnx only",
            fix="leave out one of the two",
        )
