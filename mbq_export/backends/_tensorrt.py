"""The parent's side of TensorRT: asks a child for one engine at a time and publishes what comes back.

    EngineRequest ──► own checks ──► child: parse, build ──► layer table ──► <out>/{decoder,vision}.engine
                                                                             engine.json  layers.json

Imports no TensorRT. The folder appears by one rename after everything in it is complete.
"""

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from mbq_export.backends import _trt_flavour, _trt_layer_checks
from mbq_export.backends._trt_flavour import Installed
from mbq_export.backends._trt_job import JOB, LOG, PLAN, PLUGINS, TIMES, Job, Result
from mbq_export.backends._trt_layers import LayerTable, profile_shapes
from mbq_export.backends._trt_outcome import Story, checked, keep_logs
from mbq_export.backends._trt_preflight import (
    AHEAD_OF_TIME,
    check_device,
    check_memory,
    check_options,
    check_profile,
    graph_files,
)
from mbq_export.backends._trt_record import why_unverified, write_records
from mbq_export.backends.base import (
    Availability,
    EngineFile,
    EngineGraph,
    EngineRecord,
    EngineRequest,
)
from mbq_export.errors import BuildError, InternalError, MachineError, located
from mbq_export.native import PROBE_TIMEOUT_S, available_memory, local_gpu, run_child
from mbq_export.plugin_library import PluginLibrary
from mbq_export.progress import Progress, silent
from mbq_export.reading import sha256_of
from mbq_export.writing import publish, staging

logger = logging.getLogger(__name__)

WORKER: Final = (
    sys.executable,
    "-P",
    "-X",
    "faulthandler",
    "-m",
    "mbq_export.backends._trt_worker",
)
# The libraries map more than they touch: 0.75 GB of address space for a resident 0.2 GB.
ADDRESS_SPACE_MARGIN: Final = 2 << 30

REMINDER: Final = "has Int64 binding"
"""Said of every integer input, whoever feeds it and with what: no news to a user."""

KNOWN_TABLES: Final = frozenset({"rtx"})
"""Flavours whose layer tables have been seen. Of others none has, so nothing is refused for what is in theirs; that
every plugin is there is asked of the parser, whatever the flavour."""

FLAGS: Final = {"weight_streaming": "WEIGHT_STREAMING"}
"""Builder flag of each option that is one."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A job that succeeded, while its folder still exists."""

    result: Result
    workdir: Path
    seconds: float


def availability(flavour: str) -> Availability:
    """Whether a flavour is installed; nothing of it is imported here."""
    wanted = _trt_flavour.FLAVOURS[flavour]
    try:
        installed = installed_flavour(flavour)
    except MachineError as error:
        return Availability(ok=False, found=error.why, needed=wanted.title, fix=wanted.install)
    return Availability(
        ok=True, found=installed.label, needed=wanted.title, version=installed.version
    )


