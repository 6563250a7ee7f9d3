"""Stage 1 alone: a model and pictures become channel scales."""

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console


def command(
    context: typer.Context,
    model: options.Model,
    out: options.Out,
    wbits: options.WeightBits = None,
    group_size: options.GroupSize = 128,
    method: options.Method = "mbq",
    compat: options.Compat = "none",
    data: options.Data = None,
    samples: options.Samples = 128,
    text_only_ok: options.TextOnly = False,
    skip_bad: options.SkipBad = 0,
    force: options.Force = False,
) -> None:
    """Find channel scales: gradients per token class, then a search per unit.

    mbq-export calibrate --model tiny-llava-ov -o scales
    """
    from mbq_export.calibrate.sensitivity import rows
    from mbq_export.pipeline.calibration import channel_scales
    from mbq_export.pipeline.plan import make_plan
    from mbq_export.pipeline.request import BuildRequest
    from mbq_export.writing import partial_path, publish

    console: Console = context.obj
    request = BuildRequest(
        model=model,
        out=out,
        weight_bits=wbits,
        group_size=group_size,
        method=method,
        replaced=options.switches(compat),
        data=data,
        samples=samples,
        targets=("cpu",),
        models=options.models_folder(),
        seed=console.seed,
        text_only_ok=text_only_ok,
        skip_bad=skip_bad,
        force=force,
    )
    plan = make_plan(request)
    loaded = plan.family.load(plan.source.folder)
    with console.progress("calibrate") as progress:
        scales = channel_scales(plan, loaded, console.note, state=None, progress=progress)
    scales.write(partial_path(out))
    publish(partial_path(out), out)
    console.table(
        ("layer", "linear", "vision / answer", "prompt / answer", "r"), rows(scales.sensitivity)
    )
    units = scales.calib["units"]
    console.finish(
        {"calibration": str(out), "data": scales.calib["data"], "units": units},
        what=f"{out}  {len(units)} units",
    )
