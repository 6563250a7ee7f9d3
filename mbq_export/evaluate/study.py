"""What a number format would cost: full precision and a checkpoint's model asked the same held-out questions.

    question, picture, right answer ──┬── full precision ──► logits ─┬──► right or wrong, each
                                      └── checkpoint (torch) ► logits ┘    KL per modality

Both are run by transformers, so formats that no kernel and no graph computes are judged like any other. A question is
right where the likeliest token is the wanted one at every place of the answer, which is what greedy generation would
say. One call per question: any family, whatever its pictures become.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from mbq_export.calibrate.data import encode, generated_samples
from mbq_export.calibrate.shapes import SCENES_PER_SEED, evaluation_questions
from mbq_export.errors import GateError
from mbq_export.evaluate.metrics import divergences, log_probabilities
from mbq_export.evaluate.quality import (
    ANSWER,
    MODALITIES,
    PROMPT,
    VISION,
    Distances,
    Paper,
    comparison,
    summary,
)
from mbq_export.evaluate.sides import answer_rows, prompt_of
from mbq_export.export.ops import LOGITS
from mbq_export.families import base
from mbq_export.progress import Progress, silent
from mbq_export.report import Measurement, Report

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mbq_export.calibrate.shapes import Example
    from mbq_export.evaluate.sides import Oracle
    from mbq_export.families.inputs import ModelInputs

KIND: Final = "study"
STUDY_SEED: Final = 13
"""A draw of its own, beside those of `samples`: nothing is chosen on what is reported."""
STUDY_QUESTIONS: Final = 300
"""Some 50 pictures: minutes on a CPU, and intervals of a few points of exact match. KL tells formats apart earlier."""
FULL: Final = "full precision"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mark:
    """What one model made of one question.

    Attributes:
        correct: Whether every token of the answer was the likeliest.
        nll: Mean negative log likelihood of the answer's tokens, in nats.
        nats: By modality, (P,) KL to full precision.
        same: By modality, (P,) whether both find the same token likeliest.
    """

    correct: bool
    nll: float
    nats: dict[str, NDArray[np.float64]]
    same: dict[str, NDArray[np.bool_]]


def study(
    full: Oracle,
    tested: Oracle,
    *,
    name: str,
    questions: int,
    progress: Progress = silent,
) -> Report:
    """Ask both models about generated pictures that no calibration or training has seen.

    ``Report.details`` holds a `quality.summary` of each model and their `quality.comparison`.

    Args:
        full: The full-precision model.
        tested: The checkpoint's.
        name: What the report calls the format.
        questions: How many.
        progress: Called after each question.

    Raises:
        GateError: E1103 if logits of a model are not finite.
    """
    # A scene yields six questions, or fewer where little is to be seen.
    images = min(questions, SCENES_PER_SEED)
    examples = evaluation_questions(images, seed=STUDY_SEED)[:questions]
    samples = encode(generated_samples(examples), full.model.processor)
    marks: dict[str, list[_Mark]] = {FULL: [], name: []}
    for index, (example, sample) in enumerate(zip(examples, samples, strict=True), 1):
        reference = _logits(full, sample, FULL)
        for model, found in ((FULL, reference), (name, _logits(tested, sample, name))):
            marks[model].append(_mark(sample, reference, found))
        progress(index, len(examples), example.id)
    papers = {model: _paper(examples, found) for model, found in marks.items()}
    summaries = {model: summary(paper) for model, paper in papers.items()}
    return Report(
        kind=KIND,
        measurements=tuple(_measurements(summaries[FULL], summaries[name])),
        context={"format": name, "questions": len(examples)},
        details={"models": summaries, "comparison": comparison(papers[FULL], papers[name])},
    )


def _logits(side: Oracle, sample: ModelInputs, name: str) -> NDArray[np.float32]:
    found = side.values(sample)[LOGITS]
    bad = int((~np.isfinite(found)).sum())
    if bad:
        raise GateError(
            "E1103",
            f"{bad} logits of {name} are not finite.",
            why="activations or weights overflow",
            fix="check the weights: mbq-export inspect MODEL",
        )
    return found


def _mark(sample: ModelInputs, reference: NDArray[np.float32], found: NDArray[np.float32]) -> _Mark:
    """Compare one model's logits (T, V) with those of full precision."""
    prompt = prompt_of(sample)
    wanted = sample.input_ids[len(prompt.input_ids) :]
    rows = answer_rows(found, prompt)
    likelihood = log_probabilities(rows)[np.arange(len(wanted)), wanted]
    places = _places(sample, prompt)
    return _Mark(
        correct=bool((rows.argmax(-1) == wanted).all()),
        nll=-float(likelihood.mean()),
        nats={key: divergences(reference[at], found[at]) for key, at in places.items()},
        same={key: reference[at].argmax(-1) == found[at].argmax(-1) for key, at in places.items()},
    )


def _places(sample: ModelInputs, prompt: ModelInputs) -> dict[str, NDArray[np.int64]]:
    """Positions of each modality: those that predict an answer token are the answer's, whatever stands there."""
    start = len(prompt.input_ids) - 1
    before = sample.token_classes[:start]
    return {
        ANSWER: np.arange(start, len(sample.input_ids) - 1),
        VISION: np.flatnonzero(before == base.VISION),
        PROMPT: np.flatnonzero(before == base.PROMPT),
    }


def _paper(examples: list[Example], marks: list[_Mark]) -> Paper:
    scenes = np.array([example.scene for example in examples])
    distances = {}
    for modality in MODALITIES:
        counts = [len(mark.nats[modality]) for mark in marks]
        distances[modality] = Distances(
            nats=np.concatenate([mark.nats[modality] for mark in marks]),
            same=np.concatenate([mark.same[modality] for mark in marks]),
            scenes=np.repeat(scenes, counts),
        )
    return Paper(
        correct=np.array([mark.correct for mark in marks]),
        nll=np.array([mark.nll for mark in marks]),
        scenes=scenes,
        kinds=np.array([example.kind for example in examples]),
        distances=distances,
    )


def _measurements(full: dict[str, object], tested: dict[str, object]) -> list[Measurement]:
    found = []
    for name, one in (("full_precision", full), ("quantized", tested)):
        accuracy = one["accuracy"]
        assert isinstance(accuracy, dict)  # of `summary`
        percent = 100 * accuracy["value"]
        found.append(Measurement(name=f"{name}/exact_match", value=percent, unit="percent"))
    kl = tested["kl"]
    assert isinstance(kl, dict)
    found += [
        Measurement(name=f"kl/{modality}", value=kl[modality]["mean"]["value"], unit="nats")
        for modality in MODALITIES
    ]
    return found
