"""Every way in which a TensorRT child can end, and what each one is called.

result.json says yes         the result
result.json says no          E2002 E2008 E2012 E3003 E3005 E3013 E4404 E5004 E6001 E6002 E6004 E6005 E7003, by its kind
the time limit ended it      E5006
SIGKILL by somebody else     E5004, the out-of-memory killer
SIGABRT with the soname text E3013
any other signal             E6003
it left without a result     E9001, our bug
"""

import contextlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from mbq_export.backends._trt_flavour import FLAVOURS
from mbq_export.backends._trt_job import JOB, LOG, STAGE_MARK, Job, Result
from mbq_export.errors import (
    BuildError,
    FormatError,
    IncompatibleError,
    InternalError,
    MachineError,
    MbqError,
    ResourceError,
    UsageError,
)
from mbq_export.native import ChildResult

ABORT_OF_SONAME: Final = "terminate called without an active exception"
"""Last words of the RTX parser when the plain library name is missing."""

MEMORY_WORDS: Final = (
    "OutOfMemory",
    "bad_alloc",
    "out of memory",
    "Cannot allocate memory",
    "Resource temporarily unavailable",
    "MemoryError",
    "can't start new thread",
)
"""How the builder and Python say that an allocation, or a thread's stack, was refused."""

NO_DRIVER: Final = "cudaError 35"
"""TensorRT for RTX asks for a driver in passing and logs its absence as an error; building needs none."""

PLUGIN_ERROR: Final = "MBQPLG error "
"""Begins what a plugin of ours says when it refuses; TensorRT itself tells only that it did."""

STACK: Final = (
    'File "', "Thread 0x", "Current thread ", "Extension modules:", "Fatal Python error:", "<no Python frame>",
)  # fmt: skip
"""Begin lines of Python's stack, printed behind a crash: they tell where our loop stood, not what happened."""

KEPT: Final = (JOB, LOG)
QUOTED: Final = 5

