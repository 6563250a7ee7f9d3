"""Latency of one or several bundles: real requests, one bundle after the other in turn.

    every bundle alone    open, first request: load time, memory
    for every workload    A B C   B C A   C A B   ...     warm-up turns are run and thrown away

What disturbs the machine for a while disturbs all bundles alike, so their ratios hold where single times do
not. Every request is whole: picture file and text in, a fixed number of tokens out, greedy, end tokens ignored.
"""

import bisect
import itertools
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from mbq_export.backends.ort import open_graph
from mbq_export.bundle import Bundle
from mbq_export.calibrate.data import generated_samples
from mbq_export.calibrate.shapes import evaluation_questions
from mbq_export.errors import UsageError, located
from mbq_export.evaluate.bench_report import bench_report
from mbq_export.evaluate.figures import Load, Run
from mbq_export.evaluate.telemetry import LoadMeter, MemoryMeter
from mbq_export.families.inputs import Processor
from mbq_export.families.locate import family_of, read_config
from mbq_export.native import CALL_SECONDS
from mbq_export.progress import Progress, silent
from mbq_export.report import Report
from mbq_export.runtime import EMBED, ORT, Session, Tuning, graph_record, open_session
from mbq_export.runtime.preprocess import open_pictures
from mbq_export.runtime.sampling import Options
from mbq_export.runtime.timing import NS_PER_MS, RequestStatistics

PROMPT: Final = "how many objects are there ?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One bundle, run in one way.

    Attributes:
        bundle: An opened bundle.
        name: What results call it; must differ from all others.
        backend: ``ort`` or ``torch``.
        lowering: Form of the decoder graph.
        threads: CPU threads; 0 takes all.
        accuracy_level: Of ONNX Runtime's 4-bit products; 4 is a variant of its own, not the exact path.
        engine_timeout_s: Limit of one call of an engine.
    """

    bundle: Bundle
    name: str
    backend: str = "ort"
    lowering: str = "qdq"
    threads: int = 0
    accuracy_level: int = 0
    engine_timeout_s: float = CALL_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is asked.

    Attributes:
        new_tokens: Tokens to generate, end tokens ignored.
        prompt_tokens: Text tokens of the prompt, chat template included, reached by repeating its words;
            None leaves it as it is. A tokenizer that splits words may fall short by part of a word.
        images: Pictures.
        prompt: The text.
        picture: Picture file; None draws one for each picture, as large as a tile.
    """

    new_tokens: int = 32
    prompt_tokens: int | None = None
    images: int = 1
    prompt: str = PROMPT
    picture: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How often.

    Attributes:
        repetitions: Requests that count, per bundle and workload.
        warmup: Requests before them that do not.
    """

    repetitions: int = 10
    warmup: int = 3

    def __post_init__(self) -> None:
        """Refuse what measures nothing.

        Raises:
            UsageError: E2017.
        """
        if self.repetitions < 1 or self.warmup < 0:
            raise UsageError(
                "E2017",
                f"{self.repetitions} repetitions after {self.warmup} warm-up requests measure nothing.",
                why="at least one repetition counts",
                fix="-r 10 --warmup 3",
            )


def matrix(
    *,
    prompt_tokens: Sequence[int | None] = (None,),
    new_tokens: Sequence[int] = (32,),
    images: Sequence[int] = (1,),
    picture: Path | None = None,
) -> tuple[Workload, ...]:
    """Return every combination of the lists."""
    return tuple(
        Workload(new_tokens=n, prompt_tokens=p, images=i, picture=picture)
        for i, p, n in itertools.product(images, prompt_tokens, new_tokens)
    )


def bench(
    contenders: Sequence[Contender],
    workloads: Sequence[Workload] = (Workload(),),
    *,
    protocol: Protocol | None = None,
    progress: Progress = silent,
) -> Report:
    """Time bundles against each other.

    Args:
        contenders: The first is the one that others are compared with.
        workloads: What is asked of each.
        protocol: How often.
        progress: Called after every request.

    Returns:
        A report of kind ``bench``; `bench_report` says what its details hold. ``valid`` is False if the
        machine was too noisy: `bench_report.noise_error` makes the error of that.

    Raises:
        UsageError: E2001 for bundles of one name or a graph that a bundle lacks, E2009 for a workload that
            does not fit, E2017 for a prompt that cannot be that short.
        MachineError: E30xx if a backend does not work here.
    """
    protocol = protocol or Protocol()
    _check_names(contenders)
    meter = LoadMeter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mbq-bench-")))
        libraries_ms = _warm_libraries(contenders[0])
        opened = [_open(contender, workloads[0], folder, stack) for contender in contenders]
        turns = protocol.warmup + protocol.repetitions
        total = len(contenders) * len(workloads) * turns
        done = itertools.count(1)
        runs = []
        for workload in workloads:
            lanes = [Lane(one.contender, one.session, workload, folder) for one in opened]
            for turn, place in itertools.product(range(turns), range(len(lanes))):
                lane = lanes[(turn + place) % len(lanes)]
                lane.run(keep=turn >= protocol.warmup)
                progress(next(done), total, lane.contender.name)
            runs += [lane.finished(one.load) for lane, one in zip(lanes, opened, strict=True)]
    details = {
        "protocol": {"repetitions": protocol.repetitions, "warmup": protocol.warmup},
        "libraries_ms": libraries_ms,
    }
    return bench_report(runs, details=details, load=meter.read())


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A contender with its session, and what opening took."""

    contender: Contender
    session: Session
    load: Load


