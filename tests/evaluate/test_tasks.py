"""Intervals against enumeration and simulation, scoring rules, and task files."""

import json
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbq_export.errors import FormatError
from mbq_export.evaluate.samples import generated_questions
from mbq_export.evaluate.tasks import (
    Question,
    bootstrap_ci,
    contains,
    exact_match,
    is_right,
    mcnemar,
    paired_difference,
    read_tasks,
)
from mbq_export.evaluate.validate import Validation, validate
from mbq_export.report import Report
from tests.evaluate.bundles import sample_bundle


def test_bootstrap_interval_equals_enumeration_for_two_clusters() -> None:
    # Clusters (1, 1) and (0,): resampling two of two gives means 1, 2/3 (twice) and 0.
    found = bootstrap_ci([1, 1, 0], [7, 7, 9], draws=20000)
    means = sorted(sum(p) / len(p) for p in ([1, 1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0]))
    assert found.value == pytest.approx(2 / 3)
    assert (found.low, found.high) == (means[0], means[-1])
    assert (found.n, found.clusters) == (3, 2)


def test_questions_of_one_picture_do_not_narrow_the_interval() -> None:
    right = np.random.default_rng(0).random(200) < 0.8
    alone = bootstrap_ci(right, np.arange(200))
    copied = bootstrap_ci(np.repeat(right, 10), np.repeat(np.arange(200), 10))
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))
    naive = bootstrap_ci(np.repeat(right, 10), np.arange(2000))
    assert naive.high - naive.low < 0.5 * (copied.high - copied.low)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        share = np.clip(random.normal(0.8, 0.15, 100), 0, 1)
        right = random.random((100, 6)) < share[:, None]
        found = bootstrap_ci(right.ravel(), np.repeat(np.arange(100), 6), draws=400, seed=trial)
        truth = np.clip(random.normal(0.8, 0.15, 100000), 0, 1).mean()
        covered += found.low <= truth <= found.high
    assert 0.90 <= covered / 300 <= 0.98


def test_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no observations"):
        bootstrap_ci([], [])


def test_paired_difference_is_narrower_than_two_marginals() -> None:
    random = np.random.default_rng(2)
    first = random.random(600) < 0.8
    second = first.copy()
    second[np.flatnonzero(~first)[:20]] = True
    clusters = np.repeat(np.arange(100), 6)
    found = paired_difference(first, second, clusters)
    assert found.value == pytest.approx(20 / 600)
    assert found.excludes_zero
    a, b = bootstrap_ci(first, clusters), bootstrap_ci(second, clusters)
    assert a.high > b.low, "the marginal intervals overlap, the paired one decides"


def test_equal_methods_have_an_interval_that_holds_zero() -> None:
    right = np.random.default_rng(3).random(60) < 0.5
    found = paired_difference(right, right, np.arange(60))
    assert (found.value, found.low, found.high) == (0.0, 0.0, 0.0)
    assert not found.excludes_zero


def test_unequal_lengths_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        paired_difference([1, 0, 1], [1, 0], [0, 1, 2])


def test_mcnemar_equals_enumeration_of_coin_flips() -> None:
    first, second = [True] * 7 + [False] * 2 + [True], [False] * 7 + [True] * 2 + [True]
    found = mcnemar(first, second)
    flips = [sum(flip) for flip in product((0, 1), repeat=9)]
    p = sum(min(heads, 9 - heads) <= 2 for heads in flips) / len(flips)
    assert (found.only_first, found.only_second) == (7, 2)
    assert found.p == pytest.approx(p) == pytest.approx(2 * sum(comb(9, k) for k in range(3)) / 512)


def test_mcnemar_without_disagreement_decides_nothing() -> None:
    assert mcnemar([True, False], [True, False]).p == 1.0


def test_mcnemar_of_thousands_of_questions_does_not_overflow() -> None:
    assert mcnemar([True] * 5000, [False] * 5000).p < 1e-300


def test_exact_match_ignores_case_blanks_and_a_full_stop() -> None:
    assert exact_match(" Red  star. ", ["red star"])
    assert not exact_match("red star and more", ["red star"])


