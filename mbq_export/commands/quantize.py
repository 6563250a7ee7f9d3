"""Stage 2 alone: channel scales become a packed checkpoint."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbq_export.commands import number_options, options, width_options
from mbq_export.commands.console import Console
from mbq_export.errors import UsageError, located

if TYPE_CHECKING:
    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.pipeline.plan import Plan
    from mbq_export.pipeline.request import BuildRequest


def command(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    scales: Annotated[
        Path | None,
        typer.Option(
            "--scales",
            help="Folder made by calibrate. Left out for AWQ, GPTQ and compressed-tensors, whose codes are kept.",
            show_default=False,
        ),
    ] = None,
    wbits: number_options.WeightBits = None,
    scheme: number_options.Scheme = None,
    group_size: Annotated[
        str | None,
        typer.Option(
            "--group-size",
            help="32, 64, 128 or channel. Default: that of the calibration, if the scheme has the same ones.",
            show_default=False,
        ),
    ] = None,
    avg_bits: width_options.AvgBits = None,
    bits: width_options.Bits = None,
    bytes_budget: width_options.BytesBudget = None,
    latency_table: width_options.LatencyTable = None,
    lm_head_bits: number_options.HeadBits = 16,
    vision_bits: number_options.VisionBits = 16,
    rounding: number_options.Rounding = None,
    clip: number_options.Clip = None,
    hessian: number_options.Hessian = None,
    gptq_prefix: number_options.GptqPrefix = None,
    asym: number_options.Asym = None,
    damp: number_options.Damp = None,
    search_scope: number_options.SearchScope = None,
    qvlm_measure: number_options.QvlmMeasure = None,
    search_alpha: number_options.SearchAlpha = None,
    data: options.Data = None,
    text_only_ok: options.TextOnly = False,
    skip_bad: options.SkipBad = 0,
    ignore_extra: options.IgnoreExtra = None,
    force: options.Force = False,
) -> None:
    """Fold the scales, round, pack, and write a checkpoint.

    Error feedback and clipping look at the calibration data again: --data is that of the scales, drawn the same way.

    Codes of others are taken over as they are, without --scales.

    mbq-export quantize --model tiny-llava-ov --scales scales -o checkpoint
    """
    from mbq_export.calibrate.methods.base import replaced
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.checkpoint import CHECKPOINT_FILE
    from mbq_export.pipeline.calibration import Encoded, samples_of_scales
    from mbq_export.pipeline.plan import make_plan
    from mbq_export.pipeline.request import BuildRequest
    from mbq_export.quantize import quantize
    from mbq_export.writing import staging

    console: Console = context.obj
    chosen = number_options.switches(
        rounding=rounding,
        clip=clip,
        hessian=hessian,
        gptq_prefix=gptq_prefix,
        asym=asym,
        damp=damp,
        search_scope=search_scope,
        qvlm_measure=qvlm_measure,
        search_alpha=search_alpha,
    )
    mixed = width_options.mixed_bits(
        avg_bits=avg_bits, bits=bits, bytes_budget=bytes_budget, latency_table=latency_table
    )
    if scales is None:
        request = BuildRequest(
            model=model,
            out=out,
            weight_bits=wbits,
            scheme=scheme,
            group_size=number_options.group_size(group_size),
            mixed=mixed,
            lm_head_bits=lm_head_bits,
            vision_bits=vision_bits,
            replaced=chosen,
            data=data,
            targets=("cpu",),
            models=options.models_folder(),
            ignore_extra=options.patterns(ignore_extra, "--ignore-extra"),
            record=CHECKPOINT_FILE,
            force=force,
            takes_codes=True,
        )
        _take_over(console, request)
        return
    found = ChannelScales.read(scales)
    switches = replaced(found.switches, chosen)
    found = replace(found, calib={**found.calib, "switches": switches.resolved()})
    drawn = found.calib.get("data", {})
    # A tower, and a head, look at data, if there is any.
    outside = {lm_head_bits, vision_bits} != {BuildRequest.vision_bits} and data is not None
    looks = switches.looks_at_data or mixed.chooses or outside
    request = BuildRequest(
        model=model,
        out=out,
        weight_bits=wbits,
        scheme=scheme or (found.calib.get("scheme") if wbits is None else None),
        group_size=number_options.group_size(group_size),
        mixed=mixed,
        lm_head_bits=lm_head_bits,
        vision_bits=vision_bits,
        method=switches.method,
        # A preset may round otherwise than the scales say.
        replaced={
            "rounding": switches.rounding,
            "search_scope": switches.search_scope,
            **chosen,
        },
        # Plain nearest rounding looks at no data; what is named then only keeps the plan from asking for some.
        data=data if looks else "builtin:shapes",
        samples=drawn.get("samples") or 128,
        targets=("cpu",),
        models=options.models_folder(),
        seed=found.calib.get("seed", console.seed),
        text_only_ok=text_only_ok,
        skip_bad=skip_bad,
        ignore_extra=options.patterns(ignore_extra, "--ignore-extra"),
        record=CHECKPOINT_FILE,
        force=force,
    )
    options.refuse_unfinished(out)
    with located("plan"):
        plan = make_plan(_with_calibrated_group(request, found.calib))
    with staging(out), console.progress("quantize") as progress:
        loaded = plan.load()
        checkpoint = quantize(
            loaded,
            found,
            scheme=plan.scheme,
            group_size=plan.group_size,
            out=out,
            samples=samples_of_scales(Encoded(plan, loaded), found) if looks else None,
            mixed=mixed,
            head=plan.head,
            tower=plan.tower,
            progress=progress,
        )
    _finish(console, plan, checkpoint)


def _take_over(console: Console, request: "BuildRequest") -> None:
    """Import the codes of another project.

    Raises:
        UsageError: E2003 if the model's weights are numbers.
    """
    from mbq_export.families.loading import refuse_quantized
    from mbq_export.families.locate import locate, read_config
    from mbq_export.pipeline.plan import make_plan
    from mbq_export.quantize.foreign import settings_of
    from mbq_export.quantize.importing import import_checkpoint
    from mbq_export.writing import staging

    options.refuse_unfinished(request.out)
    folder = locate(request.model, models=request.models).folder
    config = read_config(folder)
    if settings_of(config) is None:
        refuse_quantized(folder, config)
        raise UsageError(
            "E2003",
            "--scales is missing.",
            why=f"{folder.name} has weights to round, and scales decide how",
            fix=f"mbq-export calibrate --model {request.model} -o DIR, then --scales DIR",
        )
    with located("plan"):
        plan = make_plan(request)
    assert plan.foreign is not None  # settings were found
    with staging(request.out), console.progress("import") as progress:
        checkpoint = import_checkpoint(
            plan.foreign, plan.load(), out=request.out, progress=progress
        )
    _finish(console, plan, checkpoint)


def _finish(console: Console, plan: "Plan", checkpoint: "QuantCheckpoint") -> None:
    from mbq_export.evaluate.width_table import HEADER, width_rows, width_summary

    console.table(("module group", "count", "bits", "reason"), plan.table())
    linears, out = checkpoint.info["linears"], checkpoint.folder
    mixed = checkpoint.info.get("mixed")
    if mixed is not None:
        console.table(HEADER, width_rows(mixed))
        console.text(width_summary(mixed))
    console.finish(
        {"checkpoint": str(out), "scheme": checkpoint.scheme_name, "linears": linears},
        what=f"{out}  {len(linears)} linears",
    )


def _with_calibrated_group(request: "BuildRequest", calib: Mapping[str, Any]) -> "BuildRequest":
    """The request with the calibration's group size, if none was named and both schemes have the same sizes."""
    from mbq_export.pipeline.request import scheme_of
    from mbq_export.schemes import SCHEMES

    scheme, calibrated = scheme_of(request), SCHEMES.members().get(str(calib.get("scheme")))
    if request.group_size is not None or scheme is None or calibrated is None:
        return request
    if scheme.group_sizes != calibrated.group_sizes:
        return request
    return replace(request, group_size=calib.get("group_size"))
