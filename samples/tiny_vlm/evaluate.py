"""Ask a model folder thousands of questions: python -m samples.tiny_vlm.evaluate FOLDER.

Packed (the default): one decoder row per picture, 5,000 questions in under half a minute.
--generate: one `model.generate` call per question, the way any user would ask. Slower, and
the check that the packed figure is the real one.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForImageTextToText

from mbq_export.calibrate.shapes import (
    TRAINING_SCENES,
    Scene,
    blind_majority,
    evaluation_questions,
    evaluation_scenes,
    make_scenes,
)
from mbq_export.calibrate.shapes_questions import CAPTION
from mbq_export.evaluate.packed import Outcome, accuracy, answer_scenes, encoder
from samples.tiny_vlm.inputs import HandMade

LONGEST_ANSWER: Final = 12
BLIND_SCENES: Final = 20_000


def load_model(folder: Path) -> Any:
    """Load a model folder in float32, the ordinary way."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def generated(model: Any, processor: HandMade, scenes: Iterable[Scene]) -> Iterator[Outcome]:
    """Yield what greedy generation makes of every question, captions left out; no likelihoods."""
    for scene in scenes:
        for question in scene.questions:
            if question.kind == CAPTION:
                continue
            feeds = processor.inputs(question.text, scene.image).tensors()
            out = model.generate(**feeds, max_new_tokens=LONGEST_ANSWER, do_sample=False)
            said = processor.decode(out[0, feeds["input_ids"].shape[1] :])
            correct = said == question.answer
            yield Outcome(scene=scene.number, question=question, correct=correct, nll=float("nan"))


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--generate", type=int, metavar="QUESTIONS", help="ask one by one")
    parser.add_argument("--blind", action="store_true", help="also score answers without looking")
    return parser.parse_args()


def main() -> None:
    """Evaluate and print one JSON object."""
    chosen = options()
    torch.set_num_threads(chosen.threads)
    model, processor = load_model(chosen.folder), HandMade(chosen.folder)
    scenes = evaluation_scenes(chosen.images, seed=chosen.seed)
    if chosen.generate:
        outcomes = list(islice(generated(model, processor, scenes), chosen.generate))
    else:
        outcomes = answer_scenes(model, scenes, encoder(processor.tokenizer))
    result = asdict(accuracy(outcomes))
    if chosen.blind:
        training = make_scenes(BLIND_SCENES, seed=3 * TRAINING_SCENES)
        examples = evaluation_questions(chosen.images, seed=chosen.seed)
        result["blind"] = blind_majority(examples, training=training)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
