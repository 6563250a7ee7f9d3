"""Stage 1 alone: a model and pictures become channel scales."""

import typer

from mbq_export.commands import (
    memory_options,
    number_options,
    options,
    search_options,
    width_options,
)
from mbq_export.commands.console import Console
from mbq_export.errors import UsageError, located


def command(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    wbits: number_options.WeightBits = None,
    scheme: number_options.Scheme = None,
    group_size: number_options.GroupSize = None,
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
    avg_bits: width_options.AvgBits = None,
    bytes_budget: width_options.BytesBudget = None,
    import_scales: number_options.ImportScales = None,
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
    force: options.Force = False,
) -> None:
    """Find channel scales: gradients per token class, then a search per unit.

    A budget of bits changes no scale; with it gradients are measured for quantize to decide by, whatever the method.

    mbq-export calibrate --model tiny-llava-ov -o scales
    """
    from mbq_export.calibrate.sensitivity import rows
    from mbq_export.channel_scales import CALIB_FILE
    from mbq_export.pipeline.calibration import Encoded, channel_scales, room_of
    from mbq_export.pipeline.plan import make_plan
    from mbq_export.pipeline.request import BuildRequest
    from mbq_export.writing import publish, staging

    console: Console = context.obj
    request = BuildRequest(
        model=model,
        out=out,
        weight_bits=wbits,
        scheme=scheme,
        group_size=number_options.group_size(group_size),
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
        mixed=width_options.mixed_bits(
            avg_bits=avg_bits, bits=None, bytes_budget=bytes_budget, latency_table=None
        ),
        import_scales=import_scales,
        sensitivity=sensitivity,
        data=data,
        samples=samples,
        max_ram=memory_options.max_ram(max_ram),
        targets=("cpu",),
        models=options.models_folder(),
        seed=console.seed,
        text_only_ok=text_only_ok,
        skip_bad=skip_bad,
        ignore_extra=options.patterns(ignore_extra, "--ignore-extra"),
        record=CALIB_FILE,
        force=force,
    )
    options.refuse_unfinished(out)
    with located("plan"):
        plan = make_plan(request)
    if plan.scheme is None:
        raise UsageError(
            "E2005",
            f"--wbits {wbits} has nothing to calibrate.",
            why="the unquantized baseline has no scales",
            fix=("--wbits 3", "--wbits 4"),
        )
    with staging(out) as staged:
        loaded = plan.load()
        with (
            console.progress("calibrate") as progress,
            room_of(plan, staged, console.note) as room,
        ):
            scales = channel_scales(
                Encoded(plan, loaded), console.note, state=None, room=room, progress=progress
            )
        scales.write(staged)
        publish(staged, out)
    if scales.sensitivity.get("layers"):
        console.table(
            ("layer", "linear", "vision / answer", "prompt / answer", "r"), rows(scales.sensitivity)
        )
    elif import_scales is not None:
        console.text("scales of others: nothing was searched")
    else:
        console.text(f"--method {method} asks for no gradients")
    units = scales.calib["units"]
    console.finish(
        {
            "calibration": str(out),
            "data": scales.calib.get("data"),
            "memory": room.as_json(),
            "units": units,
        },
        what=f"{out}  {len(units)} units",
    )
