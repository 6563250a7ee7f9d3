"""lmms-eval asks a session: requests are translated or refused, results keep their numbers.

The tests that run lmms-eval itself need it installed; everything else is tested without.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from mbq_export.errors import MachineError, MbqError, UsageError
from mbq_export.evaluate.lmms import Answerer, _measurements, _options, find_tasks
from mbq_export.evaluate.samples import generated_questions
from mbq_export.evaluate.validate import Validation, validate
from mbq_export.runtime import Session, open_session
from mbq_export.runtime.sampling import Options
from tests.command_line import PROGRAM
from tests.evaluate.bundles import sample_bundle, tiny_bundle

NEW_TOKENS = 6
TASK, SPLIT = "colours", "test"


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with open_session(tiny_bundle(), threads=1) as opened:
        yield opened


def picture(shade: int) -> Image.Image:
    return Image.new("RGB", (40, 30), (shade, 200, 255 - shade))


def requests(
    *rows: tuple[str, object], settings: dict[str, Any] | None = None
) -> tuple[list[SimpleNamespace], dict[str, Any]]:
    """Requests as lmms-eval makes them, and the data they point into."""
    data = [{"prompt": prompt, "pictures": pictures} for prompt, pictures in rows]
    visual: Callable[[dict[str, Any]], object] = lambda row: row["pictures"]  # noqa: E731
    asked = [
        SimpleNamespace(
            args=(row["prompt"], dict(settings or {}), visual, number, TASK, SPLIT), task_name=TASK
        )
        for number, row in enumerate(data)
    ]
    return asked, {TASK: {SPLIT: data}}


def test_answers_are_those_of_the_session_in_order(session: Session) -> None:
    rows = [
        ("what colour ?", [picture(10)]),
        ("<image>\n<image> same ?", [picture(10), picture(200)]),
        ("how many days ?", None),
    ]
    answerer = Answerer(session, new_tokens=NEW_TOKENS)
    asked, answerer.task_dict = requests(*rows)
    found = answerer.generate_until(asked)
    options = Options(max_new_tokens=NEW_TOKENS)
    assert found == [
        session.generate("what colour ?", [picture(10)], options=options).text,
        session.generate("same ?", [picture(10), picture(200)], options=options).text,
        session.generate("how many days ?", options=options).text,
    ]
    assert [(one.question, one.said) for one in answerer.answers] == list(enumerate(found))


def test_settings_of_generation_are_translated() -> None:
    assert _options({}, 9) == Options(max_new_tokens=9)
    greedy = {"temperature": 0.7, "top_p": None, "num_beams": 1, "until": None, "do_sample": False}
    assert _options(greedy, 9) == Options(max_new_tokens=9)
    assert _options({"max_new_tokens": 3, "until": "\n"}, 9) == Options(
        max_new_tokens=3, stop=("\n",)
    )
    sampled = {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "until": ["\n\n", ""]}
    assert _options(sampled, 9) == Options(
        max_new_tokens=9, temperature=0.5, top_p=0.9, stop=("\n\n",)
    )
    assert _options({"do_sample": True}, 9).temperature == 1.0


@pytest.mark.parametrize(
    ("prompt", "visuals", "settings", "words"),
    [
        ("left <image> or right ?", [picture(1)], {}, "in the middle of the text"),
        ("what happens ?", ["film.mp4"], {}, "A str is no picture"),
        ("what colour ?", [picture(1)], {"num_beams": 4}, "4 beams"),
    ],
)
def test_what_a_session_does_not_do_is_refused_with_its_place(
    session: Session, prompt: str, visuals: list[object], settings: dict[str, Any], words: str
) -> None:
    answerer = Answerer(session, new_tokens=NEW_TOKENS)
    asked, answerer.task_dict = requests((prompt, visuals), settings=settings)
    with pytest.raises(UsageError) as caught:
        answerer.generate_until(asked)
    assert caught.value.code == "E2019"
    assert words in caught.value.message
    assert caught.value.where == [f"task {TASK}", "question 0"]


@pytest.mark.parametrize(
    "kind", ["loglikelihood", "generate_until_multi_round", "generate_visual_cot"]
)
def test_other_kinds_of_requests_are_refused_by_the_name_of_the_task(
    session: Session, kind: str
) -> None:
    answerer = Answerer(session, new_tokens=NEW_TOKENS)
    asked, _ = requests(("what colour ?", None))
    with pytest.raises(UsageError, match=f"Task {TASK} asks for") as caught:
        getattr(answerer, kind)(asked)
    assert caught.value.code == "E2019"


def test_results_keep_numbers_and_say_which_are_none() -> None:
    found = {
        "results": {
            "a": {"alias": "a", "exact,none": 0.5, "exact_stderr,none": "N/A", "f1,strict": 1},
            "b": {"alias": "b", "score,none": float("nan"), "by_kind,none": {"x": 1.0}},
            "group": {"alias": "group", "exact,none": 0.25},
        },
        "n-samples": {"a": {"original": 9, "effective": 4}, "b": {"original": 2, "effective": 2}},
    }
    rows = {one.name: one.value for one in _measurements(found)}
    assert rows == {
        "task/a/questions": 4,
        "task/a/exact": 0.5,
        "task/a/f1/strict": 1.0,
        "task/b/questions": 2,
        "task/b/score": None,
        "task/group/exact": 0.25,
    }


@pytest.mark.parametrize("missing", ["lmms_eval", "loguru"])
def test_a_missing_package_is_named_with_what_installs_it(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing != "lmms_eval":
        monkeypatch.setitem(sys.modules, "lmms_eval.tasks", SimpleNamespace())
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MachineError) as caught:
        find_tasks(["shapes"])
    assert caught.value.code == "E3007"
    assert caught.value.message.startswith(missing.replace("_", "-"))
    assert 'pip install "mbq-export[lmms]"' in caught.value.fix


def test_a_missing_package_is_told_before_any_tier_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    calls: list[int] = []
    with pytest.raises(MbqError, match="lmms-eval is not installed"):
        validate(
            tiny_bundle(),
            Validation(tiers=("structure", "task"), tasks=("shapes",)),
            progress=lambda done, total, note="": calls.append(done),
        )
    assert calls == []


def test_a_folder_of_tasks_must_be_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        find_tasks(["shapes"], tmp_path / "no")
    assert caught.value.code == "E2003"


@pytest.mark.parametrize(
    ("known", "why", "fix"),
    [
        (["mme", "shapes"], "2 are known, among them shapes", "--tasks shapes"),
        (["mme"], "1 are known, among them mme", "--tasks mme"),
        ([], "has no task files", "--include-path DIR"),
    ],
)
def test_an_unknown_task_is_refused_with_names_like_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, known: list[str], why: str, fix: str
) -> None:
    """The index of tasks is a stand-in here: the package is optional."""
    log = SimpleNamespace(disable=lambda _: None, enable=lambda _: None)
    index = SimpleNamespace(TaskManager=lambda **_: SimpleNamespace(all_tasks=known))
    monkeypatch.setitem(sys.modules, "lmms_eval.tasks", index)
    monkeypatch.setitem(sys.modules, "loguru", SimpleNamespace(logger=log))
    monkeypatch.setitem(sys.modules, "tenacity", SimpleNamespace(RetryError=TimeoutError))
    with pytest.raises(UsageError, match="Unknown task 'shape'") as caught:
        find_tasks(["shape"], tmp_path)
    assert caught.value.code == "E2001"
    assert why in caught.value.why
    assert fix in caught.value.fix


COUNT = 8
TASK_FILE = """\
task: {name}
dataset_path: imagefolder
dataset_kwargs:
  data_dir: {data}
