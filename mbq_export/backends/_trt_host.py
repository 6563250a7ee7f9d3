"""An engine in a process of its own, seen from here as any other engine.

    open_hosted ── GPU? record? version, device, plugins? ──► child: deserialise, bind ──► HostedEngine.run

Every check comes before the child is started, from what the build recorded. A child that dies is an ordinary error.
"""

import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from numpy.typing import NDArray

from mbq_export.backends import _tensorrt, _trt_flavour
from mbq_export.backends._feeds import checked_feeds
from mbq_export.backends._trt_channel import Closed, receive, send
from mbq_export.backends._trt_flavour import Installed
from mbq_export.backends._trt_job import JOB, LOG, PLUGINS, Job, Result
from mbq_export.backends._trt_outcome import Story, checked, refusal
from mbq_export.backends._trt_record import check_fits, read_record
from mbq_export.backends.base import TensorSpec
from mbq_export.errors import MachineError
from mbq_export.native import (
    CALL_SECONDS,
    GRACE_S,
    LocalGpu,
    RunningChild,
    local_gpu,
    start_child,
)
from mbq_export.plugin_library import PluginLibrary, find_plugin_library

NVIDIA: Final = "0x10de"
PCI_DEVICES: Final = Path("/sys/bus/pci/devices")
RUNS_HERE: Final = "--backend ort runs the same bundle on this machine"
SESSION: Final = (
    sys.executable,
    "-P",
    "-X",
    "faulthandler",
    "-m",
    "mbq_export.backends._trt_session",
)
CACHE: Final = "past_key_values."
"""Begins the names of a decoder's cache inputs."""


class HostedEngine:
    """An engine whose child is running. A decoder keeps its cache in the child."""

    def __init__(
        self,
        job: Job,
        record: Mapping[str, Any],
        child: RunningChild,
        folder: Any,
        *,
        timeout_s: float = CALL_SECONDS,
    ) -> None:
        """Take over a child that has been started, and wait until it has loaded the engine."""
        self._job, self._child, self._folder, self._timeout_s = job, child, folder, timeout_s
        entry = record["engine"]
        self._inputs, self._outputs = kept_ports(specs(entry["inputs"]), specs(entry["outputs"]))
        self._open = True
        self._answer()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` wants."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` returns."""
        return self._outputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engine once.

        Raises:
            FormatError: E4102 for feeds of another form.
            BuildError: E6003 if the child dies, E6009 if the engine or the GPU fails.
            ResourceError: E5005 if the GPU has too little memory, E5006 if it takes longer than its limit.
        """
        return self._answer(checked_feeds(self._inputs, feeds, name=self._job.onnx))

    def close(self) -> None:
        """End the child."""
        if self._open:
            self._open = False
            self._child.finish()
            self._folder.cleanup()

    def __enter__(self) -> Self:
        """Return the engine."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the engine."""
        self.close()

    def _answer(self, feeds: Mapping[str, NDArray[Any]] | None = None) -> dict[str, NDArray[Any]]:
        """Send what it is to run on, if anything, and wait for the answer."""
        try:
            with self._child.limited(self._timeout_s):
                if feeds is not None:
                    with contextlib.suppress(Closed):  # the answer's absence says why
                        send(self._child.requests, {"op": "run"}, feeds)
                head, arrays = receive(self._child.answers)
        except Closed:
            self._open = False
            ended = self._child.finish()
            limit = self._timeout_s if self._child.overdue else GRACE_S
            with self._folder:
                checked(self._job, ended, timeout_s=limit)
            raise
        if head["kind"]:
            said = Result(
                kind=head["kind"], message=head["message"], details=tuple(head.get("details", ()))
            )
            error = refusal(self._job, said, Story.read(self._child.log), "")
            self.close()
            raise error
        return arrays