def test_contains_wants_whole_words() -> None:
    assert contains("It is a Red star!", ["red star"])
    assert not contains("starred", ["red"])


def choice(*choices: str, answer: str) -> Question:
    return Question(
        name="1",
        cluster="1",
        image=None,
        prompt="?",
        answers=(answer,),
        score="choice",
        choices=choices,
    )


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("red star", True),
        ("B", True),
        ("(b)", True),
        ("the red star", True),
        ("a", False),
        ("star", False),
        ("red star or circle", False),
        ("nothing", False),
    ],
)
def test_choice_is_named_by_letter_or_words_and_only_once(said: str, right: bool) -> None:
    assert is_right(choice("star", "red star", "circle", answer="red star"), said) is right


def write(folder: Path, *rows: object) -> Path:
    (folder / "a.png").write_bytes(b"picture")
    path = folder / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_task_file_is_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"id": "q1", "image": "a.png", "prompt": "colour ?", "answer": "red", "kind": "colour"},
        {"prompt": "which ?", "answer": ["b"], "choices": ["a", "b"]},
    )
    first, second = read_tasks(path)
    assert first.image == tmp_path / "a.png"
    assert (first.name, first.kind, first.score) == ("q1", "colour", "exact")
    assert (second.name, second.image, second.score) == ("2", None, "choice")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"answer": "red"}, "prompt"),
        ({"prompt": "?", "answer": []}, "answer"),
        ({"prompt": "?", "answer": 3}, "answer"),
        ({"prompt": "?", "answer": "x", "score": "close"}, "score"),
        ({"prompt": "?", "answer": "x", "score": "choice"}, "score"),
        ({"prompt": "?", "answer": "x", "choices": "ab"}, "choices"),
        ({"prompt": "?", "answer": "x", "image": 5}, "image"),
    ],
)
def test_bad_line_names_number_and_field(
    tmp_path: Path, row: dict[str, object], field: str
) -> None:
    path = write(tmp_path, {"prompt": "?", "answer": "x"}, row)
    with pytest.raises(FormatError, match=rf"Line 2: {field} missing or of a wrong kind"):
        read_tasks(path)


def test_picture_outside_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "tasks"
    inside.mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    path = write(inside, {"prompt": "?", "answer": "x", "image": "../secret.png"})
    with pytest.raises(FormatError) as caught:
        read_tasks(path)
    assert caught.value.code == "E4305"


def test_empty_task_file_shows_an_example_line(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read_tasks(write(tmp_path))
    assert caught.value.code == "E4301"
    assert "answer" in caught.value.fix[0]


ASKED_COUNT = 8
ASKED = {"tiers": ("task",), "questions": ASKED_COUNT, "lowering": "qdq", "threads": 1}


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated questions of the task tier as somebody would write them down, and one with a wrong answer."""
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for number, question in enumerate(generated_questions(ASKED_COUNT)):
        assert isinstance(question.image, Image.Image)
        name = f"{question.cluster}.png".replace("/", "-")
        question.image.save(folder / name)
        row = {"id": str(number), "image": name, "prompt": question.prompt}
        rows.append({**row, "answer": list(question.answers), "kind": question.kind})
    rows.append({**rows[0], "id": "wrong", "answer": "nothing of the kind", "kind": "wrong"})
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def own(task_file: Path) -> Report:
    return validate(
        sample_bundle(), Validation(**{**ASKED, "questions": ASKED_COUNT + 1}, data=task_file)
    )


def test_a_file_of_questions_is_answered_like_the_questions_themselves(own: Report) -> None:
    generated = validate(sample_bundle(), Validation(**ASKED))
    right = [row["right"] for row in generated.details["task"]]
    assert [row["right"] for row in own.details["task"]] == [*right, False]
    assert own["task/accuracy"].value == pytest.approx(sum(right) / (ASKED_COUNT + 1))


def test_the_interval_holds_the_share_and_resamples_pictures(own: Report) -> None:
    low, share, high = (own[f"task/accuracy{end}"].value for end in ("_low", "", "_high"))
    assert low <= share <= high
    assert low < high
    pictures = own["task/pictures"].value
    assert 1 <= pictures <= ASKED_COUNT
    assert own["task/accuracy/wrong"].value == 0.0
