"""Task accuracy with honest intervals, and the questions of a local file.

Questions about one picture are not independent: when the picture is hard, all its questions fail together.
So every interval here resamples pictures (clusters), never questions, and two methods are compared on the
same questions, by their paired differences and by McNemar's test, never by two marginal intervals.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mbq_export.errors import FormatError, located
from mbq_export.families.pictures import read_picture
from mbq_export.progress import Progress, silent
from mbq_export.reading import contained, read_jsonl
from mbq_export.report import Measurement
from mbq_export.runtime.sampling import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray
    from PIL.Image import Image

    from mbq_export.runtime import Session

DRAWS: Final = 2000
LOW, HIGH = 2.5, 97.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number with its 95 % bootstrap interval.

    Attributes:
        value: The number on all data.
        low: 2.5 % point of the bootstrap distribution.
        high: 97.5 % point.
        n: Observations.
        clusters: Pictures resampled.
    """

    value: float
    low: float
    high: float
    n: int
    clusters: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap_ci(
    values: Sequence[float] | NDArray[Any],
    clusters: Sequence[int | str] | NDArray[Any],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean with a 95 % interval from resampling whole clusters.

    Args:
        values: One per observation: 1.0 for a right answer, or any number to average.
        clusters: Picture of each observation, any labels.
        draws: Bootstrap draws.
        seed: Of the draws; same seed, same interval.

    Raises:
        ValueError: If there is nothing to average.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.size == 0:
        raise ValueError("there are no observations")
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sums, counts = np.bincount(member, numbers), np.bincount(member)
    drawn = np.random.default_rng(seed).integers(0, len(sums), (draws, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, (LOW, HIGH))
    return Interval(
        value=float(numbers.mean()),
        low=float(low),
        high=float(high),
        n=int(numbers.size),
        clusters=len(sums),
    )


def paired_difference(
    first: Sequence[float] | NDArray[Any],
    second: Sequence[float] | NDArray[Any],
    clusters: Sequence[int | str] | NDArray[Any],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Mean of ``second - first`` on the same observations, with its interval.

    Raises:
        ValueError: If the two are not equally long.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} observations cannot be paired")
    return bootstrap_ci(b - a, clusters, draws=draws, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """Exact McNemar test of two methods on the same questions (Q. McNemar, Psychometrika 12, 1947).

    Attributes:
        only_first: Questions that only the first answers.
        only_second: Questions that only the second answers.
        p: Two-sided binomial probability of a split at least as uneven. It takes questions as independent,
            which those of one picture are not: read it beside the paired interval.
    """

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[bool] | NDArray[Any], second: Sequence[bool] | NDArray[Any]) -> McNemar:
    """Test whether two methods differ on the questions where they disagree."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    discordant, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(discordant, hits) for hits in range(fewer + 1))
    return McNemar(
        only_first=only_first,
        only_second=only_second,
        p=min(1.0, 2 * tail / 2**discordant),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a task.

    Attributes:
        name: Id in reports.
        cluster: Questions of one picture share it.
        image: Picture, or its file; None for a text-only question.
        prompt: What is asked.
        answers: Accepted answers; for ``choice`` the right one.
        score: Name of the rule in `RULES`.
        choices: All options of a ``choice`` question.
        kind: Group in reports.
    """

    name: str
    cluster: str
    image: Image | Path | None
    prompt: str
    answers: tuple[str, ...]
    score: str = "exact"
    choices: tuple[str, ...] = ()
    kind: str = "all"


def normalized(text: str) -> str:
    """Lower case, single blanks, no punctuation at the ends."""
    return re.sub(r"\s+", " ", text).strip(" \t\n.,;:!?\"'").lower()


def exact_match(said: str, wanted: Iterable[str]) -> bool:
    """Whether the whole answer is one of the wanted ones, up to case, blanks and final punctuation."""
    return normalized(said) in {normalized(answer) for answer in wanted}


def contains(said: str, wanted: Iterable[str]) -> bool:
    """Whether a wanted answer occurs in the said one as whole words."""
    return any(_words(answer) in _words(said) for answer in wanted)


def _words(text: str) -> str:
    """Words between blanks, one before the first and one behind the last."""
    return " ".join(["", *re.findall(r"\w+", text.lower()), ""])


def is_right(question: Question, said: str) -> bool:
    """Score one answer by the question's own rule."""
    return RULES[question.score](question, said)


def _chosen(question: Question, said: str) -> bool:
    """Right if the answer names the wanted option, by its letter or its words, and no other option."""
    letters = {chr(ord("a") + index): choice for index, choice in enumerate(question.choices)}
    letter = normalized(said).strip("()")
    if letter in letters:
        return exact_match(letters[letter], question.answers)
    named = [choice for choice in question.choices if contains(said, [choice])]
    # "red star" names "star" too: an option inside another named one does not count as a second.
    longest = [one for one in named if not any(one != b and contains(b, [one]) for b in named)]
    return len(longest) == 1 and exact_match(longest[0], question.answers)


RULES: Final[dict[str, Callable[[Question, str], bool]]] = {
    "exact": lambda question, said: exact_match(said, question.answers),
    "contains": lambda question, said: contains(said, question.answers),
    "choice": _chosen,
}


def read_tasks(path: Path) -> tuple[Question, ...]:
    """Read a task file: JSON Lines, one question per line.

    ``{"id": "1", "image": "a.png", "prompt": "...", "answer": "red" | ["red", "crimson"],
    "score": "exact" | "contains" | "choice", "choices": ["red", "blue"], "kind": "colour"}``; image, score,
    choices and kind may be missing. Picture paths are relative to the file and stay inside its folder.

    Raises:
        FormatError: E4301 if there is no question, E4302 for a line that is no JSON object, E4303 for a missing
            or wrong field, E4305 for a picture outside the folder.
    """
    rows = read_jsonl(path, code="E4302")
    questions = tuple(_question(path.parent, number, row) for number, row in rows)
    if not questions:
        raise FormatError(
            "E4301",
            f"{path} holds no question.",
            why="a task file has one JSON object per line",
            fix='{"id": "1", "image": "a.png", "prompt": "what colour ?", "answer": "red"}',
        )
    return questions


def _question(folder: Path, number: int, row: dict[str, Any]) -> Question:
    answer = row.get("answer")
    answers = [answer] if isinstance(answer, str) else answer
    choices = row.get("choices", [])
    score = row.get("score", "choice" if choices else "exact")
    faults = {
        "prompt": not isinstance(row.get("prompt"), str),
        "answer": not _texts(answers),
        "choices": not isinstance(choices, list) or (bool(choices) and not _texts(choices)),
        "score": score not in RULES or (score == "choice" and not choices),
        "image": not isinstance(row.get("image"), str | None),
    }
    wrong = [field for field, is_wrong in faults.items() if is_wrong]
    if wrong or not isinstance(answers, list):
        raise FormatError(
            "E4303",
            f"Line {number}: {', '.join(wrong)} missing or of a wrong kind.",
            why=f"a question has prompt and answer; score is one of {', '.join(RULES)}; choice needs choices",
            fix="mend the line",
        )
    image = row.get("image")
    name = str(row.get("id", number))
    return Question(
        name=name,
        cluster=image or name,
        image=None if image is None else contained(folder, image, code="E4305"),
        prompt=row["prompt"],
        answers=tuple(answers),
        score=score,
        choices=tuple(choices),
        kind=str(row.get("kind", "all")),
    )


def _texts(values: object) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(v, str) for v in values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One question and what became of it.

    Attributes:
        right: Whether it was answered rightly.
        collapsed: What is wrong with the answer as text, or an empty string.
    """

    right: bool
    collapsed: str


def ask(
    session: Session,
    questions: Sequence[Question],
    *,
    new_tokens: int,
    progress: Progress = silent,
) -> list[Answered]:
    """Ask a session every question, greedily.

    Raises:
        FormatError: E4304 or E4306 for a picture, with the question's name.
    """
    answers = []
    for index, question in enumerate(questions):
        with located(f"question {question.name}"):
            image = (
                read_picture(question.image) if isinstance(question.image, Path) else question.image
            )
            found = session.generate(
                question.prompt,
                [] if image is None else [image],
                options=Options(max_new_tokens=new_tokens),
            )
        answers.append(Answered(right=is_right(question, found.text), collapsed=found.collapsed))
        progress(index + 1, len(questions), f"question {question.name}")
    return answers


def task_measurements(
    questions: Sequence[Question], answers: Sequence[Answered]
) -> list[Measurement]:
    """Accuracy with its interval, and by kind."""
    right = np.array([answer.right for answer in answers])
    kinds = np.array([question.kind for question in questions])
    share = bootstrap_ci(right, [question.cluster for question in questions])
    found = {
        "task/accuracy": share.value,
        "task/accuracy_low": share.low,
        "task/accuracy_high": share.high,
        "task/questions": share.n,
        "task/pictures": share.clusters,
    }
    for kind in dict.fromkeys(kinds.tolist()):
        found[f"task/accuracy/{kind}"] = float(right[kinds == kind].mean())
    return [Measurement(name=name, value=value) for name, value in found.items()]
