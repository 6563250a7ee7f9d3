"""Generated picture questions: the data of tiny-llava-ov and of ``--data builtin:shapes``.

Every scene has a number and follows from it alone, so a set is a range of numbers:

    1,000,000 ..     training: stage n of the recipe starts at n million
    20,000,000 ..    calibration
    30,000,000 ..    evaluation, with handwriting that no training or calibration scene shows
    31,000,000 ..    watched during training (handwriting as in evaluation)
"""

import enum
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mbq_export.calibrate.shapes_drawing import OBJECT_WEIGHTS, Dice, Thing, draw_things, render
from mbq_export.calibrate.shapes_questions import CAPTION, QUESTION_KINDS, Question, ask, caption
from mbq_export.errors import UsageError
from mbq_export.writing import explained, write_file

__all__ = [
    "CALIBRATION_SCENES",
    "CALIBRATION_SEEDS",
    "EVALUATION_SCENES",
    "EVALUATION_SEEDS",
    "EVEN",
    "MONITOR_SCENES",
    "SCENES_PER_SEED",
    "TRAINING_SCENES",
    "UNTOUCHED_SEED",
    "CalibrationMix",
    "Example",
    "Mix",
    "Question",
    "Scene",
    "blind_majority",
    "calibration_samples",
    "evaluation_questions",
    "evaluation_scenes",
    "make_scenes",
    "question_tokens",
    "write_manifest",
]

TRAINING_SCENES: Final = 1_000_000
CALIBRATION_SCENES: Final = 20_000_000
EVALUATION_SCENES: Final = 30_000_000
MONITOR_SCENES: Final = 31_000_000

SCENES_PER_SEED: Final = 10_000
CALIBRATION_SEEDS: Final = 900
EVALUATION_SEEDS: Final = 90
UNTOUCHED_SEED: Final = 77
"""Evaluation seed that nobody looks at before the last table."""


class CalibrationMix(enum.Enum):
    """What calibration samples ask for."""

    MIXED = "mixed"
    """Captions and short questions in turn, like the use of the model. The default."""

    CAPTIONS = "captions"
    """Captions only, as in the MBQ paper."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One picture, one question, one answer.

    Attributes:
        id: ``shapes-<scene>-<place of the question in its scene>``.
        scene: Number of the scene; questions of one scene share it (clusters for intervals).
        image: (48, 48, 3) uint8.
        prompt: The question.
        answer: The only right answer.
        kind: One of `QUESTION_KINDS`, or "caption".
    """

    id: str
    scene: int
    image: NDArray[np.uint8]
    prompt: str
    answer: str
    kind: str


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


def calibration_samples(
    count: int = 128, *, seed: int = 0, mix: CalibrationMix = CalibrationMix.MIXED
) -> list[Example]:
    """Return calibration samples, each about a scene of its own.

    Args:
        count: How many.
        seed: Which draw; `CALIBRATION_SEEDS` different ones exist.
        mix: Captions alone, or captions (even samples) and each kind of question in turn (odd).

    Raises:
        UsageError: E2003 if count is not in [1, `SCENES_PER_SEED`].
    """
    _check_count(count)
    first = CALIBRATION_SCENES + seed % CALIBRATION_SEEDS * SCENES_PER_SEED
    asks = 0 if mix is CalibrationMix.CAPTIONS else 3 * len(QUESTION_KINDS)
    return [
        _chosen(scene, index, mix)
        for index, scene in enumerate(make_scenes(count, seed=first, questions_per_image=asks))
    ]


def _chosen(scene: Scene, index: int, mix: CalibrationMix) -> Example:
    """Pick the caption, or the question whose turn it is, or the next kind the scene allows."""
    if mix is CalibrationMix.CAPTIONS or index % 2 == 0:
        return _example(scene, 0)
    turn = index // 2 % len(QUESTION_KINDS)
    for kind in QUESTION_KINDS[turn:] + QUESTION_KINDS[:turn]:
        for place, question in enumerate(scene.questions):
            if question.kind == kind:
                return _example(scene, place)
    return _example(scene, 0)


def evaluation_scenes(images: int = 900, *, seed: int = 0) -> Iterator[Scene]:
    """Yield evaluation scenes with questions and a caption each, unseen handwriting included.

    Args:
        images: How many scenes; 900 hold more than 5,000 questions.
        seed: Which draw; `EVALUATION_SEEDS` different ones exist. See `UNTOUCHED_SEED`.

    Raises:
        UsageError: E2003 if images is not in [1, `SCENES_PER_SEED`].
    """
    _check_count(images)
    first = EVALUATION_SCENES + seed % EVALUATION_SEEDS * SCENES_PER_SEED
    return make_scenes(images, seed=first, held_out=True)


def evaluation_questions(images: int = 900, *, seed: int = 0) -> list[Example]:
    """Return the questions of `evaluation_scenes`, captions left out.

    Raises:
        UsageError: E2003 if images is not in [1, `SCENES_PER_SEED`].
    """
    return [
        _example(scene, place)
        for scene in evaluation_scenes(images, seed=seed)
        for place, question in enumerate(scene.questions)
        if question.kind != CAPTION
    ]


def blind_majority(examples: Iterable[Example], *, training: Iterable[Scene]) -> float:
    """Return the accuracy of answering without looking: what a real score is to be held against.

    Args:
        examples: What is asked.
        training: Scenes to learn from. Each exact question gets its most frequent answer there;
            a question never seen gets the most frequent answer of its kind.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for scene in training:
        for question in scene.questions:
            by_text[question.text][question.answer] += 1
            by_kind[question.kind][question.answer] += 1

    def guess(example: Example) -> str:
        seen = by_text.get(example.prompt) or by_kind[example.kind]
        return max(sorted(seen), key=seen.__getitem__) if seen else ""

    marks = [guess(example) == example.answer for example in examples]
    return sum(marks) / len(marks)


def write_manifest(folder: Path, examples: Sequence[Example]) -> Path:
    """Write PNG pictures and the JSON Lines manifest that ``--data`` reads.

    Args:
        folder: Made if missing.
        examples: What to write; questions of one scene share one picture.

    Returns:
        The manifest, ``folder/manifest.jsonl``.

    Raises:
        ResourceError: E5001 or E5008 if the folder cannot be written.
    """
    pictures = folder / "images"
    with explained(folder):
        pictures.mkdir(parents=True, exist_ok=True)
    written: set[int] = set()
    lines = []
    for example in examples:
        name = f"images/{example.scene}.png"
        if example.scene not in written:
            encoded = BytesIO()
            Image.fromarray(example.image).save(encoded, "png")
            write_file(folder / name, encoded.getvalue())
            written.add(example.scene)
        entry = {
            "id": example.id,
            "images": [name],
            "prompt": example.prompt,
            "answer": example.answer,
        }
        lines.append(json.dumps(entry) + "\n")
    manifest = folder / "manifest.jsonl"
    write_file(manifest, "".join(lines).encode())
    return manifest


def _example(scene: Scene, place: int) -> Example:
    question = scene.questions[place]
    return Example(
        id=f"shapes-{scene.number}-{place}",
        scene=scene.number,
        image=scene.image,
        prompt=question.text,
        answer=question.answer,
        kind=question.kind,
    )


def _check_count(count: int) -> None:
    if not 1 <= count <= SCENES_PER_SEED:
        raise UsageError(
            "E2003",
            f"Cannot generate {count} samples.",
            why=f"one seed holds 1 to {SCENES_PER_SEED} generated scenes",
            fix="choose --samples in that range",
        )
