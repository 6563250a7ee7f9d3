"""The child: one probe, parse or build of TensorRT, then the end of the process.

    python -P -X faulthandler -m mbq_export.backends._trt_worker job.json

Runs in the job's private folder: reads ``job.json``, writes ``plan.partial`` and, last and by rename,
``result.json``, whose absence means that the process died. Everything TensorRT prints, the layer table
included, goes to standard output, which the parent keeps. TensorRT reports failure by None, -1, False, or not
at all, so every return value is looked at.

TensorRT orders some tables in a plan by address, so a plan depends on the history of the heap. The work is
therefore done in a thread, whose heap begins empty; paths are relative; TensorRT's own logger prints, because
messages of varying length that reach Python would be allocated in between; and the parent sets what threads do
with freed memory (`_trt_flavour.child_environment`).
"""

import ctypes
import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

from mbq_export.backends import _trt_versions
from mbq_export.backends._trt_job import PLAN, STAGE_MARK, TIMES, Job, Refused, Result
from mbq_export.backends._trt_plugins import count_plugins, load_plugins
from mbq_export.native import peak_memory

PR_SET_PDEATHSIG: Final = 1
STACK_BYTES: Final = 64 << 20
CRASHED: Final = 1


def probe(trt: Any, _job: Job) -> Result:
    """Make a builder, the smallest thing that needs the whole library."""
    if trt.Builder(logger_of(trt)) is None:
        raise Refused("trt-build", "TensorRT made no builder.")
    return Result(version=str(trt.__version__), devices=_trt_versions.devices(trt))


def parse(trt: Any, job: Job) -> Result:
    """Read the graph and compare its inputs and outputs with the contract."""
    return _parsed(trt, job)[0]


def build(trt: Any, job: Job) -> Result:
    """Read the graph, compile it and write the plan."""
    # The parser owns the weights' memory: it must live until the plan is there.
    result, builder, network, _alive = _parsed(trt, job)
    stage("build")
    started = time.monotonic()
    config = _configured(trt, job, builder, network)
    if job.timing_cache and (why := _trt_versions.read_timing_cache(config, Path(TIMES))):
        result = result.having(notes=(f"The timing cache is not used: {why}.",))
    plan = builder.build_serialized_network(network, config)
    if plan is None or not plan.nbytes:
        raise Refused("trt-build", "The builder returned no engine.")
    with Path(PLAN).open("wb") as file:
        file.write(memoryview(plan))
        file.flush()
        os.fsync(file.fileno())
    if job.timing_cache:
        _trt_versions.write_timing_cache(config, Path(TIMES))
    return result.having(plan_bytes=plan.nbytes, build_s=time.monotonic() - started)


OPS: Final[dict[str, Callable[[Any, Job], Result]]] = {
    "probe": probe,
    "parse": parse,
    "build": build,
}


