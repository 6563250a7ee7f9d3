"""The parent's side of TensorRT: asks a child for one engine at a time and publishes what comes back.

    EngineRequest ──► own checks ──► child: parse, build ──► layer table ──► <out>/{decoder,vision}.engine
                                                                             engine.json  layers.json

Imports no TensorRT. The folder appears by one rename after everything in it is complete.
"""

import logging
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mbq_export.backends import _trt_flavour, _trt_layers
from mbq_export.backends._trt_flavour import Installed
from mbq_export.backends._trt_job import JOB, LOG, PLAN, Job, Result
from mbq_export.backends._trt_layers import LayerTable, profile_shapes
from mbq_export.backends._trt_outcome import Story, checked, keep_logs
from mbq_export.backends.base import (
    Availability,
    EngineFile,
    EngineGraph,
    EngineRecord,
    EngineRequest,
)
from mbq_export.errors import (
    BuildError,
    FormatError,
    MachineError,
    ResourceError,
    UsageError,
    located,
)
from mbq_export.native import PROBE_TIMEOUT_S, available_memory, local_gpu, run_child
from mbq_export.progress import Progress, silent
from mbq_export.reading import sha256_of
from mbq_export.writing import json_bytes, publish, staging, write_file

logger = logging.getLogger(__name__)

ENGINE_RECORD: Final = "engine.json"
LAYER_RECORD: Final = "layers.json"
SCHEMA: Final = 1
UNVERIFIED: Final = "built ahead of time, not run on a device"

WORKER: Final = (
    sys.executable,
    "-P",
    "-X",
    "faulthandler",
    "-m",
    "mbq_export.backends._trt_worker",
)
OPT_LEVEL: Final = 3

# Measured: 3.3 GB for 988 MB of weights, 0.3 GB for the sample model.
BUILD_BYTES_PER_WEIGHT_BYTE: Final = 3.5
BUILD_BYTES: Final = 1 << 29

# The libraries map more than they touch: 0.75 GB of address space for a resident 0.2 GB.
ADDRESS_SPACE_MARGIN: Final = 2 << 30

REMINDER: Final = "has Int64 binding"
"""Said of every integer input, whoever feeds it and with what: no news to a user."""

