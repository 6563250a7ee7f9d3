"""Generated picture questions: the data of tiny-llava-ov and of ``--data builtin:shapes``.

Every scene has a number and follows from it alone, so a set is a range of numbers:

    1,000,000 ..         training (stage n of the recipe starts at n million)
    20,000,000 ..        calibration
    30,000,000 ..        evaluation, with handwriting that no other range shows
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mbq_export.calibrate.shapes_drawing import OBJECT_WEIGHTS, Dice, Thing, draw_things, render
from mbq_export.calibrate.shapes_questions import CAPTION, QUESTION_KINDS, Question, ask, caption

TRAINING_SCENES: Final = 1_000_000
CALIBRATION_SCENES: Final = 20_000_000
EVALUATION_SCENES: Final = 30_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture with what it shows and what is asked about it.

    Attributes:
        number: Names the scene; same number and settings, same scene.
        image: (48, 48, 3) uint8.
        things: What the picture shows, in reading order.
        questions: Different questions; the caption, where there is one, comes first.
    """

    number: int
    image: NDArray[np.uint8]
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """How often what is drawn and asked.

    Attributes:
        objects: Relative frequency of scenes with 1, 2, ... 6 things.
        kinds: Relative frequency of each of `QUESTION_KINDS`.
        most_tokens: Upper bound on the tokens of all questions of a scene, so that packed rows
            have nearly equal length.
    """

    objects: tuple[float, ...] = OBJECT_WEIGHTS
    kinds: tuple[float, ...] = (1,) * len(QUESTION_KINDS)
    most_tokens: int = 1 << 30


EVEN: Final = Mix()


def question_tokens(question: Question) -> int:
    """Count a question's tokens: its words, its answer's, ``<q>``, ``<a>`` and ``<eos>``."""
    return len(question.text.split()) + len(question.answer.split()) + 3


def make_scenes(
    count: int,
    *,
    seed: int,
    held_out: bool = False,
    questions_per_image: int = 6,
    captions: float = 1.0,
    mix: Mix = EVEN,
) -> Iterator[Scene]:
    """Yield scenes number `seed` to `seed + count - 1`.

    Args:
        count: How many scenes.
        seed: Number of the first scene.
        held_out: Draw digits from the evaluation handwriting.
        questions_per_image: Questions wanted beside the caption; simple scenes yield fewer.
        captions: Probability that a scene has a caption.
        mix: How often what is drawn and asked.
    """
    for number in range(seed, seed + count):
        dice = Dice(number)
        things = draw_things(dice, mix.objects)
        image = render(dice, things, held_out=held_out)
        questions = [caption(things)] if dice.chance(captions) else []
        questions = _more_questions(dice, things, questions, questions_per_image, mix)
        yield Scene(number=number, image=image, things=things, questions=tuple(questions))


def _more_questions(
    dice: Dice, things: Sequence[Thing], first: list[Question], more: int, mix: Mix
) -> list[Question]:
    """Add `more` different questions, or fewer where the scene or the token bound allows fewer."""
    questions, wanted = list(first), len(first) + more
    asked: set[str] = set()
    tokens = sum(map(question_tokens, questions))
    while len(questions) < wanted:
        question = ask(dice, things, dice.weighted(QUESTION_KINDS, mix.kinds))
        if question is None or question.text in asked:
            if dice.chance(0.05):  # A one-thing scene may have nothing new left to ask.
                break
            continue
        tokens += question_tokens(question)
        if tokens > mix.most_tokens:
            break
        asked.add(question.text)
        questions.append(question)
    return questions
