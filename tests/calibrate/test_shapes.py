"""Scenes follow from their numbers, and the sets made of them never meet."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mbq_export.calibrate import shapes, shapes_drawing
from mbq_export.calibrate.shapes import (
    CALIBRATION_SCENES,
    EVALUATION_SCENES,
    MONITOR_SCENES,
    SCENES_PER_SEED,
    CalibrationMix,
    Mix,
    Scene,
    blind_majority,
    calibration_samples,
    evaluation_questions,
    evaluation_scenes,
    make_scenes,
    question_tokens,
    write_manifest,
)
from mbq_export.calibrate.shapes_questions import QUESTION_KINDS
from mbq_export.errors import ResourceError, UsageError
from samples.tiny_vlm import stages


def digest(scene: Scene) -> str:
    return hashlib.sha256(scene.image.tobytes()).hexdigest()


def test_a_scene_follows_from_its_number_wherever_a_set_starts() -> None:
    early = list(make_scenes(5, seed=100))[3]
    late = next(make_scenes(1, seed=103))
    assert early.number == late.number == 103
    assert (early.image == late.image).all()
    assert (early.things, early.questions) == (late.things, late.questions)


def test_scene_103_is_what_it_always_was() -> None:
    scene = next(make_scenes(1, seed=103))
    text = json.dumps([[q.text, q.answer, q.kind] for q in scene.questions])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "3b0cdf64b6429f27"


def test_different_numbers_make_different_pictures() -> None:
    assert len({digest(scene) for scene in make_scenes(300, seed=0)}) == 300


def test_questions_of_a_scene_differ_and_the_caption_comes_first() -> None:
    for scene in make_scenes(100, seed=7):
        texts = [question.text for question in scene.questions]
        assert len(texts) == len(set(texts)) <= 7
        assert scene.questions[0].kind == "caption"


def test_packed_rows_stay_within_their_token_bound() -> None:
    mix = Mix(most_tokens=96)
    sums = [
        sum(map(question_tokens, scene.questions))
        for scene in make_scenes(200, seed=7, questions_per_image=14, captions=0.35, mix=mix)
    ]
    assert max(sums) <= 96
    assert np.mean(sums) > 80


def test_scenes_hold_as_many_things_as_their_weights_say() -> None:
    counts = Counter(len(scene.things) for scene in make_scenes(2000, seed=50_000))
    shares = np.array([counts[n] for n in range(1, 7)]) / 2000
    assert np.abs(shares - np.array([1, 2, 3, 3, 2, 1]) / 12).max() < 0.035


def test_calibration_asks_for_captions_and_every_kind_of_question() -> None:
    kinds = Counter(sample.kind for sample in calibration_samples(128))
    assert kinds["caption"] == 64
    assert all(5 <= kinds[kind] <= 12 for kind in QUESTION_KINDS)


def test_captions_only_is_captions_only() -> None:
    samples = calibration_samples(32, mix=CalibrationMix.CAPTIONS)
    assert {sample.kind for sample in samples} == {"caption"}
    assert len({sample.scene for sample in samples}) == 32


def test_evaluation_holds_at_least_five_thousand_questions() -> None:
    examples = evaluation_questions(900)
    assert len(examples) >= 5000
    assert {example.kind for example in examples} == set(QUESTION_KINDS)
    assert len({example.id for example in examples}) == len(examples)


@given(st.integers(min_value=-(2**40), max_value=2**40))
def test_whatever_the_seed_sets_stay_in_their_ranges(seed: int) -> None:
    calibration = calibration_samples(1, seed=seed, mix=CalibrationMix.CAPTIONS)[0].scene
    evaluation = next(evaluation_scenes(1, seed=seed)).number
    assert CALIBRATION_SCENES <= calibration <= EVALUATION_SCENES - SCENES_PER_SEED
    assert EVALUATION_SCENES <= evaluation <= MONITOR_SCENES - SCENES_PER_SEED


def test_training_ends_before_calibration_starts() -> None:
    last = {
        1: stages.PROBE_STEPS * stages.PROBE_BATCH,
        2: stages.ALIGN_STEPS * stages.ALIGN_BATCH,
        3: stages.ANSWER_STEPS * stages.ANSWER_BATCH,
    }
    for stage, scenes in last.items():
        assert scenes <= 1_000_000
        assert (stage + 1) * 1_000_000 <= CALIBRATION_SCENES


def test_sets_share_no_picture() -> None:
    sets = {
        "training": [s for n in (1, 2, 3) for s in make_scenes(500, seed=n * 1_000_000)],
        "monitoring": list(make_scenes(150, seed=MONITOR_SCENES, held_out=True)),
        "evaluation": list(evaluation_scenes(900)),
    }
    pictures = {name: {digest(scene) for scene in scenes} for name, scenes in sets.items()}
    pictures["calibration"] = {
        hashlib.sha256(sample.image.tobytes()).hexdigest() for sample in calibration_samples(160)
    }
    assert sum(map(len, pictures.values())) == len(set().union(*pictures.values()))


def test_only_evaluation_shows_held_out_handwriting(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = shapes_drawing.digit_masks

    def spy(*, held_out: bool) -> dict[str, list[shapes_drawing.Mask]]:
        seen.append(held_out)
        return real(held_out=held_out)

    monkeypatch.setattr(shapes_drawing, "digit_masks", spy)
    calibration_samples(30)
    list(make_scenes(30, seed=3_000_000))
    assert set(seen) == {False}
    seen.clear()
    evaluation_questions(30)
    assert set(seen) == {True}


def test_answering_blind_gets_less_than_a_third_right() -> None:
    share = blind_majority(evaluation_questions(300), training=make_scenes(4000, seed=3_000_000))
    assert 0.27 < share < 0.34


def test_answering_blind_learns_the_most_frequent_answer() -> None:
    (example, *_) = evaluation_questions(1)
    scene = next(scene for scene in evaluation_scenes(1))
    assert blind_majority([example], training=[scene]) == 1.0
    assert blind_majority([example], training=[]) == 0.0


def test_a_manifest_gives_back_pictures_questions_and_answers(tmp_path: Path) -> None:
    samples = calibration_samples(6)
    manifest = write_manifest(tmp_path / "data", samples)
    lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == [sample.id for sample in samples]
    for line, sample in zip(lines, samples, strict=True):
        assert set(line) == {"id", "images", "prompt", "answer"}
        assert (line["prompt"], line["answer"]) == (sample.prompt, sample.answer)
        (name,) = line["images"]
        with Image.open(manifest.parent / name) as picture:
            assert (np.asarray(picture) == sample.image).all()


def test_the_same_samples_make_the_same_files(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        folder = write_manifest(tmp_path / name, calibration_samples(3)).parent
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        contents.append([(p.relative_to(folder), p.read_bytes()) for p in files])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4


def test_a_manifest_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match=r"Cannot write .*file.*data"):
        write_manifest(tmp_path / "file" / "data", calibration_samples(1))


@pytest.mark.parametrize("count", [0, -1, SCENES_PER_SEED + 1])
def test_a_count_outside_its_range_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=rf"Cannot generate {count} samples") as caught:
        calibration_samples(count)
    assert caught.value.code == "E2003"
    with pytest.raises(UsageError, match=rf"Cannot generate {count} samples"):
        evaluation_scenes(count)


def test_public_names_are_sorted_and_exist() -> None:
    names = shapes.__all__
    assert all(hasattr(shapes, name) for name in names)