def open_hosted(
    flavour: str,
    path: Path,
    *,
    timeout_s: float = CALL_SECONDS,
    session: Sequence[str] = SESSION,
) -> HostedEngine:
    """Load an engine in a child.

    Args:
        flavour: Which TensorRT.
        path: The engine, inside a bundle.
        timeout_s: Limit of the load, and of every run; after it the child is ended.
        session: Command line of the child, without the job.

    Raises:
        MachineError: E3001 or E3002 without a GPU or its driver, E3003 without TensorRT, E3005 without the plugins.
        FormatError: E4501, E4602 for the engine's files.
        IncompatibleError: E7001, E7002, E7003, E7006 to E7008 if it was built for something else.
        BuildError: E6003, E6008 if TensorRT dies or refuses it all the same.
        ResourceError: E5005 if the GPU has too little memory, E5006 if the limit has passed.
    """
    gpu = gpu_for(path)
    record = read_record(path)
    installed = _tensorrt.installed_flavour(flavour)
    check_fits(path, record, installed, gpu)
    library = None
    if record["engine"]["plugin_layers_expected"]:
        bundle = path.resolve().parents[3]
        wanted = record["plugin"]["sha256"]
        library = find_plugin_library(bundle=bundle, sms=(gpu.sm,), sha256=wanted)
    job, child, folder = start(path, record, installed, library, session)
    return HostedEngine(job, record, child, folder, timeout_s=timeout_s)


def start(
    path: Path,
    record: Mapping[str, Any],
    installed: Installed,
    library: PluginLibrary | None,
    session: Sequence[str] = SESSION,
) -> tuple[Job, RunningChild, Any]:
    """Start the child of an engine that fits; return it with its job and the job's folder."""
    folder = tempfile.TemporaryDirectory(prefix="mbq-")
    work = Path(folder.name)
    (work / path.name).symlink_to(path.resolve())
    if library is not None:
        (work / PLUGINS).symlink_to(library.path)
    job = session_job(path.name, record, installed, work)
    job.write()
    environment = _trt_flavour.child_environment(installed, work)
    child = start_child([*session, JOB], log=work / LOG, env=environment, cwd=work)
    return job, child, folder


def session_job(name: str, record: Mapping[str, Any], installed: Installed, work: Path) -> Job:
    """Write down what the child needs to know of an engine."""
    entry = record["engine"]
    expected = entry["plugin_layers_expected"]
    return Job(
        op="session",
        workdir=work,
        flavour=installed.flavour.name,
        module=installed.module,
        link=installed.flavour.link,
        library=str(installed.library or ""),
        onnx=name,
        plugins=PLUGINS if expected else "",
        plugin_layers=dict.fromkeys(expected, ()),
        inputs=tuple(each["name"] for each in entry["inputs"]),
        outputs=tuple(each["name"] for each in entry["outputs"]),
        shapes={each["name"]: each["shape"] for each in (*entry["inputs"], *entry["outputs"])},
        profile={name: tuple(map(tuple, s)) for name, s in entry["profiles"][0].items()},
        flags=("WEIGHT_STREAMING",) if entry["weight_streaming"] else (),
    )


def specs(entries: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs as ``engine.json`` has them."""
    return tuple(
        TensorSpec(name=each["name"], dtype=each["dtype"], shape=tuple(each["shape"]))
        for each in entries
    )


def kept_ports(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """What is left of a decoder's ports when the child keeps its cache; other engines stay as they are."""
    if not any(spec.name.startswith(CACHE) for spec in inputs):
        return inputs, outputs
    embeds, _, positions = inputs[:3]
    sequence = TensorSpec(name="sequence", dtype="int64", shape=(1,))
    return (embeds, positions, sequence), outputs[:1]


def gpu_for(path: Path) -> LocalGpu:
    """This machine's GPU.

    Raises:
        MachineError: E3001 without one, E3002 without its driver.
    """
    gpu = local_gpu()
    if gpu is not None:
        return gpu
    if not _has_nvidia_gpu(PCI_DEVICES):
        raise MachineError(
            "E3001",
            f"{path.name} cannot run: this machine has no NVIDIA GPU.",
            why="an engine holds code for one kind of GPU",
            fix=RUNS_HERE,
        )
    raise MachineError(
        "E3002",
        f"{path.name} cannot run: the NVIDIA driver is not installed.",
        why="there is a GPU, but nvidia-smi is not on PATH or names none",
        fix=("install the driver", RUNS_HERE),
    )


def _has_nvidia_gpu(devices: Path) -> bool:
    return any(file.read_text().strip() == NVIDIA for file in sorted(devices.glob("*/vendor")))
