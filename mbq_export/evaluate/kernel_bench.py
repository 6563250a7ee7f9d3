"""The kernel benchmark as a command of the package: `mbq_kernels.bench` with plots, errors and progress of ours.

``mbq_kernels`` is imported inside the functions: asking for help must not load torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbq_export.errors import GateError, UsageError
from mbq_export.evaluate.kernel_plots import write_plots
from mbq_export.progress import Progress, silent


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRequest:
    """What to time, as options say it.

    Attributes:
        suite: ``short`` or ``full``.
        peers: ``auto``, ``none`` or a list of packages.
        shapes: ``NxK,...`` in place of the suite's; None keeps them.
        library: The compiled kernels; None takes what a checkout built.
        dry_run: Rehearse on the CPU, time nothing.
    """

    suite: str = "short"
    peers: str = "auto"
    shapes: str | None = None
    library: Path | None = None
    dry_run: bool = False


def bench_kernels(
    request: KernelRequest, *, out: Path | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Time the kernels and write ``kernels.json``, ``kernels.md`` and plots.

    Args:
        request: What to time.
        out: Existing folder for the files; None writes none.
        progress: Told after every linear.

    Returns:
        The result; `check_gate` says whether every answer was right.

    Raises:
        UsageError: E2001 for an unknown suite or peer, E2003 for a bad shape.
        MachineError: E3001 without a GPU, E3005 without the library, unless it is a dry run.
    """
    from mbq_kernels.bench.run import Request, chosen_suite, run  # noqa: PLC0415
    from mbq_kernels.bench.shapes import SUITES, shapes_of  # noqa: PLC0415

    if request.suite not in SUITES:
        raise UsageError(
            "E2001",
            f"Unknown suite {request.suite!r}.",
            why=f"known: {', '.join(SUITES)}",
            fix="--suite short",
        )
    shapes = shapes_of(request.shapes) if request.shapes else ()

    def keep(result: dict[str, Any]) -> None:
        if out is not None:
            write_kernel_result(out, result)

    result = run(
        Request(
            suite=chosen_suite(SUITES[request.suite], shapes),
            peers=request.peers,
            library=request.library,
            dry_run=request.dry_run,
        ),
        progress=progress,
        keep=keep,
    )
    keep(result)
    return result


def write_kernel_result(folder: Path, result: dict[str, Any]) -> None:
    """Write the result, its plots and its page."""
    from mbq_kernels.bench.document import write_result  # noqa: PLC0415
    from mbq_kernels.bench.page import page  # noqa: PLC0415

    write_result(folder, result, page(result, write_plots(folder, result)))


def check_gate(result: dict[str, Any]) -> None:
    """Refuse a result with a wrong answer of ours.

    Raises:
        GateError: E1109 with every wrong answer.
    """
    from mbq_kernels.bench.document import failures  # noqa: PLC0415

    wrong = failures(result)
    if wrong:
        raise GateError(
            "E1109",
            f"{len(wrong)} answers of kernels are wrong, the first: {wrong[0]}.",
            why="a kernel that computes something else is not timed",
            fix="python -m pytest tests/kernels",
            context={"wrong": wrong, "result": result},
        )


def lines_of(result: Mapping[str, Any]) -> list[str]:
    """The result in short lines for a terminal."""
    from mbq_kernels.bench.summary import summary  # noqa: PLC0415

    return summary(result)
