"""Tasks of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), asked of a session.

    names, folder of task files ── find_tasks ──► Tasks ── ask_tasks ──► Outcome
                                                    │ requests ▲ answers
                                                    └► Answerer ► Session

lmms-eval reads the data, words the prompts and scores the answers; only answering is ours. It is an optional
package, imported when tasks are named. A task may hold Python of its own, which runs: name those you trust.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import math
import os
import sys
from dataclasses import dataclass
from importlib import metadata
from numbers import Real
from typing import TYPE_CHECKING, Any, Final, NoReturn

from mbq_export.errors import FormatError, MachineError, UsageError, located
from mbq_export.progress import Progress, silent
from mbq_export.report import Measurement
from mbq_export.runtime.sampling import Options

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image

    from mbq_export.runtime import Session

logger = logging.getLogger(__name__)

PLACEHOLDER: Final = "<image>"
"""How tasks say where a picture stands."""

NO_FILTER: Final = "none"
"""What lmms-eval calls the way from answer to score of a task that names no other."""

FOREIGN: Final = (AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError)
"""What a task file, its own Python or its data raise when they are wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Tasks that were found.

    Attributes:
        names: Tasks or groups of them.
        manager: lmms-eval's ``TaskManager`` that knows them.
    """

    names: tuple[str, ...]
    manager: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said to one question.

    Attributes:
        task: Name of the task.
        question: Its row in the task's data.
        said: The text.
        collapsed: What is wrong with it as text, or an empty string.
    """

    task: str
    question: int
    said: str
    collapsed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What tasks found.

    Attributes:
        measurements: ``task/<task>/<metric>``, with ``/<filter>`` behind it where the task has filters.
        answers: In the order they were asked.
        details: Version, questions asked, and every answer.
    """

    measurements: list[Measurement]
    answers: list[Answer]
    details: dict[str, Any]


def find_tasks(names: Sequence[str], folder: Path | None = None) -> Tasks:
    """Look up tasks, without reading their data.

    Args:
        names: Tasks or groups.
        folder: Searched for task files (YAML), itself and below; only its tasks are known then. lmms-eval
            lets its own task win over one of the same name elsewhere. None takes those of lmms-eval.

    Raises:
        UsageError: E2001 for a name that is unknown, E2003 for a folder that is none.
        MachineError: E3007 if lmms-eval, or what it needs, is not installed.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(
            "E2003",
            f"--include-path {folder} is no folder.",
            fix="name the folder of the task files",
        )
    module = _module("lmms_eval.tasks")
    with _quiet(), _explained(names):
        manager = module.TaskManager(
            include_path=folder and str(folder), include_defaults=folder is None
        )
    known = manager.all_tasks
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=5) or known[:5]
            raise UsageError(
                "E2001",
                f"Unknown task {name!r}.",
                why=f"{len(known)} are known, among them {', '.join(close)}"
                if known
                else f"{folder} has no task files",
                fix=("--tasks " + (close[0] if close else "NAME"), "--include-path DIR"),
            )
    return Tasks(names=tuple(names), manager=manager)


def ask_tasks(
    session: Session,
    tasks: Tasks,
    *,
    questions: int,
    new_tokens: int,
    progress: Progress = silent,
) -> Outcome:
    """Let lmms-eval ask and score.

    Args:
        session: Answers.
        tasks: Found by `find_tasks`.
        questions: Most questions per task; the first ones are taken.
        new_tokens: Longest answer where the task sets no ``max_new_tokens``.
        progress: Called after each answer.

    Raises:
        UsageError: E2019 if a task wants what a session does not do; E2009 for a prompt that is too long.
        FormatError: E4312 if lmms-eval or the task's own code fails; E42xx, E43xx for a picture.
        GateError: E1103 for logits that are not finite.
    """
    evaluator, api = _module("lmms_eval.evaluator"), _module("lmms_eval.api.model")
    api.lmms.register(Answerer)
    answerer = Answerer(session, new_tokens=new_tokens, progress=progress)
    with _quiet(), _explained(tasks.names):
        found = evaluator.simple_evaluate(
            model=answerer,
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=questions,
            log_samples=False,
            bootstrap_iters=1,  # Errors in closed form only: its bootstrap draws questions, not pictures.
            distributed_executor_backend="torchrun",  # The other one asks accelerate for devices.
            process_docs_parallel=1,
        )
    if not answerer.answers:
        raise FormatError(
            "E4312",
            f"There is no question in {', '.join(tasks.names)}.",
            why="the data of the task have no rows",
            fix="check test_split and the data of the task file",
        )
    return Outcome(
        measurements=_measurements(found),
        answers=answerer.answers,
        details={
            "lmms_eval": metadata.version("lmms-eval"),
            "tasks": {
                name: {"questions": counts["original"], "asked": counts["effective"]}
                for name, counts in sorted(found["n-samples"].items())
            },
            "answers": [
                {"task": one.task, "question": one.question, "said": one.said}
                for one in answerer.answers
            ],
        },
    )


