"""Make a bundle: calibrate, quantize, export, build engines, check, seal."""

import inspect
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from mbq_export.commands import (
    engine_options,
    graph_options,
    memory_options,
    number_options,
    options,
    search_options,
    width_options,
)
from mbq_export.commands.console import Console
from mbq_export.errors import UsageError

if TYPE_CHECKING:
    from mbq_export.pipeline.stages import BuildResult

STILL_GOOD: Final = frozenset({"out", "force", "fresh"})
"""Options of the stages before that mean something for those that follow, too."""


def command(
    context: typer.Context,
    out: options.Out,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Folder of a Hugging Face model, or an alias (mbq-export models).",
            show_default=False,
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Finished bundle to build engines of for another --target, instead of a model: nothing is "
            "calibrated or rounded again.",
            show_default=False,
        ),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            "--stages",
            help="With --from: engine.. (default) takes its graphs, export.. writes them anew.",
            show_default=False,
        ),
    ] = None,
    wbits: number_options.WeightBits = None,
    scheme: number_options.Scheme = None,
    group_size: number_options.GroupSize = None,
    avg_bits: width_options.AvgBits = None,
    bits: width_options.Bits = None,
    bytes_budget: width_options.BytesBudget = None,
    latency_table: width_options.LatencyTable = None,
    lm_head_bits: number_options.HeadBits = 16,
    vision_bits: number_options.VisionBits = 16,
    method: number_options.Method = "mbq",
    compat: number_options.Compat = "none",
    rounding: number_options.Rounding = None,
    clip: number_options.Clip = None,
    hessian: number_options.Hessian = None,
    gptq_prefix: number_options.GptqPrefix = None,
    asym: number_options.Asym = None,
    damp: number_options.Damp = None,
    search_scope: number_options.SearchScope = None,
    qvlm_measure: number_options.QvlmMeasure = None,
    search_alpha: number_options.SearchAlpha = None,
    import_scales: number_options.ImportScales = None,
    fake_quant: number_options.FakeQuant = False,
    stat: search_options.Stat = None,
    loss: search_options.Loss = None,
    grid: search_options.Grid = None,
    prefix: search_options.Prefix = None,
    gqa_o_scale: search_options.GqaOScale = None,
    r_floor: search_options.RatioFloor = None,
    tokens: search_options.Tokens = None,
    search_prompt_weight: search_options.PromptWeight = None,
    modality_weight: search_options.ModalityWeight = None,
    sensitivity: search_options.Ratios = None,
    data: options.Data = None,
    samples: options.Samples = 128,
    max_ram: memory_options.MaxRam = None,
    text_only_ok: options.TextOnly = False,
    skip_bad: options.SkipBad = 0,
    ignore_extra: options.IgnoreExtra = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            rich_help_panel=engine_options.PANEL,
            help="Device and flavour, for example rtx4090:rtx; repeatable. Default: this machine.",
            show_default=False,
        ),
    ] = None,
    lowering: Annotated[
        str,
        typer.Option(
            "--lowering",
            rich_help_panel=engine_options.PANEL,
            help="Form of the decoder that engines are built from: plugin, qdq, or auto for the best that the "
            "targets' builders read.",
        ),
    ] = "auto",
    max_context: Annotated[
        int | None,
        typer.Option(
            "--max-context",
            rich_help_panel=graph_options.PANEL,
            help="Longest sequence of the graphs.",
            min=1,
            show_default=False,
        ),
    ] = None,
    op_level: graph_options.OpLevel = "auto",
    kv: graph_options.Cache = None,
    max_batch: engine_options.MaxBatch = 1,
    max_tiles: engine_options.MaxTiles = 10,
    opt_tokens: engine_options.OptTokens = 1,
    workspace: engine_options.Workspace = 1024,
    weight_streaming: engine_options.WeightStreaming = False,
    timing_cache: engine_options.TimingCache = None,
    one_plan: engine_options.OnePlan = False,
    engine_dtype: engine_options.Dtype = "auto",
    embed_engine: engine_options.EmbedEngine = False,
    plugin_lib: engine_options.PluginLib = None,
    require_engine: Annotated[
        bool,
        typer.Option(
            "--require-engine",
            rich_help_panel=engine_options.PANEL,
            help="Fail if an engine cannot be built here.",
        ),
    ] = False,
    engine_timeout: Annotated[
        float,
        typer.Option(
            "--engine-timeout",
            rich_help_panel=engine_options.PANEL,
            help="Seconds until a hung engine build is ended.",
            min=1,
        ),
    ] = 3600.0,
    gate: Annotated[
        str,
        typer.Option(
            "--gate", help="on: a failed check ends the build; warn or off need a reason."
        ),
    ] = "on",
    gate_reason: Annotated[
        str, typer.Option("--gate-reason", help="Lands in the manifest.", show_default=False)
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and every first problem, then stop.")
    ] = False,
    force: options.Force = False,
    fresh: options.Fresh = False,
) -> None:
    """Make a bundle: calibrate, quantize, export, build engines, check, seal.

    mbq-export build --model tiny-llava-ov --wbits 3 -o out

    mbq-export build --from out --stages engine.. --target orin:trt -o out-orin
    """
    first = _start(context, model, bundle, stages)
    from mbq_export.evaluate.width_table import HEADER, width_rows, width_summary
    from mbq_export.pipeline.engine_options import EngineOptions
    from mbq_export.pipeline.request import BuildRequest
    from mbq_export.pipeline.stages import build, planned

    console: Console = context.obj
    console.resume = shlex.join(["mbq-export", *sys.argv[1:]])
    request = BuildRequest(
        model=model or "",
        bundle=bundle,
        first=first,
        out=out,
        weight_bits=wbits,
        scheme=scheme,
        group_size=number_options.group_size(group_size),
        mixed=width_options.mixed_bits(
            avg_bits=avg_bits, bits=bits, bytes_budget=bytes_budget, latency_table=latency_table
        ),
        lm_head_bits=lm_head_bits,
        vision_bits=vision_bits,
        method=method,
        replaced=number_options.switches(
            compat,
            rounding=rounding,
            clip=clip,
            hessian=hessian,
            gptq_prefix=gptq_prefix,
            asym=asym,
            damp=damp,
            search_scope=search_scope,
            qvlm_measure=qvlm_measure,
            search_alpha=search_alpha,
            **search_options.switches(
                stat=stat,
                loss=loss,
                grid=grid,
                prefix=prefix,
                gqa_o_scale=gqa_o_scale,
                r_floor=r_floor,
                tokens=tokens,
                search_prompt_weight=search_prompt_weight,
                modality_weight=modality_weight,
            ),
        ),
        import_scales=import_scales,
        fake_quant=fake_quant,
        sensitivity=sensitivity,
        data=data,
        samples=samples,
        max_ram=memory_options.max_ram(max_ram),
        targets=tuple(target or ["auto"]),
        lowering=lowering,
        engines=EngineOptions(
            plugin_lib=plugin_lib,
            max_batch=max_batch,
            max_tiles=max_tiles,
            opt_tokens=opt_tokens,
            workspace_mib=workspace,
            weight_streaming=weight_streaming,
            timing_cache=timing_cache,
            one_plan=one_plan,
            dtype=engine_dtype,
            embed_engine=embed_engine,
        ),
        op_level=op_level,
        kv=kv,
        max_context=max_context,
        seed=console.seed,
        text_only_ok=text_only_ok,
        skip_bad=skip_bad,
        ignore_extra=options.patterns(ignore_extra, "--ignore-extra"),
        models=options.models_folder(),
        force=force,
        fresh=fresh,
        gate=gate,
        gate_reason=gate_reason,
        require_engine=require_engine,
        engine_timeout_s=engine_timeout,
        command=console.resume,
        takes_codes=True,
    )
    if dry_run:
        plan = planned(request)
        console.table(("module group", "count", "bits", "reason"), plan.table())
        console.finish({"plan": dict(plan.fingerprint)}, what=f"plan for {out}, nothing written")
        return
    result = build(request, console)
    mixed = result.facts["quant"].get("mixed")
    if mixed is not None:
        console.table(HEADER, width_rows(mixed))
        console.text(width_summary(mixed))
    _warn_skipped(console, result.skipped_engines)
    console.finish(_summary(result, out), what=f"{out}  sha256 {result.sha256[:16]}")


