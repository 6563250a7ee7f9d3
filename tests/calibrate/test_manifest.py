"""Lines of calibration data in both forms, and what is wrong with the others."""

import json
from pathlib import Path
from typing import Any

import pytest

from mbq_export.calibrate.manifest import read_samples
from mbq_export.errors import FormatError

GOOD: dict[str, Any] = {"id": "a", "images": ["x.png"], "prompt": "what ?", "answer": "red"}
TALK: dict[str, Any] = {
    "id": 7,
    "image": "x.png",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat ?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "sure ?"},
        {"from": "gpt", "value": "yes"},
    ],
}


def manifest(folder: Path, *lines: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_our_form_is_read(tmp_path: Path) -> None:
    sample, text = read_samples(manifest(tmp_path, GOOD, {"prompt": "hi", "answer": "ho"}))
    assert (sample.id, sample.images, sample.prompt, sample.answer) == (
        "a",
        ("x.png",),
        "what ?",
        "red",
    )
    assert (text.id, text.images, text.line) == ("2", (), 2)


def test_llava_form_is_read_with_all_its_turns(tmp_path: Path) -> None:
    (sample,) = read_samples(manifest(tmp_path, TALK))
    assert (sample.id, sample.images) == ("7", ("x.png",))
    assert sample.earlier == (("what ?", "red"),)
    assert (sample.prompt, sample.answer) == ("sure ?", "yes")


def test_placeholders_in_our_form_are_text(tmp_path: Path) -> None:
    (sample,) = read_samples(manifest(tmp_path, GOOD | {"prompt": "what is <image> ?"}))
    assert sample.prompt == "what is <image> ?"


def talk(**changes: Any) -> dict[str, Any]:
    turns = [dict(turn) for turn in TALK["conversations"]]
    for index, change in changes.items():
        turns[int(index[1:])] |= change
    return TALK | {"conversations": turns}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (GOOD | {"answer": None}, "answer is missing"),
        (GOOD | {"answer": " "}, "answer is empty or no text"),
        (GOOD | {"prompt": 5}, "prompt is empty or no text"),
        (GOOD | {"images": [1]}, "images is no list of paths"),
        (GOOD | {"images": {"a": "b"}}, "images is no list of paths"),
        (GOOD | {"id": ["a"]}, "id is neither text nor a number"),
        (talk(t0={"from": "robot"}), "turn 1 is from 'robot', expected human"),
        (talk(t1={"from": "human"}), "turn 2 is from 'human', expected gpt"),
        (talk(t0={"value": "what ?"}), "1 images need 1 <image>"),
        (talk(t0={"value": "<image><image> what ?"}), "1 images need 1 <image>"),
        (talk(t2={"value": "<image> sure ?"}), "none later"),
        (talk(t0={"value": "<image>\n"}), "the first prompt is empty"),
        (talk(t1={"value": ""}), "value is empty or no text"),
        (
            TALK | {"conversations": TALK["conversations"][:3]},
            "no list of prompts and answers in turn",
        ),
        (TALK | {"conversations": ["hi", "ho"]}, "turn 1 is from 'hi'"),
        (TALK | {"image": 5}, "0 images need 0 <image>"),
    ],
)
def test_wrong_field_is_named_with_its_line(tmp_path: Path, line: Any, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_samples(manifest(tmp_path, GOOD, line))
    assert caught.value.code == "E4303"
    assert f"1 lines of data.jsonl have wrong fields: line 2: {said}" in caught.value.message or (
        said in caught.value.message and "line 2" in caught.value.message
    )


def test_all_wrong_lines_are_counted_and_five_named(tmp_path: Path) -> None:
    with pytest.raises(
        FormatError, match=r"7 lines of data\.jsonl have wrong fields: line 2.*line 6: [^;]*$"
    ):
        read_samples(manifest(tmp_path, GOOD, *[GOOD | {"answer": ""}] * 7))


def test_bad_json_comes_first(tmp_path: Path) -> None:
    path = manifest(tmp_path, GOOD, {"a": 1})
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(FormatError, match="line 3") as caught:
        read_samples(path)
    assert caught.value.code == "E4302"


@pytest.mark.parametrize("kind", ["missing", "empty", "blank", "folder"])
def test_manifest_without_samples_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text({"empty": "", "blank": "\n\r\n"}[kind])
    with pytest.raises(FormatError) as caught:
        read_samples(path)
    assert caught.value.code == "E4301"
