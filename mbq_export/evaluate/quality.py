"""How far a quantized model is from the full-precision one, on thousands of packed questions.

    scenes ── vision tower (once) ──► states ──┬── full precision ──► logits, kept
                                               └── quantized ───────► logits ──► answers, KL per modality

One pass gives the logits of text and picture: vision tokens see each other only.

Trust KL more than accuracy: it separates methods where accuracy is saturated. A position belongs
to the modality of the token it stands on, except that those which predict an answer token are the answer's.
Captions are shown to the models but not counted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from mbq_export.calibrate.shapes_questions import CAPTION
from mbq_export.evaluate.metrics import divergences
from mbq_export.evaluate.packed import (
    IGNORED,
    PADDING,
    Encode,
    Outcome,
    Rows,
    all_logits,
    outcomes_of,
    pack,
    pixels_from_images,
    vision_states,
)
from mbq_export.evaluate.tasks import Interval, bootstrap_ci, mcnemar, paired_difference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from mbq_export.calibrate.shapes import Scene

VISION: Final = "vision"
PROMPT: Final = "prompt"
ANSWER: Final = "answer"
MODALITIES: Final = (ANSWER, VISION, PROMPT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distances:
    """KL to full precision at every position of one modality.

    Attributes:
        nats: (P,) KL(full precision || tested).
        same: (P,) whether both find the same token likeliest.
        scenes: (P,) number of the scene, the cluster of intervals.
    """

    nats: NDArray[np.float64]
    same: NDArray[np.bool_]
    scenes: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """What one model made of an exam, captions left out.

    Attributes:
        correct: (n,) whether each question was answered exactly.
        nll: (n,) mean negative log likelihood of each right answer's tokens, in nats.
        scenes: (n,) scene of each question.
        kinds: (n,) kind of each question.
        distances: By modality.
    """

    correct: NDArray[np.bool_]
    nll: NDArray[np.float64]
    scenes: NDArray[np.int64]
    kinds: NDArray[np.str_]
    distances: Mapping[str, Distances]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sheet:
    """A batch of scenes with what full precision says at their positions.

    Attributes:
        scenes: Of about the same number of tokens, so that little is padded.
        places: (B,) of each scene in the exam.
        states: (B, 36, width) of the vision tower.
        text: (B, T, vocabulary) logits.
        picture: (B, V, vocabulary) logits.
    """

    scenes: tuple[Scene, ...]
    places: NDArray[np.int64]
    states: Tensor
    text: Tensor
    picture: Tensor


class Exam:
    """Questions with the full-precision model's logits, for models that share its vision tower."""

    def __init__(
        self, model: Any, scenes: Sequence[Scene], encode: Encode, *, batch: int = 50
    ) -> None:
        """Run the full-precision model.

        Args:
            model: A float32 LlavaOnevisionForConditionalGeneration of the sample's layout.
            scenes: Pictures with questions.
            encode: Text -> token ids.
            batch: Pictures at a time.
        """
        self._encode = encode
        tokens = [pack([s.questions], encode, vision_tokens=0).tokens.shape[1] for s in scenes]
        by_length = np.argsort(tokens, kind="stable")
        self._sheets = [
            self._sheet(model, scenes, by_length[start : start + batch])
            for start in range(0, len(scenes), batch)
        ]

    @torch.no_grad()
    def _sheet(self, model: Any, exam: Sequence[Scene], places: NDArray[np.int64]) -> _Sheet:
        scenes = tuple(exam[place] for place in places)
        states = vision_states(model, pixels_from_images(np.stack([s.image for s in scenes])))
        asked = [scene.questions for scene in scenes]
        picture, text, _ = all_logits(model, asked, states, self._encode)
        return _Sheet(scenes=scenes, places=places, states=states, text=text, picture=picture)

    @torch.no_grad()
    def take(self, model: Any) -> Paper:
        """Ask a model everything.

        Args:
            model: A model with the same vision tower; a quantized decoder, or the reference itself.
        """
        outcomes: dict[int, list[Outcome]] = defaultdict(list)
        parts: dict[str, list[_Part]] = {modality: [] for modality in MODALITIES}
        for sheet in self._sheets:
            asked = [scene.questions for scene in sheet.scenes]
            picture, text, rows = all_logits(model, asked, sheet.states, self._encode)
            place_of = {
                scene.number: int(p) for scene, p in zip(sheet.scenes, sheet.places, strict=True)
            }
            for outcome in outcomes_of(sheet.scenes, text, rows):
                outcomes[place_of[outcome.scene]].append(outcome)
            numbers = np.array([scene.number for scene in sheet.scenes])
            masks = text_masks(sheet.scenes, rows)
            for modality, reference, tested, mask in (
                (ANSWER, sheet.text, text, masks[ANSWER]),
                (PROMPT, sheet.text, text, masks[PROMPT]),
                (VISION, sheet.picture, picture, torch.ones(picture.shape[:2], dtype=torch.bool)),
            ):
                owner = np.repeat(np.arange(len(numbers)), mask.sum(1).numpy())
                parts[modality].append(
                    _Part(
                        reference=reference[mask],
                        tested=tested[mask],
                        scenes=numbers[owner],
                        places=sheet.places[owner],
                    )
                )
        in_order = [outcome for place in sorted(outcomes) for outcome in outcomes[place]]
        return _paper(in_order, {modality: _distances(found) for modality, found in parts.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Positions of one modality in one sheet.

    Attributes:
        reference: (P, vocabulary) logits.
        tested: Likewise.
        scenes: (P,) number of the scene.
        places: (P,) place of the scene in the exam.
    """

    reference: Tensor
    tested: Tensor
    scenes: NDArray[np.int64]
    places: NDArray[np.int64]


def text_masks(scenes: Sequence[Scene], rows: Rows) -> dict[str, Tensor]:
    """Say which text positions count, captions left out.

    Args:
        scenes: What the rows were packed from.
        rows: (B, T).

    Returns:
        (B, T) masks: ``answer`` where an answer token is predicted, ``prompt`` where a prompt token is.
    """
    counted = torch.zeros_like(rows.segments, dtype=torch.bool)
    for index, scene in enumerate(scenes):
        for segment, question in enumerate(scene.questions, 1):
            if question.kind != CAPTION:
                counted[index] |= rows.segments[index] == segment
    following = torch.nn.functional.pad(rows.segments[:, 1:], (0, 1), value=PADDING)
    wanted = rows.labels != IGNORED
    return {
        ANSWER: counted & wanted,
        # The last token of an answer, <eos>, predicts nothing.
        PROMPT: counted & ~wanted & (following == rows.segments),
    }


def _distances(found: Sequence[_Part]) -> Distances:
    """Compare all positions, in the order of the exam."""
    order = np.argsort(np.concatenate([part.places for part in found]), kind="stable")
    reference = torch.cat([part.reference for part in found]).numpy()[order]
    tested = torch.cat([part.tested for part in found]).numpy()[order]
    return Distances(
        nats=divergences(reference, tested),
        same=reference.argmax(-1) == tested.argmax(-1),
        scenes=np.concatenate([part.scenes for part in found])[order],
    )


def _paper(outcomes: Sequence[Outcome], distances: Mapping[str, Distances]) -> Paper:
    counted = [outcome for outcome in outcomes if outcome.question.kind != CAPTION]
    return Paper(
        correct=np.array([outcome.correct for outcome in counted]),
        nll=np.array([outcome.nll for outcome in counted]),
        scenes=np.array([outcome.scene for outcome in counted]),
        kinds=np.array([outcome.question.kind for outcome in counted]),
        distances=distances,
    )


def summary(paper: Paper) -> dict[str, Any]:
    """Reduce a paper to what a table shows, with intervals that resample scenes.

    Returns:
        ``accuracy`` (value, low, high), ``questions``, ``pictures``, ``nll``, ``kinds`` (kind to accuracy and
        count), ``kl`` (modality to mean with interval, median, 95th and 99th percentile, and share of equal
        likeliest tokens). Accuracies are shares, KL is in nats.
    """
    share = bootstrap_ci(paper.correct, paper.scenes)
    return {
        "accuracy": _interval(share),
        "questions": share.n,
        "pictures": share.clusters,
        "nll": float(paper.nll.mean()),
        "kinds": {
            str(kind): {
                "accuracy": float(paper.correct[paper.kinds == kind].mean()),
                "questions": int((paper.kinds == kind).sum()),
            }
            for kind in np.unique(paper.kinds)
        },
        "kl": {modality: _kl(found) for modality, found in paper.distances.items()},
    }


def _kl(found: Distances) -> dict[str, Any]:
    median, high, highest = np.percentile(found.nats, (50, 95, 99))
    return {
        "mean": _interval(bootstrap_ci(found.nats, found.scenes)),
        "median": float(median),
        "p95": float(high),
        "p99": float(highest),
        "same_top_token": float(found.same.mean()),
        "positions": len(found.nats),
    }


def comparison(first: Paper, second: Paper) -> dict[str, Any]:
    """Compare two models on the same exam: differences are second minus first.

    Returns:
        ``accuracy`` and ``kl`` (at answers): value, low, high of the paired difference; ``mcnemar``: discordant
        counts and p.
    """
    test = mcnemar(first.correct, second.correct)
    a, b = first.distances[ANSWER], second.distances[ANSWER]
    return {
        "accuracy": _interval(paired_difference(first.correct, second.correct, first.scenes)),
        "kl": _interval(paired_difference(a.nats, b.nats, a.scenes)),
        "mcnemar": {
            "only_first": test.only_first,
            "only_second": test.only_second,
            "p": test.p,
        },
    }


def established(differences: Sequence[Mapping[str, float]]) -> int:
    """Say whether a difference may be stated.

    Args:
        differences: One per seed: value, low, high.

    Returns:
        1 or -1, its sign, if all seeds agree in it and every interval excludes zero; else 0.
    """
    if all(each["low"] > 0 for each in differences):
        return 1
    return -1 if all(each["high"] < 0 for each in differences) else 0


def _interval(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}
