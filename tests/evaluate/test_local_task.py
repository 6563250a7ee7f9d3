"""A task of one's own: a file of questions with pictures beside it, asked of a bundle."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mbq_export.evaluate.samples import generated_questions
from mbq_export.evaluate.validate import Validation, validate
from mbq_export.report import Report
from tests.evaluate.bundles import sample_bundle

COUNT = 8
ASKED = {"tiers": ("task",), "questions": COUNT, "lowering": "qdq", "threads": 1}


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The generated questions of the task tier as somebody would write them down, and one with a wrong answer."""
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for number, question in enumerate(generated_questions(COUNT)):
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
        sample_bundle(), Validation(**{**ASKED, "questions": COUNT + 1}, data=task_file)
    )


def test_a_file_of_questions_is_answered_like_the_questions_themselves(own: Report) -> None:
    generated = validate(sample_bundle(), Validation(**ASKED))
    right = [row["right"] for row in generated.details["task"]]
    assert [row["right"] for row in own.details["task"]] == [*right, False]
    assert own["task/accuracy"].value == pytest.approx(sum(right) / (COUNT + 1))


def test_the_interval_holds_the_share_and_resamples_pictures(own: Report) -> None:
    low, share, high = (own[f"task/accuracy{end}"].value for end in ("_low", "", "_high"))
    assert low <= share <= high
    assert low < high
    pictures = own["task/pictures"].value
    assert 1 <= pictures <= COUNT
    assert own["task/accuracy/wrong"].value == 0.0
