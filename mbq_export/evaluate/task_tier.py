"""The tier that asks questions: generated ones, those of a file, or the tasks of lmms-eval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mbq_export.evaluate.lmms import Tasks, ask_tasks
from mbq_export.evaluate.samples import generated_questions
from mbq_export.evaluate.tasks import ask, read_tasks, task_measurements
from mbq_export.evaluate.tokens import collapse_check

if TYPE_CHECKING:
    from mbq_export.evaluate.sides import Setup
    from mbq_export.evaluate.validate import Validation
    from mbq_export.progress import Progress
    from mbq_export.report import Check, Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What the tier adds to a report.

    Attributes:
        checks: That answers are text at all.
        measurements: Named ``task/...``.
        details: ``task``, or ``lmms_eval``: what became of each question.
    """

    checks: list[Check]
    measurements: list[Measurement]
    details: dict[str, Any]


def run_tasks(
    setup: Setup, validation: Validation, named: Tasks | None, *, progress: Progress
) -> TaskResult:
    """Open a session and ask it.

    Args:
        setup: What is asked.
        validation: What it is asked where no tasks are named, how many questions and how long answers may be.
        named: Tasks of lmms-eval to ask instead.
        progress: Called after each question.

    Raises:
        UsageError: E2019, E2009 for tasks that a session cannot answer.
        FormatError: E43xx for questions, pictures and tasks.
    """
    if named is not None:
        with setup.open() as session:
            found = ask_tasks(
                session,
                named,
                questions=validation.questions,
                new_tokens=validation.new_tokens,
                progress=progress,
            )
        return TaskResult(
            checks=[collapse_check([answer.collapsed for answer in found.answers], tier="task")],
            measurements=found.measurements,
            details={"lmms_eval": found.details},
        )
    questions = (
        generated_questions(validation.questions)
        if validation.data is None
        else read_tasks(validation.data)[: validation.questions]
    )
    with setup.open() as session:
        answers = ask(session, questions, new_tokens=validation.new_tokens, progress=progress)
    rows = [
        {"id": question.name, "kind": question.kind, "right": answer.right}
        for question, answer in zip(questions, answers, strict=True)
    ]
    return TaskResult(
        checks=[collapse_check([answer.collapsed for answer in answers], tier="task")],
        measurements=task_measurements(questions, answers),
        details={"task": rows},
    )