def _start(
    context: typer.Context, model: str | None, bundle: Path | None, stages: str | None
) -> str:
    """Decide where a build from a bundle begins, and refuse options of the stages before.

    Raises:
        BadParameter: For a build from nothing.
        UsageError: E2001, E2002.
    """
    from mbq_export.commands import calibrate, quantize
    from mbq_export.pipeline.continuing import ENGINE, first_stage

    if bundle is None:
        if model is None:
            raise typer.BadParameter("name a model, or a bundle with --from", param_hint="--model")
        if stages is not None:
            raise UsageError(
                "E2002",
                "--stages does not go without --from.",
                why="a build from a model runs every stage, and keeps what is finished if it is stopped",
                fix="--from BUNDLE",
            )
        return ENGINE
    first = first_stage(stages or f"{ENGINE}..")
    before = {
        name
        for each in (calibrate, quantize)
        for name in inspect.signature(each.command).parameters
    } | {"model", "wbits", "scheme", "fake_quant"}
    before |= {"max_context", "kv", "op_level", "engine_dtype"} if first == ENGINE else set()
    for name in sorted(before - STILL_GOOD):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(
                "E2002",
                f"--{name.replace('_', '-')} does not go with --from.",
                why=f"the bundle decides it for {first}..",
                fix="leave it out, or build from the model",
            )
    return first


def _warn_skipped(console: Console, skipped: dict[str, str]) -> None:
    for target, reason in skipped.items():
        console.warn("W3016", f"no engine for {target}: {reason}")


def _summary(result: "BuildResult", out: Path) -> dict[str, Any]:
    return {
        "bundle": str(out),
        "sha256": result.sha256,
        "seconds": result.seconds,
        "gates": [] if result.gates is None else [check.as_json() for check in result.gates.checks],
        "measurements": {}
        if result.gates is None
        else {each.name: each.value for each in result.gates.measurements},
        "engines": result.facts["engines"],
        "skipped_engines": result.skipped_engines,
        "lowering": result.facts["lowering"],
        "engine_dtype": result.facts["engine_dtype"],
    }