_MESSAGE = re.compile(r"^(\[[\d/:-]+\] )?\[TRT\] \[(?P<severity>[EWIV])\] (?P<text>.*)$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """What a child's log tells.

    Attributes:
        stage: The last stage it began: ``start``, ``load``, ``parse``, ``build``.
        errors: TensorRT's errors, first first.
        warnings: TensorRT's warnings.
        last: The last thing TensorRT said.
        plugins: What our plugins complained of.
    """

    stage: str
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    last: str
    plugins: tuple[str, ...] = ()

    @classmethod
    def read(cls, log: Path) -> Self:
        """Read a log; one that does not exist tells nothing."""
        stage, last, said = "start", "", {"E": [""], "W": [""]}
        plugins: list[str] = []
        with contextlib.suppress(FileNotFoundError), log.open(errors="replace") as lines:
            for line in lines:
                if line.startswith(STAGE_MARK):
                    stage = line.removeprefix(STAGE_MARK).strip()
                elif line.startswith(PLUGIN_ERROR):
                    plugins.append(line.removeprefix(PLUGIN_ERROR).strip())
                elif match := _MESSAGE.match(line):
                    last = match["text"].strip()
                    if NO_DRIVER not in last:
                        said.get(match["severity"], []).append(last)
        errors, warnings = (tuple(filter(None, said[each])) for each in "EW")
        return cls(stage=stage, errors=errors, warnings=warnings, last=last, plugins=tuple(plugins))


@dataclass(frozen=True, kw_only=True, slots=True)
class Meaning:
    """What a refusal is to the user."""

    error: type[MbqError]
    code: str
    why: str
    fix: tuple[str, ...]


_WITHOUT = "--backend ort runs the same bundle"
_REPORT = "look at the log, and report it with the ONNX file's name and the library's version"

MEANINGS: Final = {
    "trt-missing": Meaning(
        error=MachineError,
        code="E3003",
        why="the package is installed but broken",
        fix=("INSTALL", "leave --target out: the bundle runs on ONNX Runtime without an engine"),
    ),
    "trt-soname": Meaning(
        error=MachineError,
        code="E3013",
        why="the parser opens the library by its plain name and would abort",
        fix=("INSTALL", "remove other copies of the library from LD_LIBRARY_PATH and LD_PRELOAD"),
    ),
    "trt-parse": Meaning(
        error=BuildError,
        code="E6001",
        why="TensorRT's parser does not read this graph",
        fix=(_REPORT,),
    ),
    "onnx-empty": Meaning(
        error=FormatError,
        code="E4404",
        why="an empty file or a web page parses that way",
        fix=("export the graph again", "mbq-export inspect FILE"),
    ),
    "trt-io": Meaning(
        error=BuildError,
        code="E6005",
        why="the parser drops what it thinks is unused without a word",
        fix=(_REPORT,),
    ),
    "trt-profile": Meaning(
        error=UsageError,
        code="E2008",
        why="every varying input needs smallest <= typical <= largest",
        fix=("--max-context N", _REPORT),
    ),
    "trt-target": Meaning(
        error=UsageError,
        code="E2012",
        why="this version of the library has no code for that device",
        fix=("build on the device with --target NAME:trt",),
    ),
    "trt-option": Meaning(
        error=UsageError,
        code="E2002",
        why="options of the builder differ between versions",
        fix=("leave the option out", "delete the timing cache"),
    ),
    "gpu-missing": Meaning(
        error=MachineError,
        code="E3001",
        why="an engine holds code for one kind of GPU",
        fix=(_WITHOUT,),
    ),
    "gpu-memory": Meaning(
        error=ResourceError,
        code="E5005",
        why="engine, cache and workspace share the memory of the GPU",
        fix=(
            "close other programs on the GPU",
            "build again with a smaller --max-context",
            _WITHOUT,
        ),
    ),
    "gpu-error": Meaning(
        error=BuildError,
        code="E6009",
        why="the process that held the engine was ended, so nothing wrong came back",
        fix=("run the command again", _WITHOUT),
    ),
    "trt-run": Meaning(
        error=BuildError,
        code="E6009",
        why="the engine did not run",
        fix=(_REPORT, _WITHOUT),
    ),
    "trt-load": Meaning(
        error=BuildError,
        code="E6008",
        why="version, device, hashes and plugins were compared before",
        fix=("build the engine again", _WITHOUT),
    ),
    "plugin-load": Meaning(
        error=MachineError,
        code="E3005",
        why="the file is damaged, for another processor, or needs what is not there",
        fix=("mbq-export plugins build", "--plugin-lib FILE", "--lowering qdq needs no plugins"),
    ),
    "plugin-creator": Meaning(
        error=IncompatibleError,
        code="E7003",
        why="the library is of another release",
        fix=("mbq-export plugins build", "--lowering qdq needs no plugins"),
    ),
    "plugin-count": Meaning(
        error=BuildError,
        code="E6004",
        why="the parser takes a function's body, or another plugin, where names or namespaces differ: right, and slow",
        fix=("export the graph again", _REPORT),
    ),
    "trt-memory": Meaning(
        error=ResourceError,
        code="E5004",
        why="the builder ran out of memory",
        fix=("close other programs", "build on a larger machine"),
    ),
    "trt-build": Meaning(
        error=BuildError,
        code="E6002",
        why="TensorRT reads the graph and has no implementation for a part of it",
        fix=(_REPORT,),
    ),
}


def checked(job: Job, child: ChildResult, *, timeout_s: float, logs: Path | None = None) -> Result:
    """Return the result of a child, or raise what its end means.

    Args:
        job: What it was asked.
        child: How it ended.
        timeout_s: The limit it had.
        logs: Where to keep its logs if it failed; its folder is about to vanish.

    Raises:
        MbqError: See the table above.
    """
    result = Result.read(job.workdir)
    if result is not None and not result.kind:
        return result
    story, kept = Story.read(child.log), keep_logs(job.workdir, logs)
    if result is not None:
        raise refusal(job, result, story, kept)
    if child.timed_out:
        raise _timeout(job, story, timeout_s, kept)
    if child.signal is None and not _is_memory(child.tail()):
        raise InternalError(
            "E9001",
            f"The TensorRT child left with status {child.status} and without a result.",
            why=_last_words(child),
            fix=f"report it with {kept}" if kept else "report it",
        )
    raise _death(job, child, story, kept)


def refusal(job: Job, result: Result, story: Story, kept: str) -> MbqError:
    """TensorRT, or our check of what it returned, said no."""
    memory = result.kind == "trt-build" and _is_memory(story.errors)
    kind = "trt-memory" if memory else result.kind
    meaning = MEANINGS[kind]
    details = (*story.plugins, *(result.details or story.errors))
    quoted = "; ".join(_one_line(each) for each in details[:QUOTED])
    install = FLAVOURS[job.flavour].install
    return meaning.error(
        meaning.code,
        f"{result.message}{' ' + quoted if quoted else ''}",
        why=meaning.why,
        fix=tuple(install if fix == "INSTALL" else fix for fix in meaning.fix),
        context={"kind": kind, "details": list(details), "logs": kept},
    )


def _timeout(job: Job, story: Story, timeout_s: float, kept: str) -> ResourceError:
    what = "call of an engine" if job.op == "session" else "engine"
    return ResourceError(
        "E5006",
        f"TensorRT was still in {story.stage} after {timeout_s:g} s and was ended.",
        why=f"the limit for one {what} is {timeout_s:g} s",
        fix=(f"--engine-timeout {4 * timeout_s:g}", _see(kept)),
        context={"logs": kept},
    )


def _death(job: Job, child: ChildResult, story: Story, kept: str) -> MbqError:
    """A signal that we did not send ended the child, or it left because an allocation failed."""
    words = "\n".join(child.tail())
    context: dict[str, Any] = {"signal": child.signal, "stage": story.stage, "logs": kept}
    if child.signal == "SIGKILL" or _is_memory(child.tail()):
        peak = child.peak_rss_bytes / 2**30
        killed = child.signal == "SIGKILL"
        return ResourceError(
            "E5004",
            f"TensorRT {'was killed' if killed else 'ran out of memory'} in {story.stage}, "
            f"having used {peak:.1f} GiB.",
            why="the kernel kills what takes too much memory, and says so only in its own log"
            if killed
            else _last_words(child),
            fix=("close other programs", "build on a larger machine"),
            context=context,
        )
    if child.signal == "SIGABRT" and ABORT_OF_SONAME in words:
        return MachineError(
            "E3013",
            f"The parser aborted in {story.stage}: {ABORT_OF_SONAME}.",
            why="it opens its library by a plain name that this installation does not provide",
            fix=(FLAVOURS[job.flavour].install, _see(kept)),
            context=context,
        )
    return BuildError(
        "E6003",
        f"TensorRT died of {child.signal} in {story.stage}. Last message: {_one_line(story.last) or 'none'}",
        why=_last_words(child),
        fix=(_see(kept), "finished stages are kept: run the same command again to retry"),
        context=context,
    )


def _is_memory(lines: Sequence[str]) -> bool:
    """Whether one of the lines complains of memory."""
    return any(word in line for line in lines for word in MEMORY_WORDS)


def keep_logs(workdir: Path, logs: Path | None) -> str:
    """Copy the logs out of the folder that vanishes; return where they are, or nothing."""
    if logs is None:
        return ""
    logs.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        if (workdir / name).is_file():
            shutil.copyfile(workdir / name, logs / name)
    return str(logs)


def _last_words(child: ChildResult) -> str:
    said = [line.strip() for line in child.tail(60) if line.strip()]
    lines = [
        line for line in said if not line.startswith(STACK) and not _MESSAGE.match(line)
    ] or said
    return _one_line(" | ".join(lines[-QUOTED:])) if lines else "it said nothing"


def _one_line(text: str, limit: int = 400) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[:limit] + ".."


def _see(kept: str) -> str:
    return f"see the logs in {kept}" if kept else "run again with -v"