def installed_flavour(flavour: str) -> Installed:
    """Look a flavour up; a package without a version, as some systems have it, is asked in a child.

    Raises:
        MachineError: E3003, E3013.
        BuildError: E6003 if it crashes.
    """
    installed = _trt_flavour.find(flavour)
    if installed.version != _trt_flavour.UNKNOWN:
        return installed
    return replace(installed, version=probe(flavour).version)


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
        UsageError: E2002 for an option that does not go with the flavour, E2008 for an impossible profile, E2012 for a
            target of another flavour.
        MachineError: E3001, E3003, E3005, E3013.
        FormatError: E4404 if a file holds no graph.
        ResourceError: E5001, E5003, E5004, E5006, E5008.
        BuildError: E6001 to E6005, E6012.
        IncompatibleError: E7003 for a plugin library without an operator of the graph.
    """
    check_options(flavour, request.devices, request.options)
    for graph in request.graphs:
        with located(graph.name):
            check_profile(graph)
            check_memory(graph)
    installed = installed_flavour(flavour)
    if flavour not in AHEAD_OF_TIME:
        check_device(flavour, request.target, local_gpu())
    engines: dict[str, EngineFile] = {}
    tables: dict[str, LayerTable] = {}
    with staging(request.out) as folder:
        for index, graph in enumerate(request.graphs):
            progress(index, len(request.graphs), f"{request.target.folder} {graph.name}")
            with located(f"engine {graph.name}"):
                engines[graph.name], tables[graph.name] = _one_engine(
                    graph, request, installed, folder, worker
                )
        write_records(folder, request, installed, engines, tables)
        publish(folder, request.out)
    progress(len(request.graphs), len(request.graphs), request.target.folder)
    return EngineRecord(
        folder=request.out,
        library=installed.label,
        engines=engines,
        verified=False,
        reason=why_unverified(flavour),
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


def _one_engine(
    graph: EngineGraph,
    request: EngineRequest,
    installed: Installed,
    folder: Path,
    worker: Sequence[str],
) -> tuple[EngineFile, LayerTable]:
    """Build one engine into the staged folder."""
    known = installed.flavour.name in KNOWN_TABLES
    logs = (request.logs or request.out.with_name(request.out.name + ".logs")) / graph.name
    with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
        for path in graph_files(graph.onnx):
            (Path(work) / path.name).symlink_to(path.resolve())
        job = _job("build", installed, Path(work), graph, request)
        _lay_out(job, request)
        outcome = run_job(job, installed, timeout_s=request.timeout_s, worker=worker, logs=logs)
        for note in outcome.result.notes:
            logger.warning("engine %s: %s", graph.name, note)
        for warning in Story.read(outcome.workdir / LOG).warnings:
            level = logging.INFO if REMINDER in warning else logging.WARNING
            logger.log(level, "tensorrt: %s", warning)
        table = _table(outcome.workdir, logs, known=known)
        path = folder / f"{graph.name}.engine"
        (outcome.workdir / PLAN).replace(path)
        if request.options.timing_cache is not None:
            (outcome.workdir / TIMES).replace(folder / f"{graph.name}.timing")
    engine = EngineFile(
        path=request.out / path.name,
        sha256=sha256_of(path),
        size=path.stat().st_size,
        layers=len(table.layers),
        plugin_layers=outcome.result.plugin_layers,
        checks=_trt_layer_checks.checks_of(table, graph, known=known),
        seconds=outcome.seconds,
        peak_rss_bytes=outcome.result.peak_rss_bytes,
    )
    logger.info("%s: %d bytes, %d layers", path.name, engine.size, engine.layers)
    return engine, table


def _table(workdir: Path, logs: Path, *, known: bool) -> LayerTable:
    """Read the layer table of a build; a log that cannot be read is kept, and an error where it should be known."""
    try:
        with (workdir / LOG).open(errors="replace") as lines:
            return LayerTable.parse(lines)
    except BuildError as error:
        kept = keep_logs(workdir, logs)
        if known:
            error.context["logs"] = kept
            raise
        logger.warning("%s Nothing is checked in it; the log is kept: %s", error.message, kept)
        return LayerTable(layers=(), io=())


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
        options = request.options
        ahead = installed.flavour.name in AHEAD_OF_TIME
        fields = {
            "onnx": graph.onnx.name,
            "inputs": tuple(spec.name for spec in graph.inputs),
            "outputs": tuple(spec.name for spec in graph.outputs),
            "profile": {spec.name: profile_shapes(spec, graph) for spec in graph.inputs},
            "cc": tuple(f"SM{device.sm}" for device in request.devices) if ahead else (),
            "flags": tuple(flag for name, flag in FLAGS.items() if getattr(options, name)),
            "workspace_mib": options.workspace_mib,
            "opt_level": options.opt_level,
            "timing_cache": options.timing_cache is not None,
            "plugins": PLUGINS if graph.plugin_layers else "",
            "plugin_layers": graph.plugin_layers,
        }
    return Job(
        op=op,
        workdir=workdir.resolve(),
        flavour=installed.flavour.name,
        module=installed.module,
        link=installed.flavour.link,
        library=str(installed.library or ""),
        **fields,
    )


def _lay_out(job: Job, request: EngineRequest) -> None:
    """Put what the child reads beside its job: its paths must not differ between two builds.

    Raises:
        InternalError: E9001 if a graph wants plugins and nobody found a library.
    """
    if job.plugins:
        if request.plugins is None:
            raise InternalError("E9001", "A graph with plugins was to be built without a library.")
        _link_plugins(request.plugins, job.workdir)
    if request.options.timing_cache is not None and request.options.timing_cache.is_file():
        (job.workdir / TIMES).write_bytes(request.options.timing_cache.read_bytes())


def _link_plugins(library: PluginLibrary, workdir: Path) -> None:
    """Give the child the library that was checked.

    Raises:
        MachineError: E3005 if it is not that any more.
    """
    if not library.path.is_file() or sha256_of(library.path) != library.sha256:
        raise MachineError(
            "E3005",
            f"{library.path} has changed or gone since it was found.",
            why=f"its SHA-256 was {library.sha256[:16]}...",
            fix=("run the command again", "mbq-export plugins build"),
        )
    (workdir / PLUGINS).symlink_to(library.path)
