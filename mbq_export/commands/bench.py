"""Time bundles against each other, or the kernels against their limits."""

from pathlib import Path
from typing import Annotated

import typer

from mbq_export.commands import options
from mbq_export.commands.console import Console, counted
from mbq_export.errors import UsageError
from mbq_export.native import CALL_SECONDS


def command(
    context: typer.Context,
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(help="One bundle, or several to compare.", metavar="BUNDLE..."),
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            "-p", "--prompt-tokens", help="Text tokens, for example 16,64.", show_default=False
        ),
    ] = None,
    new_tokens: Annotated[
        str, typer.Option("-n", "--new-tokens", help="Tokens to generate.")
    ] = "32",
    images: Annotated[str, typer.Option("--images", help="Pictures, for example 0,1.")] = "1",
    picture: Annotated[
        Path | None, typer.Option("--image", help="A picture of yours.", show_default=False)
    ] = None,
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", help="Requests that count.")
    ] = 10,
    warmup: Annotated[int, typer.Option("--warmup", help="Requests before them.")] = 3,
    backend: options.Runner = "ort",
    lowering: options.Lowering = None,
    threads: options.Threads = 0,
    engine_timeout: options.EngineTimeout = CALL_SECONDS,
    accuracy_level: Annotated[
        int,
        typer.Option(
            "--ort-accuracy-level", help="0 exact; 4 int8 activations, faster.", min=0, max=4
        ),
    ] = 0,
    allow_noisy: Annotated[
        bool, typer.Option("--allow-noisy", help="A noisy machine is a warning, not an error.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder for results.", show_default=False)
    ] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Time single linears on a GPU, no bundle.")
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option("--suite", help="--kernels: short (default) or full.", show_default=False),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            "--peers", help="--kernels: auto (default), none, or packages.", show_default=False
        ),
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option("--shapes", help="--kernels: NxK,... to time instead.", show_default=False),
    ] = None,
    library: Annotated[
        Path | None,
        typer.Option("--library", help="--kernels: the compiled kernels.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="--kernels: rehearse without a GPU, time nothing.")
    ] = False,
) -> None:
    """Time bundles against each other, interleaved in one run; or kernels against their limits.

    mbq-export bench baseline out -n 32 -o results

    mbq-export bench --kernels --suite full -o results
    """
    given = {"--suite": suite, "--peers": peers, "--shapes": shapes, "--library": library}
    named = [name for name, value in given.items() if value is not None]
    if kernels:
        request = (suite or "short", peers or "auto", shapes, library, dry_run)
        _bench_kernels(context.obj, request, bundles or [], out)
        return
    if named or dry_run:
        raise UsageError(
            "E2002",
            f"{(named or ['--dry-run'])[0]} is for kernels, and bundles are timed here.",
            why="bundles are timed as they are",
            fix="add --kernels, and leave out the bundles",
        )
    if not bundles:
        raise typer.BadParameter("name a bundle, or --kernels", param_hint="BUNDLE...")
    from mbq_export.bundle import Bundle
    from mbq_export.evaluate.bench import Contender, Protocol, bench, matrix
    from mbq_export.evaluate.bench_report import comparison_rows, noise_error, rows
    from mbq_export.runtime import default_lowering

    console: Console = context.obj
    contenders = [
        Contender(
            bundle=opened,
            name=opened.name,
            backend=backend,
            lowering=lowering or default_lowering(opened),
            threads=threads,
            accuracy_level=accuracy_level,
            engine_timeout_s=engine_timeout,
        )
        for opened in (Bundle.open(path) for path in bundles)
    ]
    workloads = matrix(
        prompt_tokens=options.numbers(prompt_tokens, "--prompt-tokens", least=1) or (None,),
        new_tokens=options.numbers(new_tokens, "--new-tokens", least=1),
        images=options.numbers(images, "--images", least=0),
        picture=picture,
    )
    results = options.result_folder(out, bundles)
    protocol = Protocol(repetitions=repetitions, warmup=warmup)
    with console.progress("bench") as progress:
        report = bench(contenders, workloads, protocol=protocol, progress=progress)
    if results is not None:
        report.write(results / "bench.json")
    console.table(
        ("bundle", "test", "p50 ms", "p95", "p99", "CoV %", "tok/s", "% of roofline"), rows(report)
    )
    if len(contenders) > 1:
        console.text()
        console.table(
            ("workload", "figure", "bundle", "p50 ms", "baseline", "ratio", "p10 to p90"),
            comparison_rows(report),
        )
    noisy = noise_error(report)
    if noisy is not None and not allow_noisy:
        noisy.context["result"] = report.as_json()
        raise noisy
    if noisy is not None:
        console.warn("W1301", f"{noisy.message} {noisy.why}")
    console.finish(
        report.as_json(), what=f"{counted(contenders, 'bundle')}, {counted(workloads, 'workload')}"
    )


def _bench_kernels(
    console: Console,
    request: tuple[str, str, str | None, Path | None, bool],
    bundles: list[Path],
    out: Path | None,
) -> None:
    """Time kernels, write the result, refuse it if an answer was wrong."""
    from mbq_export.evaluate.kernel_bench import KernelRequest, bench_kernels, check_gate, lines_of

    if bundles:
        raise UsageError(
            "E2002",
            f"--kernels times single linears, not {bundles[0]}.",
            why="kernels are timed on random weights",
            fix="leave out --kernels, or the bundle",
        )
    suite, peers, shapes, library, dry_run = request
    folder = options.result_folder(out, [])
    asked = KernelRequest(suite=suite, peers=peers, shapes=shapes, library=library, dry_run=dry_run)
    with console.progress("bench --kernels") as progress:
        result = bench_kernels(asked, out=folder, progress=progress)
    for line in lines_of(result):
        console.text(line)
    check_gate(result)
    rows = counted(result["rows"], "row")
    console.finish(result, what=f"{rows}, {'nothing timed: a dry run' if dry_run else 'timed'}")
