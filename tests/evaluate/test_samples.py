"""What validation asks without data of the user's."""

import numpy as np

from mbq_export.calibrate.shapes import evaluation_questions, write_manifest
from mbq_export.evaluate.samples import PARITY_SEED, TASK_SEED, generated_questions, parity_samples
from mbq_export.families.base import ANSWER, PROMPT, VISION
from tests.questions import tiny_model


def test_samples_show_every_modality_and_long_and_short_answers() -> None:
    samples = parity_samples(None, 12, tiny_model().processor)
    assert len(samples) == 12
    lengths = [int((sample.token_classes == ANSWER).sum()) for sample in samples]
    assert min(lengths) <= 3 < 8 <= max(lengths)
    for sample in samples:
        assert set(sample.token_classes) == {VISION, PROMPT, ANSWER}


def test_samples_are_the_same_every_time_and_start_alike() -> None:
    processor = tiny_model().processor
    few, many = parity_samples(None, 2, processor), parity_samples(None, 5, processor)
    for one, other in zip(few, many, strict=False):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.pixel_values, other.pixel_values)


def test_samples_come_from_the_users_manifest(tmp_path) -> None:
    manifest = write_manifest(tmp_path, evaluation_questions(4, seed=3))
    processor = tiny_model().processor
    (sample,) = parity_samples(manifest, 1, processor)
    asked = {example.prompt for example in evaluation_questions(4, seed=3)}
    prompts = [sample.input_ids[sample.token_classes == PROMPT]]
    assert processor.decode(prompts[0]).strip() in asked


def test_questions_of_a_scene_share_its_picture_and_cluster() -> None:
    questions = generated_questions(15)
    assert len(questions) == 15
    assert questions[0].cluster == questions[1].cluster != questions[14].cluster
    assert questions[0].image.tobytes() == questions[1].image.tobytes()
    assert len({question.name for question in questions}) == 15
    assert len({question.kind for question in questions}) > 4


def test_purposes_have_draws_of_their_own() -> None:
    assert PARITY_SEED != TASK_SEED