class Lane:
    """One bundle at one workload."""

    def __init__(
        self, contender: Contender, session: Session, workload: Workload, folder: Path
    ) -> None:
        """Make prompt and pictures, untimed.

        Raises:
            UsageError: E2017 for a prompt that cannot be that short.
        """
        self.contender = contender
        self._session = session
        self._workload = workload
        side = session.model.engines.vision.inputs[0].shape[-1]
        self._pictures = _pictures(workload, folder, side=side if isinstance(side, int) else 384)
        self._text = _padded(session, workload, self._pictures)
        self._options = Options(max_new_tokens=workload.new_tokens, ignore_end=True)
        self._kept: list[RequestStatistics] = []

    def run(self, *, keep: bool) -> RequestStatistics:
        """Run one request; its picture files are read and decoded within its time."""
        with located(self.contender.name):
            start = time.perf_counter_ns()
            prepared = self._session.prepare(self._text, open_pictures(self._pictures))
            spent = (time.perf_counter_ns() - start) / NS_PER_MS
            prepared = replace(prepared, preprocess_ms=spent)
            done = self._session.generate(prepared, options=self._options).statistics
        if keep:
            self._kept.append(done)
        return done

    def finished(self, load: Load) -> Run:
        """Return what was measured."""
        return Run(
            name=self.contender.name,
            bundle=self.contender.bundle,
            backend=self.contender.backend,
            lowering=self.contender.lowering,
            accuracy_level=self.contender.accuracy_level,
            threads=self.contender.threads,
            limit=self._session.model.limit,
            images=self._workload.images,
            load=load,
            requests=tuple(self._kept),
        )


def _warm_libraries(contender: Contender) -> float:
    """Import what every session needs, so that no bundle pays for it; return the milliseconds it took."""
    start = time.perf_counter_ns()
    folder = contender.bundle.checkpoint_folder
    Processor.from_folder(folder, family_of(read_config(folder)))
    if contender.backend == ORT:
        record = graph_record(contender.bundle, EMBED)
        open_graph(contender.bundle.onnx / record["file"]).close()
    return (time.perf_counter_ns() - start) / NS_PER_MS


def _open(contender: Contender, workload: Workload, folder: Path, stack: ExitStack) -> Opened:
    """Open a session and run its first request, watching memory."""
    memory = MemoryMeter()
    start = time.perf_counter_ns()
    with located(contender.name):
        session = open_session(
            contender.bundle,
            backend=contender.backend,
            lowering=contender.lowering,
            threads=contender.threads,
            tuning=Tuning(
                accuracy_level=contender.accuracy_level, engine_timeout_s=contender.engine_timeout_s
            ),
        )
    spent = (time.perf_counter_ns() - start) / NS_PER_MS
    stack.enter_context(session)
    first = Lane(contender, session, workload, folder).run(keep=False)
    load = Load(load_ms=spent, memory=memory.read(), first=first)
    return Opened(contender=contender, session=session, load=load)


def _pictures(workload: Workload, folder: Path, *, side: int) -> list[Path]:
    """Picture files of a workload: the user's, or generated scenes as large as a tile."""
    if workload.picture is not None:
        return [workload.picture] * workload.images
    paths = [folder / f"{side}-{number}.png" for number in range(workload.images)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        samples = generated_samples(evaluation_questions(workload.images))
        scenes = list({id(s.images[0]): s.images[0] for s in samples}.values())
        for path, scene in zip(paths, scenes, strict=False):
            scene.resize((side, side)).save(path)  # type: ignore[union-attr]
    return paths


def _padded(session: Session, workload: Workload, pictures: list[Path]) -> str:
    """Repeat the words of the prompt until it has as many tokens as wanted, not one more."""
    wanted = workload.prompt_tokens
    if wanted is None:
        return workload.prompt
    words = list(itertools.islice(itertools.cycle(workload.prompt.split()), wanted))
    images = open_pictures(pictures)

    def tokens(count: int) -> int:
        return session.prepare(" ".join(words[:count]), images).prompt_tokens

    fitting = bisect.bisect_right(range(1, wanted + 1), wanted, key=tokens)
    if not fitting:
        raise UsageError(
            "E2017",
            f"-p {wanted} is too short.",
            why=f"one word and the chat template take {tokens(1)} tokens",
            fix=f"-p {tokens(1)} or more",
        )
    return " ".join(words[:fitting])


def _check_names(contenders: Sequence[Contender]) -> None:
    names = [contender.name for contender in contenders]
    if not names or len(set(names)) < len(names):
        raise UsageError(
            "E2001",
            f"Bundles to compare are called {', '.join(names) or 'nothing'}.",
            why="results go by name, so each needs its own",
            fix="rename the folders, or give each bundle once",
        )
