"""What validation asks when the user brings no data: generated pictures that nobody trained or calibrated on.

Each purpose has a draw of its own, so that none is tuned on what another reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from mbq_export.calibrate.data import encode, generated_samples, read_manifest
from mbq_export.calibrate.shapes import (
    SCENES_PER_SEED,
    Example,
    evaluation_questions,
    evaluation_scenes,
)
from mbq_export.evaluate.tasks import Question

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from mbq_export.families.inputs import ModelInputs, Processor

PARITY_SEED: Final = 11
TASK_SEED: Final = 12


def parity_samples(manifest: Path | None, count: int, processor: Processor) -> list[ModelInputs]:
    """Encode teacher-forced samples: of the user's manifest, or of generated evaluation scenes.

    Args:
        manifest: Calibration-style JSON Lines; None generates.
        count: How many.
        processor: The model's.

    Raises:
        FormatError: E43xx for the manifest.
    """
    if manifest is not None:
        data = read_manifest(manifest, samples=count, held_out=0, text_only_ok=True)
        return encode(data.samples, processor)
    examples = []
    for index, scene in enumerate(evaluation_scenes(count, seed=PARITY_SEED)):
        # In turn: the caption, whose answer is long, and questions of every kind.
        question = scene.questions[index % len(scene.questions)]
        examples.append(
            Example(
                id=f"shapes-{scene.number}",
                scene=scene.number,
                image=scene.image,
                prompt=question.text,
                answer=question.answer,
                kind=question.kind,
            )
        )
    return encode(generated_samples(examples), processor)


def generated_questions(count: int, *, seed: int = TASK_SEED) -> tuple[Question, ...]:
    """Return questions about generated evaluation scenes, all of a scene one after the other."""
    # A scene yields six questions, or fewer where little is to be seen.
    examples = evaluation_questions(min(count, SCENES_PER_SEED), seed=seed)[:count]
    return tuple(
        Question(
            name=example.id,
            cluster=str(example.scene),
            image=cast("Image", sample.images[0]),
            prompt=example.prompt,
            answers=(example.answer,),
            kind=example.kind,
        )
        for example, sample in zip(examples, generated_samples(examples), strict=True)
    )