test_split: train
output_type: {kind}
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
"""
SCORED = """\
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
"""
CHOSEN = """\
doc_to_choice: ["red", "blue"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files, and the generated questions as a folder of pictures, with a wrong answer more."""
    pytest.importorskip("lmms_eval", reason="lmms-eval, an optional package, is not installed")
    folder = tmp_path_factory.mktemp("lmms")
    data = folder / "data"
    data.mkdir()
    rows = []
    questions = generated_questions(COUNT)
    for number, question in enumerate([*questions, questions[0]]):
        assert isinstance(question.image, Image.Image)
        question.image.save(data / f"{number}.png")
        answer = question.answers[0] if number < COUNT else "nothing of the kind"
        rows.append({"file_name": f"{number}.png", "question": question.prompt, "answer": answer})
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, rest in (
        ("shapes", "generate_until", SCORED),
        ("weighed", "multiple_choice", CHOSEN),
        ("nowhere", "generate_until", SCORED),
    ):
        place = data if name != "nowhere" else folder / "none"
        text = TASK_FILE.format(name=name, data=place, kind=kind) + rest
        (folder / f"{name}.yaml").write_text(text)
    return folder


def ask(folder: Path, tasks: str) -> tuple[int, dict[str, Any]]:
    """Run the command in a process of its own: lmms-eval changes libraries that it shares with others."""
    line = (*PROGRAM, "--json", "validate", str(sample_bundle().root), "--tier", "task")
    own = ("--tasks", tasks, "--include-path", str(folder), "--threads", "1")
    done = subprocess.run(
        [*line, *own],
        env={**os.environ, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return done.returncode, document


@pytest.mark.slow
def test_a_local_task_scores_as_the_same_questions_do_without_lmms_eval(task_folder: Path) -> None:
    status, document = ask(task_folder, "shapes")
    assert status == 0, document
    own = validate(sample_bundle(), Validation(tiers=("task",), questions=COUNT, threads=1))
    right = [row["right"] for row in own.details["task"]]
    assert sum(right) > 0
    measured = {one["name"]: one["value"] for one in document["result"]["measurements"]}
    assert measured["task/shapes/questions"] == COUNT + 1
    assert measured["task/shapes/exact_match"] == pytest.approx(sum(right) / (COUNT + 1))
    answers = document["result"]["lmms_eval"]["answers"]
    assert [one["question"] for one in answers] == list(range(COUNT + 1))
    assert answers[0]["said"] == answers[COUNT]["said"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "status", "code", "words"),
    [
        ("weighed", 2, "MBQ-E2019", "Task weighed asks for the likelihood of given answers."),
        ("nowhere", 4, "MBQ-E4312", "lmms-eval failed at nowhere: "),
    ],
)
def test_a_local_task_that_cannot_be_asked_says_why(
    task_folder: Path, task: str, status: int, code: str, words: str
) -> None:
    found, document = ask(task_folder, task)
    error = document["error"]
    assert (found, error["code"]) == (status, code)
    assert words in error["message"]
