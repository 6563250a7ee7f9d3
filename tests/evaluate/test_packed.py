"""A packed row is nothing but its questions asked one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from mbq_export.calibrate.shapes import Scene, evaluation_scenes
from mbq_export.calibrate.shapes_questions import Question
from mbq_export.evaluate.packed import (
    IGNORED,
    Outcome,
    accuracy,
    answer_logits,
    answer_scenes,
    attention_mask,
    encoder,
    image_embeddings,
    pack,
    pixels_from_images,
    vision_states,
)
from samples.tiny_vlm.evaluate import generated
from samples.tiny_vlm.inputs import HandMade

WEIGHTS = Path(__file__).parents[2] / "samples" / "tiny_vlm" / "weights"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> HandMade:
    return HandMade(WEIGHTS)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return list(evaluation_scenes(12, seed=4))


def question(text: str, answer: str, kind: str = "at") -> Question:
    return Question(text=text, answer=answer, kind=kind)


def letters(text: str) -> list[int]:
    """One number per word: its first letter, a as 1."""
    return [ord(word.strip("<")[0]) - 96 for word in text.split()]


def test_a_row_holds_prompts_answers_shifted_labels_and_restarted_positions() -> None:
    rows = pack([[question("b c", "d"), question("f", "g h")]], letters, vision_tokens=10)
    assert rows.tokens.tolist() == [[17, 2, 3, 1, 4, 5, 17, 6, 1, 7, 8, 5]]
    x = IGNORED
    assert rows.labels.tolist() == [[x, x, x, 4, 5, x, x, x, 7, 8, 5, x]]
    assert rows.positions.tolist() == [[10, 11, 12, 13, 14, 15, 10, 11, 12, 13, 14, 15]]
    assert rows.segments.tolist() == [[1] * 6 + [2] * 6]


def test_shorter_rows_are_padded_where_nothing_is_wanted() -> None:
    rows = pack([[question("b", "c")], [question("b c d", "c")]], letters, vision_tokens=0)
    assert rows.segments[0].tolist() == [1] * 5 + [-1] * 2
    assert rows.labels[0, 5:].tolist() == [IGNORED] * 2


def test_the_mask_shows_the_picture_and_the_own_past_only() -> None:
    segments = torch.tensor([[1, 1, 2, 2, -1]])
    allowed = attention_mask(segments, vision_tokens=2)[0, 0] == 0
    owner = [0, 0, 1, 1, 2, 2, -1]
    for row in range(7):
        for column in range(7):
            wanted = column <= row and owner[column] in {0, owner[row]}
            assert bool(allowed[row, column]) == wanted, (row, column)


def test_picture_tokens_equal_those_of_transformers(
    model: Any, processor: HandMade, scenes: list[Scene]
) -> None:
    image = scenes[0].image
    feeds = processor.inputs("what ?", image).tensors()
    with torch.no_grad():
        native = model.model.get_image_features(
            pixel_values=feeds["pixel_values"],
            image_sizes=feeds["image_sizes"],
            batch_num_images=feeds["batch_num_images"],
        )
        ours = image_embeddings(model, vision_states(model, pixels_from_images(image[None])))
    features = native.pooler_output if hasattr(native, "pooler_output") else native
    assert ours.shape == (1, 78, 256)
    torch.testing.assert_close(ours[0], features[0], rtol=0, atol=1e-5)


def test_packed_logits_equal_those_of_one_question_at_a_time(
    model: Any, processor: HandMade, scenes: list[Scene]
) -> None:
    scene = scenes[1]
    pixels = pixels_from_images(scene.image[None])
    with torch.no_grad():
        states = vision_states(model, pixels)
        logits, rows = answer_logits(model, [scene.questions], states, encoder(processor.tokenizer))
        for segment, asked in enumerate(scene.questions, 1):
            feeds = processor.inputs(asked.text, scene.image, asked.answer).tensors()
            alone = model(**feeds).logits[0, 78:]
            packed = logits[0, rows.segments[0] == segment]
            torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


def test_packed_answers_are_those_of_greedy_generation(
    model: Any, processor: HandMade, scenes: list[Scene]
) -> None:
    packed = answer_scenes(model, scenes, encoder(processor.tokenizer), batch=5)
    asked = [(o.scene, o.question, o.correct) for o in packed if o.question.kind != "caption"]
    said = [(o.scene, o.question, o.correct) for o in generated(model, processor, scenes)]
    assert asked == said
    assert len(said) > 50
    assert not all(correct for _, _, correct in said)


def test_likelihood_of_an_answer_is_the_mean_over_its_tokens(
    model: Any, processor: HandMade, scenes: list[Scene]
) -> None:
    (first, *_) = answer_scenes(model, scenes[:1], encoder(processor.tokenizer))
    scene, asked = scenes[0], first.question
    sample = processor.inputs(asked.text, scene.image, asked.answer)
    ids = torch.from_numpy(sample.input_ids)
    start = len(processor.inputs(asked.text, scene.image).input_ids)
    with torch.no_grad():
        scores = model(**sample.tensors()).logits[0].log_softmax(-1)
    wanted = -scores[start - 1 : -1].gather(1, ids[start:, None]).mean()
    assert first.nll == pytest.approx(float(wanted), abs=1e-5)


def outcome(scene: int, *, correct: bool, kind: str = "at") -> Outcome:
    return Outcome(scene=scene, question=question("a", "b", kind), correct=correct, nll=0.0)


def test_captions_are_counted_apart() -> None:
    result = accuracy(
        [
            outcome(1, correct=True),
            outcome(1, correct=False),
            outcome(2, correct=True, kind="where"),
            outcome(2, correct=False, kind="caption"),
        ]
    )
    assert result.exact_match == pytest.approx(2 / 3)
    assert result.questions == 3
    assert result.by_kind == {"at": (0.5, 2), "caption": (0.0, 1), "where": (1.0, 1)}


def test_the_interval_is_as_wide_as_scenes_vary_not_as_questions_do() -> None:
    rng = np.random.default_rng(0)
    fair = [outcome(s, correct=bool(hit)) for s in range(100) for hit in rng.integers(0, 2, 10)]
    clustered = [
        outcome(s, correct=bool(hit)) for s in range(100) for hit in [rng.integers(0, 2)] * 10
    ]
    narrow, wide = accuracy(fair), accuracy(clustered)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)
    assert narrow.low < narrow.exact_match < narrow.high
