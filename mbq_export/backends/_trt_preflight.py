"""What is wrong with a request for engines, found before a child is started.

device     the flavour serves it; full TensorRT builds for the GPU of this machine and no other
options    what a build without a GPU cannot do
profile    smallest, typical and largest size of every symbol
memory     the estimated peak of the build, and what is free
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from mbq_export.backends._trt_layers import profile_shapes
from mbq_export.backends.base import BuilderOptions, EngineGraph
from mbq_export.errors import FormatError, MachineError, ResourceError, UsageError
from mbq_export.native import LocalGpu, available_memory
from mbq_export.target import Target

# Measured: 3.3 GB for 988 MB of weights, 0.3 GB for the sample model.
BUILD_BYTES_PER_WEIGHT_BYTE: Final = 3.5
BUILD_BYTES: Final = 1 << 29

MOST_ELEMENTS: Final = 2**31
AHEAD_OF_TIME: Final = frozenset({"rtx"})
"""Flavours that build for GPUs that are not there."""


def check_options(flavour: str, devices: Sequence[Target], options: BuilderOptions) -> None:
    """Refuse targets and options that a flavour cannot serve.

    Args:
        flavour: Which TensorRT.
        devices: What one plan is for.
        options: How it is built.

    Raises:
        UsageError: E2012 for a target of another flavour, or several devices where the plan is for one; E2002 for a
            timing cache where nothing is timed.
    """
    wrong = [device for device in devices if device.flavour != flavour]
    if wrong:
        raise UsageError(
            "E2012",
            f"{flavour} cannot build for target {wrong[0]}.",
            why=f"the target asks for {wrong[0].flavour}",
            fix=f"--target {wrong[0].name}:{flavour}",
        )
    if len(devices) > 1 and flavour not in AHEAD_OF_TIME:
        raise UsageError(
            "E2012",
            f"One plan cannot serve {', '.join(map(str, devices))}.",
            why="full TensorRT builds for the GPU it runs on",
            fix="one --target, on that device",
        )
    if options.timing_cache is not None and flavour in AHEAD_OF_TIME:
        raise UsageError(
            "E2002",
            f"A timing cache does not go with {flavour}.",
            why="a build without a GPU times nothing",
            fix="leave out --timing-cache",
        )


def check_device(flavour: str, target: Target, gpu: LocalGpu | None) -> None:
    """Refuse a full TensorRT build anywhere but on the target.

    Args:
        flavour: Which TensorRT.
        target: What to build for.
        gpu: The GPU of this machine.

    Raises:
        MachineError: E3001 without a GPU.
        UsageError: E2012 on another GPU than the target's.
    """
    if flavour in AHEAD_OF_TIME:
        return
    if gpu is None:
        raise MachineError(
            "E3001",
            f"No engine for {target} can be built here: this machine has no NVIDIA GPU.",
            why="full TensorRT times its kernels on the GPU that the engine will run on",
            fix=(
                f"run the same command on the {target.name}",
                "--target rtx4090:rtx builds without a GPU",
            ),
        )
    if gpu.sm != target.sm:
        raise UsageError(
            "E2012",
            f"No engine for {target} can be built here: this GPU is a {gpu.name} (sm{gpu.sm}).",
            why="full TensorRT builds for the GPU it runs on",
            fix=(f"--target sm{gpu.sm}:{flavour}", f"run the same command on the {target.name}"),
        )


def check_profile(graph: EngineGraph) -> None:
    """Refuse profiles before TensorRT sees them: it accepts a smallest size of 0.

    Raises:
        UsageError: E2008.
    """
    symbols = [size for spec in graph.inputs for size in spec.shape if isinstance(size, str)]
    for symbol in dict.fromkeys(symbols):
        if symbol not in graph.sizes:
            raise _bad_profile(f"{symbol} has no range", f"ranges given: {', '.join(graph.sizes)}")
        sizes = graph.sizes[symbol]
        found = f"{symbol} runs from {sizes.smallest} over {sizes.typical} to {sizes.largest}"
        if sizes.smallest < 1:
            raise _bad_profile(found, "the smallest size is at least 1")
        if not sizes.smallest <= sizes.typical <= sizes.largest:
            raise _bad_profile(found, "smallest <= typical <= largest")
    for spec in graph.inputs:
        elements = math.prod(profile_shapes(spec, graph)[-1])
        if elements >= MOST_ELEMENTS:
            raise _bad_profile(
                f"{spec.name} would have {elements} elements",
                f"a tensor has fewer than {MOST_ELEMENTS}",
            )


def check_memory(graph: EngineGraph, *, available: int | None = None) -> None:
    """Compare the estimated peak of a build with what is free.

    Args:
        graph: What to build.
        available: Free bytes; asked from the system if None.

    Raises:
        FormatError: E4404 if there is no such file.
        ResourceError: E5003 with both numbers.
    """
    if not graph.onnx.is_file():
        raise FormatError(
            "E4404",
            f"{graph.onnx} does not exist.",
            why="every engine is built from an exported graph",
            fix="export the model again",
        )
    weights = sum(path.stat().st_size for path in graph_files(graph.onnx))
    peak = int(BUILD_BYTES_PER_WEIGHT_BYTE * weights) + BUILD_BYTES
    free = available_memory() if available is None else available
    if peak > free:
        raise ResourceError(
            "E5003",
            f"Building {graph.name} needs about {peak / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB is free.",
            why=f"{BUILD_BYTES_PER_WEIGHT_BYTE} times {weights / 2**20:.0f} MiB of weights, and 0.5 GiB",
            fix=("close other programs", "build on a larger machine"),
            context={"needed_bytes": peak, "available_bytes": free},
        )


def graph_files(onnx: Path) -> tuple[Path, ...]:
    """A graph file and its external data, which lies beside it as ``<file>_data*``."""
    return (onnx, *sorted(onnx.parent.glob(f"{onnx.name}_data*")))


def _bad_profile(found: str, rule: str) -> UsageError:
    return UsageError(
        "E2008",
        f"The optimization profile is invalid: {found}.",
        why=rule,
        fix="--max-context N",
    )
