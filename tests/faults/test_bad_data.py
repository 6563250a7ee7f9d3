"""Bad calibration data: every wrong line is named, and nothing is written."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.command_line import Outcome, run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with one good picture."""
    folder = tmp_path / "data"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "good.png")
    return folder


def sample(image: str | None = "good.png", **changes: object) -> dict[str, object]:
    images = {} if image is None else {"images": [image]}
    return {"prompt": "what is shown ?", "answer": "nothing .", **images, **changes}


def build(model: Path, data: Path, *lines: object, more: tuple[str, ...] = ()) -> Outcome:
    """Plan a build on a manifest of these lines; text stands for itself."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (data / "calib.jsonl").write_text("\n".join(texts) + "\n")
    line = ("--data", data / "calib.jsonl", "--samples", "1", "--target", "cpu", *more)
    return run("build", "--model", model, *line, "-o", data.parent / "out")


def refused(outcome: Outcome, data: Path, code: str) -> dict[str, Any]:
    error: dict[str, Any] = outcome.document["error"]
    assert (outcome.status, error["code"]) == (4, f"MBQ-{code}"), error
    assert error["where"][0] == "plan"
    assert error["fix"]
    assert str(data) not in json.dumps({**error, "context": {}}), "no path of a home in a message"
    assert [path.name for path in data.parent.iterdir()] == ["data"]
    return error


def test_line_without_its_image_file_is_named(model: Path, data: Path) -> None:
    outcome = build(model, data, sample(), sample("gone.png"), more=("--samples", "2"))
    error = refused(outcome, data, "E4304")
    assert "line 2" in error["message"]
    assert "gone.png" in error["message"]
    assert "--skip-bad 1" in error["fix"]


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n" + bytes(60)], ids=repr)
def test_unreadable_image_is_named_and_can_be_skipped(
    model: Path, data: Path, content: bytes
) -> None:
    (data / "bad.png").write_bytes(content)
    good = []
    for index in range(33):  # one to use, and as many as are held out
        Image.new("RGB", (48, 48), (index, 0, 0)).save(data / f"{index}.png")
        good.append(sample(f"{index}.png"))
    outcome = build(model, data, sample("bad.png"), *good)
    error = refused(outcome, data, "E4304")
    assert "line 1: bad.png" in error["message"]
    skipped = build(model, data, sample("bad.png"), *good, more=("--skip-bad", "1", "--dry-run"))
    assert skipped.status == 0, skipped.err


def test_truncated_image_is_found_before_any_work(model: Path, data: Path) -> None:
    whole = (data / "good.png").read_bytes()
    (data / "cut.png").write_bytes(whole[: len(whole) // 2])
    assert "cut.png" in refused(build(model, data, sample("cut.png")), data, "E4304")["message"]


def test_text_only_data_is_refused_with_the_way_around(model: Path, data: Path) -> None:
    lines = [sample(None, prompt=f"what is {index} ?") for index in range(40)]
    error = refused(build(model, data, *lines), data, "E4308")
    assert error["message"] == "The calibration data has no picture."
    assert any("--text-only-ok" in fix for fix in error["fix"])
    assert build(model, data, *lines, more=("--text-only-ok", "--dry-run")).status == 0


@pytest.mark.parametrize(
    "path", ["../secret.png", "/etc/passwd", "http://host/a.png", "file:///etc/passwd", "a\\b.png"]
)
def test_path_out_of_the_data_folder_is_refused(model: Path, data: Path, path: str) -> None:
    error = refused(build(model, data, sample(path)), data, "E4305")
    assert "line 1" in error["where"]


def test_picture_with_a_huge_header_is_not_decoded(model: Path, data: Path) -> None:
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = {b"IHDR": size, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    chunks = [
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in parts.items()
    ]
    (data / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    error = refused(build(model, data, sample("bomb.png")), data, "E4306")
    assert "bomb.png is too large: Image size (900000000 pixels)." in error["message"]


def test_all_bad_lines_are_named_at_once(model: Path, data: Path) -> None:
    error = refused(build(model, data, "not json", sample(), "[1]", '{"a": }'), data, "E4302")
    assert error["message"].startswith("3 bad lines in calib.jsonl: line 1 ")
    assert "line 3" in error["message"]
    assert "line 4" in error["message"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (sample(answer=""), "line 1: answer is empty"),
        ({"images": ["good.png"], "prompt": "x"}, "line 1: answer is missing"),
        (sample(prompt=7), "line 1: prompt"),
        (sample(images=[1]), "line 1: images is no list of paths"),
        (
            {"image": "good.png", "conversations": [{"from": "gpt", "value": "x"}]},
            "line 1: conversations",
        ),
    ],
)
def test_wrong_field_is_named_with_an_example(
    model: Path, data: Path, line: dict[str, object], words: str
) -> None:
    error = refused(build(model, data, line), data, "E4303")
    assert words in error["message"]
    assert '"prompt": "What is shown?"' in error["why"]


def test_empty_manifest_and_too_few_samples_are_refused(model: Path, data: Path) -> None:
    assert "calib.jsonl" in refused(build(model, data, ""), data, "E4301")["message"]
    error = refused(build(model, data, sample(), more=("--samples", "9")), data, "E4311")
    assert error["message"].startswith("There are 1 usable samples")


def test_manifest_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    for name in ("nope.jsonl", "."):
        line = ("--data", tmp_path / name, "-o", tmp_path / "out")
        outcome = run("build", "--model", model, *line)
        assert (outcome.status, outcome.code) == (4, "E4301")
    assert list(tmp_path.iterdir()) == []
