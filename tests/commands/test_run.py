"""`run`: an answer, or one line per question."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbq_export.commands.run import _printable
from tests.command_line import Outcome, run, tell
from tests.tiny import ANSWER


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.mark.parametrize(
    "line",
    [
        [],
        ["--no-stream"],
        ["--no-stream", "-q"],
        ["--backend", "oracle"],
        ["--backend", "torch", "--device", "cpu"],
    ],
)
def test_text_comes_first_and_a_fixed_line_last(
    bundle: Path, picture: Path, line: list[str]
) -> None:
    outcome = tell("run", bundle, "-i", picture, "-p", "what is shown ?", *line)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines == [ANSWER, "OK  run  4 tokens, end"]


def test_a_device_is_chosen_for_the_torch_backend_only(bundle: Path) -> None:
    outcome = tell("run", bundle, "-p", "what ?", "--device", "cpu")
    assert outcome.status == 2
    assert "--backend torch --device cpu" in outcome.err


@pytest.mark.gpu
def test_a_gpu_gives_the_same_answer(bundle: Path, picture: Path) -> None:
    chosen = ("--backend", "torch", "--device", "cuda")
    outcome = tell("run", bundle, "-i", picture, "-p", "what is shown ?", *chosen)
    assert outcome.out.splitlines() == [ANSWER, "OK  run  4 tokens, end"]


def test_statistics_are_told_on_stderr_unless_quiet(bundle: Path) -> None:
    assert tell("run", bundle, "-p", "what ?").err.startswith("visual 0 · prompt 4 · out 4 · TTFT ")
    assert tell("run", bundle, "-p", "what ?", "-q").err == ""


def test_result_holds_text_reason_and_counts(bundle: Path, picture: Path) -> None:
    result = run("run", bundle, "-i", picture, "-p", "what is shown ?").document["result"]
    assert (result["text"], result["tokens"], result["reason"]) == (ANSWER, 4, "end")
    assert result["collapsed"] == ""
    assert result["statistics"]["visual_tokens"] > 0


def test_prompt_comes_from_a_file_or_from_standard_input(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "question.txt").write_text("what is shown ?")
    monkeypatch.setattr("sys.stdin", io.StringIO("what is shown ?"))
    counts = [
        run("run", bundle, "-p", prompt).document["result"]["statistics"]["prompt_tokens"]
        for prompt in ("what is shown ?", f"@{tmp_path / 'question.txt'}", "-")
    ]
    assert len(set(counts)) == 1


def test_text_of_a_model_does_not_drive_the_terminal() -> None:
    assert _printable("red\x1b[2J\x07\n") == "red\\x1b[2J\\x07\n"


def ask(bundle: Path, folder: Path, *entries: object) -> Outcome:
    """Ask a batch; an entry is an object, or the text of a whole line."""
    source = folder / "questions.jsonl"
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    source.write_text("\n".join(lines) + "\n")
    return run("run", bundle, "--jsonl", source, "-o", folder / "answers.jsonl")


def answers(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_batch_writes_one_line_per_question_and_goes_on_where_it_was(
    bundle: Path, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture.read_bytes())
    first = {"id": "a", "prompt": "what ?", "images": ["a.png"]}
    outcome = ask(bundle, tmp_path, first)
    assert outcome.document["result"]["answered"] == 1
    outcome = ask(bundle, tmp_path, first, {"prompt": "how many ?", "images": "a.png"})
    assert (outcome.document["result"]["answered"], outcome.document["result"]["kept"]) == (1, 1)
    assert [(line["id"], line["text"]) for line in answers(tmp_path)] == [
        ("a", ANSWER),
        (2, ANSWER),
    ]


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ({"id": "b"}, "MBQ-E4303"),
        ({"id": "b", "prompt": 5}, "MBQ-E4303"),
        ({"id": "b", "prompt": "x", "images": 7}, "MBQ-E4303"),
        ({"id": "b", "prompt": "x", "images": [None]}, "MBQ-E4303"),
        ({"id": "b", "prompt": "x", "images": ["nope.png"]}, "MBQ-E4305"),
        ({"id": "b", "prompt": "x", "images": ["../a.png"]}, "MBQ-E4305"),
        ({"id": "b", "prompt": "x " * 600}, "MBQ-E2009"),
    ],
)
def test_bad_line_becomes_an_error_object_and_is_asked_again_once_mended(
    bundle: Path, tmp_path: Path, bad: dict[str, object], code: str
) -> None:
    outcome = ask(bundle, tmp_path, {"id": "a", "prompt": "what ?"}, bad)
    assert (outcome.status, outcome.code) == (1, "E1107")
    assert outcome.document["error"]["message"] == "1 of 2 lines failed."
    good, failed = answers(tmp_path)
    assert good["text"] == ANSWER
    assert failed["error"]["code"] == code  # type: ignore[index]
    mended = ask(bundle, tmp_path, {"id": "a", "prompt": "x"}, {"id": "b", "prompt": "what ?"})
    assert mended.status == 0
    assert [line["id"] for line in answers(tmp_path)] == ["a", "b"]
    assert "error" not in answers(tmp_path)[1]


def test_line_that_is_no_json_stops_the_batch_before_a_model_is_loaded(
    bundle: Path, tmp_path: Path
) -> None:
    outcome = ask(bundle, tmp_path, {"prompt": "x"}, "not json", "[1]")
    assert (outcome.status, outcome.code) == (4, "E4302")
    message = outcome.document["error"]["message"]
    assert "line 2" in message
    assert "line 3" in message
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "status", "code", "words"),
    [
        ([], 2, "E2002", "run takes either --prompt or --jsonl."),
        (["-p", "x", "--jsonl", "y"], 2, "E2002", "run got both --prompt and --jsonl."),
        (["--jsonl", "y"], 2, "E2002", "--jsonl needs -o."),
        (["--jsonl", "nope", "-o", "z"], 4, "E4302", "There is no file 'nope'"),
        (["-p", "@nope"], 2, "E2002", "--prompt @nope names no text file."),
        (["-p", "x", "-i", "nope.png"], 4, "E4304", "There is no file 'nope.png'"),
        (["-p", "x", "--temperature", "-1"], 2, "E2017", "--temperature -1.0 is out of range."),
        (["-p", "x", "--temperature", "hot"], 2, "E2003", "(got 'hot')"),
        (["-p", "x", "--top-p", "2"], 2, "E2017", "--top-p 2.0 is out of range."),
        (["-p", "x", "--max-new-tokens", "0"], 2, "E2017", "is out of range"),
        (["-p", "x", "--max-new-tokens", "512"], 2, "E2009", "the bundle allows 512"),
        (["-p", "x", "--stop", ""], 2, "E2017", "--stop"),
        (["-p", "x", "--backend", "tvm"], 2, "E2001", "Unknown backend 'tvm'."),
        (["-p", "x", "--backend", "rtx"], 2, "E2001", "has no engines of"),
        (["-p", "x", "--lowering", "plugin"], 2, "E2001", "has no fp32 graph"),
        (["-p", "x", "--threads", "-1"], 2, "E2003", "(got '-1')"),
        (["hello"], 2, "E2003", "unexpected extra argument"),
    ],
)
def test_wrong_option_is_refused_by_its_value(
    bundle: Path, line: list[str], status: int, code: str, words: str
) -> None:
    outcome = run("run", bundle, *line)
    assert (outcome.status, outcome.code) == (status, code)
    assert words in outcome.document["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n cut"])
def test_file_that_is_no_picture_is_named(bundle: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    outcome = tell("run", bundle, "-p", "x", "-i", tmp_path / "a.png")
    assert outcome.status == 4
    assert outcome.err.startswith("error[MBQ-E4304]: a.png cannot be decoded: ")
    assert str(tmp_path) not in outcome.err