MOST_ELEMENTS: Final = 2**31


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job that succeeded, while its folder still exists."""

    result: Result
    workdir: Path
    seconds: float


def availability(flavour: str) -> Availability:
    """Whether a flavour is installed; nothing of it is imported."""
    wanted = _trt_flavour.FLAVOURS[flavour]
    try:
        installed = _trt_flavour.find(flavour)
    except MachineError as error:
        return Availability(ok=False, found=error.why, needed=wanted.title, fix=wanted.install)
    return Availability(
        ok=True, found=installed.label, needed=wanted.title, version=installed.version
    )


def probe(flavour: str) -> Result:
    """Load the library in a child, as ``doctor`` does.

    Raises:
        MachineError: E3003 if it is missing or cannot be imported, E3013 if its plain name leads elsewhere.
        BuildError: E6003 if it crashes.
    """
    installed = _trt_flavour.find(flavour)
    with tempfile.TemporaryDirectory(prefix="mbq-") as folder:
        job = _job("probe", installed, Path(folder))
        return run_job(job, installed, timeout_s=PROBE_TIMEOUT_S).result


def build(
    flavour: str,
    request: EngineRequest,
    progress: Progress = silent,
    *,
    worker: Sequence[str] = WORKER,
) -> EngineRecord:
    """Build the engines of a request and publish their folder.

    Args:
        flavour: Which TensorRT.
        request: What to build.
        progress: Called before the first engine and after each.
        worker: Command line of the child, without the job.

    Returns:
        What was written. Its checks may have failed; the caller's gates decide.

    Raises:
        UsageError: E2008 for an impossible profile, E2012 for a target of another flavour.
        MachineError: E3003, E3013.
        FormatError: E4404 if a file holds no graph.
        ResourceError: E5001, E5003, E5004, E5006, E5008.
        BuildError: E6001, E6002, E6003, E6005, E6012.
    """
    _check_target(flavour, request)
    for graph in request.graphs:
        with located(graph.name):
            check_profile(graph)
            check_memory(graph)
    installed = _trt_flavour.find(flavour)
    engines: dict[str, EngineFile] = {}
    tables: dict[str, LayerTable] = {}
    with staging(request.out) as folder:
        for index, graph in enumerate(request.graphs):
            progress(index, len(request.graphs), f"{request.target.folder} {graph.name}")
            with located(f"engine {graph.name}"):
                engines[graph.name], tables[graph.name] = _one_engine(
                    graph, request, installed, folder, worker
                )
        _write_records(folder, request, installed, engines, tables)
        publish(folder, request.out)
    progress(len(request.graphs), len(request.graphs), request.target.folder)
    return EngineRecord(
        folder=request.out,
        library=installed.label,
        engines=engines,
        verified=False,
        reason=UNVERIFIED,
    )


def run_job(
    job: Job,
    installed: Installed,
    *,
    timeout_s: float,
    worker: Sequence[str] = WORKER,
    logs: Path | None = None,
) -> Outcome:
    """Run one job in a child and turn every way to fail into an error.

    Args:
        job: What to do.
        installed: The flavour that does it.
        timeout_s: Limit.
        worker: Command line of the child, without the job.
        logs: Where the child's logs are kept if it fails; named in the error.

    Raises:
        MbqError: As `_trt_outcome.checked` says.
    """
    job.write()
    child = run_child(
        [*worker, JOB],
        log=job.workdir / LOG,
        timeout_s=timeout_s,
        env=_trt_flavour.child_environment(installed, job.workdir),
        cwd=job.workdir,
        address_space_bytes=None if local_gpu() else available_memory() + ADDRESS_SPACE_MARGIN,
    )
    result = checked(job, child, timeout_s=timeout_s, logs=logs)
    return Outcome(result=result, workdir=job.workdir, seconds=child.seconds)


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


def _one_engine(
    graph: EngineGraph,
    request: EngineRequest,
    installed: Installed,
    folder: Path,
    worker: Sequence[str],
) -> tuple[EngineFile, LayerTable]:
    """Build one engine into the staged folder."""
    logs = (request.logs or request.out.with_name(request.out.name + ".logs")) / graph.name
    with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
        for path in graph_files(graph.onnx):
            (Path(work) / path.name).symlink_to(path.resolve())
        job = _job("build", installed, Path(work), graph, request)
        outcome = run_job(job, installed, timeout_s=request.timeout_s, worker=worker, logs=logs)
        for warning in Story.read(outcome.workdir / LOG).warnings:
            level = logging.INFO if REMINDER in warning else logging.WARNING
            logger.log(level, "tensorrt: %s", warning)
        table = _table(outcome.workdir, logs)
        path = folder / f"{graph.name}.engine"
        (outcome.workdir / PLAN).replace(path)
    engine = EngineFile(
        path=request.out / path.name,
        sha256=sha256_of(path),
        size=path.stat().st_size,
        layers=len(table.layers),
        checks=_trt_layers.checks(table, graph),
        seconds=outcome.seconds,
        peak_rss_bytes=outcome.result.peak_rss_bytes,
    )
    logger.info("%s: %d bytes, %d layers", path.name, engine.size, engine.layers)
    return engine, table


def _table(workdir: Path, logs: Path) -> LayerTable:
    """Read the layer table of a build; a log that cannot be read is kept."""
    try:
        with (workdir / LOG).open(errors="replace") as lines:
            return LayerTable.parse(lines)
    except BuildError as error:
        error.context["logs"] = keep_logs(workdir, logs)
        raise


def _job(
    op: str,
    installed: Installed,
    workdir: Path,
    graph: EngineGraph | None = None,
    request: EngineRequest | None = None,
) -> Job:
    """Write down one call."""
    fields: dict[str, Any] = {}
    if graph is not None and request is not None:
        fields = {
            "onnx": graph.onnx.name,
            "inputs": tuple(spec.name for spec in graph.inputs),
            "outputs": tuple(spec.name for spec in graph.outputs),
            "profile": {spec.name: profile_shapes(spec, graph) for spec in graph.inputs},
            "cc": (f"SM{request.target.sm}",),
            "workspace_mib": graph.workspace_mib,
        }
    return Job(
        op=op,
        workdir=workdir.resolve(),
        flavour=installed.flavour.name,
        module=installed.module,
        link=installed.flavour.link,
        library=str(installed.library),
        opt_level=OPT_LEVEL,
        **fields,
    )


def _write_records(
    folder: Path,
    request: EngineRequest,
    installed: Installed,
    engines: dict[str, EngineFile],
    tables: dict[str, LayerTable],
) -> None:
    """Write ``engine.json`` and ``layers.json``: no times, so that two builds are equal."""
    record = {
        "schema": SCHEMA,
        "flavour": installed.flavour.name,
        "version": installed.version,
        "sm": [request.target.folder],
        "op_level": request.target.op_level,
        "verified": False,
        "why": UNVERIFIED,
        "engines": {
            graph.name: _engine_entry(graph, engines[graph.name]) for graph in request.graphs
        },
    }
    layers = {
        "schema": _trt_layers.SCHEMA,
        "library": installed.label,
        "engines": {name: table.as_json() for name, table in tables.items()},
    }
    write_file(folder / ENGINE_RECORD, json_bytes(record))
    write_file(folder / LAYER_RECORD, json_bytes(layers))


def _engine_entry(graph: EngineGraph, engine: EngineFile) -> dict[str, Any]:
    """One engine in ``engine.json``."""
    return {
        "file": engine.path.name,
        "sha256": engine.sha256,
        "bytes": engine.size,
        "onnx": {path.name: sha256_of(path) for path in graph_files(graph.onnx)},
        "lowering": graph.lowering,
        "inputs": [asdict(spec) for spec in graph.inputs],
        "outputs": [asdict(spec) for spec in graph.outputs],
        "profiles": [{spec.name: profile_shapes(spec, graph) for spec in graph.inputs}],
        "flags": [],
        "workspace_mib": graph.workspace_mib,
        "opt_level": OPT_LEVEL,
        "layers": engine.layers,
        "plugin_layers_expected": 0,
        "plugin_layers_found": 0,
        "checks": [check.as_json() for check in engine.checks],
    }


def _check_target(flavour: str, request: EngineRequest) -> None:
    if request.target.flavour != flavour:
        raise UsageError(
            "E2012",
            f"{flavour} cannot build for target {request.target}.",
            why=f"the target asks for {request.target.flavour}",
            fix=f"--target {request.target.name}:{flavour}",
        )


def _bad_profile(found: str, rule: str) -> UsageError:
    return UsageError(
        "E2008",
        f"The optimization profile is invalid: {found}.",
        why=rule,
        fix="--max-context N",
    )