def main(argv: list[str]) -> NoReturn:
    """Do one job and leave without the interpreter's shutdown, in which some TensorRT libraries crash."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a killed parent
    job = Job.read(Path(argv[1]))
    answers: list[Result] = []
    try:
        stage("load")
        trt = loaded(job)
    except Refused as refused:
        answers.append(_refusal(refused))
    else:
        threading.stack_size(STACK_BYTES)
        thread = threading.Thread(target=lambda: answers.append(_answer(trt, job)))
        thread.start()
        thread.join()
    for answer in answers:  # none if an unexpected exception ended the thread
        answer.having(peak_rss_bytes=peak_memory(os.getpid())).write(Path())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if answers else CRASHED)


def _answer(trt: Any, job: Job) -> Result:
    """Do the job."""
    try:
        return OPS[job.op](trt, job)
    except Refused as refused:
        return _refusal(refused)
    except MemoryError:
        return Result(kind="trt-memory", message="Python could not allocate memory.")


def _refusal(refused: Refused) -> Result:
    return Result(kind=refused.kind, message=refused.message, details=refused.details)


def stage(name: str) -> None:
    """Note what begins, for the case that it does not end."""
    os.write(sys.stdout.fileno(), f"{STAGE_MARK}{name}\n".encode())


def loaded(job: Job) -> Any:
    """Import TensorRT after making sure that its plain library name leads to the one that was found.

    Full TensorRT has no such link: its own package finds its library.

    Raises:
        Refused: ``trt-soname`` or ``trt-missing``.
    """
    try:
        if job.link:
            ctypes.CDLL(job.link)
    except OSError as error:
        raise Refused("trt-soname", f"{job.link} cannot be opened: {error}.") from error
    try:
        trt = importlib.import_module(job.module)
    except ImportError as error:
        raise Refused("trt-missing", f"{job.module} cannot be imported: {error}.") from error
    if not job.link:
        return trt
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    copies = sorted(path for path in mapped if Path(path).name.startswith(job.link))
    if copies != [job.library]:
        raise Refused("trt-soname", f"{job.link} is loaded from {copies}, expected {job.library}.")
    return trt


def logger_of(trt: Any) -> Any:
    return trt.Logger(trt.Logger.VERBOSE)


def _parsed(trt: Any, job: Job) -> tuple[Result, Any, Any, Any]:
    """Parse from the file, so that external data of any size is found.

    Raises:
        Refused: ``trt-parse``, ``onnx-empty``, ``trt-io``, ``plugin-load``, ``plugin-creator`` or ``plugin-count``.
    """
    logger = logger_of(trt)
    builder = trt.Builder(logger)
    if job.plugins:
        stage("plugins")
        load_plugins(builder.get_plugin_registry(), job)
    stage("parse")
    started = time.monotonic()
    network = builder.create_network(_trt_versions.network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.onnx):
        found = tuple(
            _trt_versions.parser_error(parser.get_error(i)) for i in range(parser.num_errors)
        )
        raise Refused("trt-parse", "The parser refused the graph.", found)
    if network.num_layers == 0:
        raise Refused(
            "onnx-empty", "The parser found no layer in the file and called that success."
        )
    _compare("inputs", job.inputs, [network.get_input(i).name for i in range(network.num_inputs)])
    _compare(
        "outputs", job.outputs, [network.get_output(i).name for i in range(network.num_outputs)]
    )
    result = Result(
        version=str(trt.__version__),
        network_layers=network.num_layers,
        plugin_layers=count_plugins(network, job.plugin_layers),
        parse_s=time.monotonic() - started,
    )
    return result, builder, network, (parser, logger)


def _compare(what: str, expected: tuple[str, ...], found: list[str]) -> None:
    """Refuse a network with other names than the contract."""
    if sorted(expected) != sorted(found):
        lost, new = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        raise Refused(
            "trt-io",
            f"The parsed network has other {what} than the graph.",
            (f"missing: {', '.join(lost) or 'none'}", f"unexpected: {', '.join(new) or 'none'}"),
        )


def _configured(trt: Any, job: Job, builder: Any, network: Any) -> Any:
    """The builder's configuration: one profile, named devices, verbose layer table.

    Raises:
        Refused: ``trt-profile``, ``trt-target`` or ``trt-option``.
    """
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = job.opt_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_mib << 20)
    _trt_versions.set_devices(trt, config, job.cc)
    _trt_versions.set_flags(trt, config, job.flags)
    profile = builder.create_optimization_profile()
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    for tensor in (each for each in tensors if -1 in tuple(each.shape)):
        try:
            profile.set_shape(tensor.name, *job.profile[tensor.name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            text = f"The profile of {tensor.name} is invalid."
            raise Refused("trt-profile", text, (str(error),)) from error
    if config.add_optimization_profile(profile) < 0:
        raise Refused("trt-profile", "TensorRT refused the profile.")
    return config


if __name__ == "__main__":
    main(sys.argv)
