"""Stage 2 alone: channel scales become a packed checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console


def command(
    context: typer.Context,
    model: options.Model,
    scales: Annotated[Path, typer.Option("--scales", help="Folder made by calibrate.")],
    out: options.Out,
    wbits: options.WeightBits = None,
    group_size: options.GroupSize = 128,
    force: options.Force = False,
) -> None:
    """Fold the scales, round, pack, and write a checkpoint.

    mbq-export quantize --model tiny-llava-ov --scales scales -o checkpoint
    """
    from mbq_export.channel_scales import ChannelScales
    from mbq_export.pipeline.plan import make_plan
    from mbq_export.pipeline.request import BuildRequest
    from mbq_export.quantize import quantize

    console: Console = context.obj
    found = ChannelScales.read(scales)
    request = BuildRequest(
        model=model,
        out=out,
        weight_bits=wbits,
        group_size=group_size,
        method=found.switches.method,
        data="builtin:shapes",
        targets=("cpu",),
        models=options.models_folder(),
        seed=console.seed,
        force=force,
    )
    plan = make_plan(request)
    loaded = plan.family.load(plan.source.folder)
    with console.progress("quantize") as progress:
        checkpoint = quantize(
            loaded, found, scheme=plan.scheme, group_size=group_size, out=out, progress=progress
        )
    console.table(("module group", "count", "bits", "reason"), plan.table())
    linears = checkpoint.info["linears"]
    console.finish(
        {"checkpoint": str(out), "scheme": checkpoint.scheme_name, "linears": linears},
        what=f"{out}  {len(linears)} linears",
    )