class Answerer:
    """A session as lmms-eval wants its models: a virtual subclass of its ``lmms``.

    Attributes:
        task_dict: Data per task and split, set by lmms-eval.
        answers: All so far.
    """

    is_simple = True
    rank = 0
    world_size = 1

    def __init__(self, session: Session, *, new_tokens: int, progress: Progress = silent) -> None:
        self.task_dict: dict[str, Mapping[str, Sequence[Any]]] = {}
        self.answers: list[Answer] = []
        self._session = session
        self._new_tokens = new_tokens
        self._progress = progress

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer questions about pictures.

        Args:
            requests: ``args`` of each are prompt, settings of generation, a function from a row of data to
                its pictures, number of the row, task and split.

        Raises:
            UsageError: E2019 for settings or pictures that a session does not know.
        """
        said = []
        for index, request in enumerate(requests):
            prompt, settings, visual, number, task, split = request.args
            with located(f"task {task}"), located(f"question {number}"):
                pictures = _pictures(visual(self.task_dict[task][split][number]))
                found = self._session.generate(
                    _without_placeholders(prompt),
                    pictures,
                    options=_options(settings, self._new_tokens),
                )
            said.append(found.text)
            self.answers.append(
                Answer(task=task, question=number, said=found.text, collapsed=found.collapsed)
            )
            self._progress(index + 1, len(requests), f"{task} {number}")
        return said

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse to weigh given answers: E2019."""
        self._refuse(requests, "the likelihood of given answers")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse conversations: E2019."""
        self._refuse(requests, "conversations of several rounds")

    def generate_visual_cot(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse to draw pictures: E2019."""
        self._refuse(requests, "pictures as answers")

    def clean(self) -> None:
        """Keep the session: who opened it closes it."""

    @staticmethod
    def _refuse(requests: Sequence[Any], what: str) -> NoReturn:
        names = sorted({request.task_name for request in requests})
        raise _refused(f"Task {', '.join(names)} asks for {what}.")


def _refused(message: str) -> UsageError:
    return UsageError(
        "E2019",
        message,
        why="a session answers one text, with pictures before it, by one greedy or sampled text",
        fix="choose tasks with output_type: generate_until and pictures in front",
    )


def _pictures(visuals: Sequence[Any] | None) -> list[Image]:
    """Return the pictures of a question; videos come as paths, sound as numbers."""
    found = list(visuals or ())
    for visual in found:
        if not hasattr(visual, "convert"):
            raise _refused(f"A {type(visual).__name__} is no picture.")
    return found


def _without_placeholders(prompt: str) -> str:
    """Drop the placeholders that a prompt begins with: pictures stand there anyway."""
    text = prompt
    while text.lstrip().startswith(PLACEHOLDER):
        text = text.lstrip().removeprefix(PLACEHOLDER).lstrip()
    if PLACEHOLDER in text:
        raise _refused("A picture stands in the middle of the text.")
    return text


def _options(settings: Mapping[str, Any], new_tokens: int) -> Options:
    """Translate a task's settings of generation; like other models of lmms-eval, greedy unless it samples."""
    if (settings.get("num_beams") or 1) > 1:
        raise _refused(f"The task searches with {settings['num_beams']} beams.")
    until = settings.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    sampled = bool(settings.get("do_sample"))
    temperature = settings.get("temperature")
    return Options(
        max_new_tokens=int(settings.get("max_new_tokens") or new_tokens),
        temperature=float(1 if temperature is None else temperature) if sampled else 0.0,
        top_p=float(settings.get("top_p") or 1.0),
        stop=tuple(stop for stop in stops if stop),
    )


def _measurements(found: Mapping[str, Any]) -> list[Measurement]:
    """Return every number of lmms-eval's results; its keys are ``metric,filter``."""
    rows = []
    for task, results in found["results"].items():
        counts = found["n-samples"].get(task)
        if counts is not None:
            rows.append(Measurement(name=f"task/{task}/questions", value=counts["effective"]))
        for key, value in results.items():
            if "," not in key or not isinstance(value, Real):
                continue
            metric, _, way = key.partition(",")
            name = "/".join(["task", task, metric, *([] if way == NO_FILTER else [way])])
            rows.append(
                Measurement(name=name, value=float(value))
                if math.isfinite(value)
                else Measurement(name=name, value=None, why="lmms-eval found no finite number")
            )
    return rows


def _module(name: str) -> Any:
    """Import a module of lmms-eval, which then reads data of this machine only, unless told otherwise.

    Raises:
        MachineError: E3007.
    """
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or name).partition(".")[0]
        what = "lmms-eval" if missing == "lmms_eval" else f"{missing}, which lmms-eval needs,"
        raise MachineError(
            "E3007",
            f"{what} is not installed.",
            why=f"--tasks runs tasks of lmms-eval, and this is {sys.executable}",
            fix=('pip install "mbq-export[lmms]"', "--data FILE asks questions without it"),
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what lmms-eval prints away from stdout, and its log away unless details are wanted."""
    log = _module("loguru").logger
    if not logger.isEnabledFor(logging.DEBUG):
        log.disable("lmms_eval")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        log.enable("lmms_eval")


@contextlib.contextmanager
def _explained(names: Sequence[str]) -> Iterator[None]:
    """Turn what others' code raises into an error with a code; ours pass.

    Raises:
        FormatError: E4312.
    """
    retried = _module("tenacity").RetryError
    try:
        yield
    except (*FOREIGN, retried) as error:
        # lmms-eval tries to read data several times, and then only says that it gave up.
        cause = error.last_attempt.exception() if isinstance(error, retried) else error
        raise FormatError(
            "E4312",
            f"lmms-eval failed at {', '.join(names)}: {type(cause).__name__}: {cause}",
            why="the task file, its own code or its data are at fault, or the data are not on this machine",
            fix=("mend the task", "HF_DATASETS_OFFLINE=0 lets lmms-eval download data"),
        ) from error
