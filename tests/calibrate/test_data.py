"""Which samples are chosen, what is refused, and what is said about the tokens."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mbq_export.calibrate.data import (
    CalibrationData,
    TokenShares,
    encode,
    pictures_of,
    read_manifest,
    token_shares,
)
from mbq_export.calibrate.manifest import Sample
from mbq_export.calibrate.shapes import calibration_samples, write_manifest
from mbq_export.errors import FormatError, UsageError
from mbq_export.families.base import ANSWER, PROMPT, VISION
from mbq_export.families.inputs import ModelInputs, Processor
from mbq_export.families.llava_onevision import FAMILY
from mbq_export.families.locate import shipped_folder
from tests.families.test_pictures import bomb


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(shipped_folder(), FAMILY)


def paint(folder: Path, name: str, seed: int, size: tuple[int, int] = (8, 8)) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    (folder / name).parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / name)
    return name


def manifest(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(number: int, *images: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"s{number}",
        "images": list(images),
        "prompt": f"is {number} red ?",
        "answer": "no",
    } | changes


def numbered(folder: Path, count: int) -> Path:
    return manifest(folder, *(line(n, paint(folder, f"{n}.png", n)) for n in range(count)))


def ids(data: CalibrationData) -> list[str]:
    return [sample.id for sample in data.samples + data.held_out]


def test_selection_follows_the_permutation_of_the_seed(tmp_path: Path) -> None:
    path = numbered(tmp_path, 12)
    for seed in (0, 5):
        data = read_manifest(path, samples=6, held_out=3, seed=seed)
        order = np.random.default_rng(seed).permutation(12)
        assert ids(data) == [f"s{n}" for n in order[:9]]
        assert (len(data.samples), len(data.held_out)) == (6, 3)


def test_same_manifest_and_seed_give_the_same_hash_wherever_the_files_lie(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    first, second = (numbered(folder, 8) for folder in folders)
    found = read_manifest(first, samples=5, held_out=2)
    assert read_manifest(second, samples=5, held_out=2).sha256 == found.sha256
    assert read_manifest(second, samples=5, held_out=2, seed=1).sha256 != found.sha256
    assert read_manifest(second, samples=4, held_out=3).sha256 != found.sha256
    paint(folders[1], f"{found.samples[0].id[1:]}.png", 99)
    assert read_manifest(second, samples=5, held_out=2).sha256 != found.sha256


def test_no_picture_is_both_used_and_held_out_whatever_its_file_is(tmp_path: Path) -> None:
    for number in range(6):
        paint(tmp_path, f"{number}.png", number)
        Image.open(tmp_path / f"{number}.png").save(tmp_path / f"{number}.bmp")
    lines = [line(n, f"{n}.png") for n in range(6)] + [line(6 + n, f"{n}.bmp") for n in range(6)]
    data = read_manifest(manifest(tmp_path, *lines), samples=4, held_out=1)
    used, held = (
        {Path(str(i)).stem for s in part for i in s.images}
        for part in (data.samples, data.held_out)
    )
    assert held
    assert not used & held


@pytest.mark.parametrize(("samples", "held_out"), [(5, 4), (9, 0), (8, 1)])
def test_fewer_samples_than_asked_for_is_an_error(
    tmp_path: Path, samples: int, held_out: int
) -> None:
    with pytest.raises(
        FormatError, match=f"There are 8 usable samples, {samples} \\+ {held_out} held"
    ) as caught:
        read_manifest(numbered(tmp_path, 8), samples=samples, held_out=held_out)
    assert caught.value.code == "E4311"
    assert caught.value.fix[0] == f"--samples {8 - held_out}"


def test_duplicates_are_counted_in_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paint(tmp_path, "0.png", 0)
    with caplog.at_level(logging.WARNING):
        read_manifest(manifest(tmp_path, *[line(0, "0.png")] * 4), samples=4, held_out=0)
    assert "MBQ-W4311: 3 of 4 calibration samples are duplicates (75 %)" in caplog.text


def test_text_alone_is_refused_unless_asked_for(tmp_path: Path) -> None:
    path = manifest(tmp_path, *(line(n) for n in range(4)))
    with pytest.raises(FormatError, match="no picture") as caught:
        read_manifest(path, samples=2, held_out=1)
    assert caught.value.code == "E4308"
    assert any("--text-only-ok" in fix for fix in caught.value.fix)
    assert len(read_manifest(path, samples=2, held_out=1, text_only_ok=True).samples) == 2


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "folder"])
def test_unusable_picture_is_named_with_its_line(tmp_path: Path, kind: str) -> None:
    path = numbered(tmp_path, 5)
    bad = tmp_path / "3.png"
    content = bad.read_bytes()
    bad.unlink()
    if kind == "folder":
        bad.mkdir()
    elif kind != "missing":
        bad.write_bytes({"empty": b"", "text": b"hello", "truncated": content[:-60]}[kind])
    with pytest.raises(
        FormatError, match=r"1 sample has pictures that cannot be used: line 4: .*3\.png"
    ) as caught:
        read_manifest(path, samples=3, held_out=2)
    assert caught.value.code == "E4304"
    assert caught.value.where == ["data.jsonl"]
    assert "--skip-bad 1" in caught.value.fix


def test_bad_pictures_are_skipped_up_to_the_number_allowed(tmp_path: Path) -> None:
    path = numbered(tmp_path, 12)
    for number in (2, 7):
        (tmp_path / f"{number}.png").write_bytes(b"x")
    data = read_manifest(path, samples=8, held_out=2, skip_bad=2)
    assert data.skipped == 2
    assert not {"s2", "s7"} & set(ids(data))
    with pytest.raises(FormatError, match="2 samples have pictures"):
        read_manifest(path, samples=8, held_out=2, skip_bad=1)


def test_five_bad_pictures_are_named_in_one_error(tmp_path: Path) -> None:
    path = manifest(tmp_path, *(line(n, f"{n}.png") for n in range(9)))
    with pytest.raises(FormatError) as caught:
        read_manifest(path, samples=4, held_out=0)
    assert caught.value.message.count("line ") == 5


@pytest.mark.parametrize(
    "image", ["../secret.png", "/etc/passwd", "https://example.org/x.png", "link.png", "file:x"]
)
def test_path_that_leaves_the_folder_is_never_skipped(tmp_path: Path, image: str) -> None:
    paint(tmp_path, "secret.png", 0)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to("../secret.png")
    path = manifest(folder, line(0, image))
    with pytest.raises(FormatError) as caught:
        read_manifest(path, samples=1, held_out=0, skip_bad=9)
    assert caught.value.code == "E4305"
    assert caught.value.where == ["data.jsonl", "line 1"]


def test_pipe_in_place_of_a_picture_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(FormatError, match="is a pipe or device"):
        read_manifest(manifest(tmp_path, line(0, "x.png")), samples=1, held_out=0)


def test_picture_too_large_keeps_its_code(tmp_path: Path) -> None:
    bomb(tmp_path / "x.png", 30_000, 30_000)
    with pytest.raises(FormatError, match="900000000 pixels") as caught:
        read_manifest(manifest(tmp_path, line(0, "x.png")), samples=1, held_out=0)
    assert caught.value.code == "E4306"


def test_builtin_set_equals_its_written_manifest(tmp_path: Path, processor: Processor) -> None:
    builtin = read_manifest("builtin:shapes", samples=6, held_out=2)
    assert [sample.id for sample in builtin.samples] == [e.id for e in calibration_samples(8)[:6]]
    written = read_samples_in_order(write_manifest(tmp_path, calibration_samples(8)))
    for found, expected in zip(
        encode(builtin.samples, processor), encode(written, processor), strict=False
    ):
        assert np.array_equal(found.input_ids, expected.input_ids)
        assert np.array_equal(found.pixel_values, expected.pixel_values)


def read_samples_in_order(path: Path) -> list[Sample]:
    chosen = read_manifest(path, samples=8, held_out=0).samples
    return sorted(chosen, key=lambda sample: sample.line)


def test_builtin_captions_only_ask_for_descriptions() -> None:
    data = read_manifest("builtin:shapes-captions", samples=4, held_out=1)
    assert {sample.prompt for sample in data.samples} == {"describe the image ."}
    assert (
        len(
            {
                sample.prompt
                for sample in read_manifest("builtin:shapes", samples=4, held_out=0).samples
            }
        )
        > 1
    )


def test_unknown_builtin_set_lists_the_known() -> None:
    with pytest.raises(UsageError, match="Unknown data set 'builtin:coco'") as caught:
        read_manifest("builtin:coco")
    assert "builtin:shapes-captions" in caught.value.why


def test_encoding_keeps_order_and_earlier_turns(processor: Processor) -> None:
    sample = Sample(
        id="1",
        images=(Image.new("RGB", (48, 48)),),
        prompt="is there a star ?",
        answer="no",
        earlier=(("what is at the top ?", "nothing"),),
    )
    calls: list[tuple[int, int]] = []
    encoded = encode(
        [sample, replace(sample, earlier=())],
        processor,
        progress=lambda i, n, _="": calls.append((i, n)),
    )
    assert [processor.decode(x.input_ids[x.token_classes == ANSWER]) for x in encoded] == [
        "nothing no",
        "no",
    ]
    assert calls == [(1, 2), (2, 2)]


def test_pictures_of_a_sample_are_rgb(tmp_path: Path) -> None:
    Image.new("L", (3, 4)).save(tmp_path / "x.png")
    sample = Sample(
        id="1", images=(tmp_path / "x.png", Image.new("RGBA", (2, 2))), prompt="p", answer="a"
    )
    assert [(picture.mode, picture.size) for picture in pictures_of(sample)] == [
        ("RGB", (3, 4)),
        ("RGB", (2, 2)),
    ]


def test_long_answers_are_cut_and_counted(
    processor: Processor, caplog: pytest.LogCaptureFixture
) -> None:
    samples = read_manifest("builtin:shapes-captions", samples=4, held_out=0).samples
    whole = encode(samples, processor)
    with caplog.at_level(logging.WARNING):
        cut = encode(samples, processor, max_tokens=85)
    for found, expected in zip(cut, whole, strict=True):
        assert np.array_equal(found.input_ids, expected.input_ids[:85])
        assert np.array_equal(found.token_classes, expected.token_classes[:85])
    assert "MBQ-W4312" in caplog.text


def test_pictures_are_never_cut(processor: Processor) -> None:
    samples = read_manifest("builtin:shapes", samples=1, held_out=0).samples
    with pytest.raises(FormatError, match="pictures alone do not fit into 40") as caught:
        encode(samples, processor, max_tokens=40)
    assert caught.value.code == "E4313"


def test_sample_without_answer_tokens_is_named(processor: Processor) -> None:
    samples = read_manifest("builtin:shapes", samples=2, held_out=0).samples
    with pytest.raises(FormatError, match="No answer token is left") as caught:
        encode(samples[1:], processor, max_tokens=79)
    assert caught.value.code == "E4309"
    assert caught.value.where == [f"sample {samples[1].id}"]


def classes(**counts: int) -> ModelInputs:
    kinds = np.repeat(np.array([VISION, PROMPT, ANSWER], np.int8), list(counts.values()))
    empty = np.zeros((0, 2), np.int64)
    return ModelInputs(
        input_ids=np.zeros(len(kinds), np.int64),
        pixel_values=np.zeros((0, 3, 1, 1), np.float32),
        image_sizes=empty,
        tiles_per_image=empty[:, 0],
        token_classes=kinds,
    )


def test_token_shares_are_counted_over_all_samples() -> None:
    found = token_shares(
        [classes(vision=60, prompt=12, answer=8), classes(vision=11, prompt=0, answer=9)]
    )
    assert found == TokenShares(vision=71, prompt=12, answer=17)
    assert str(found) == "vision 71 % · prompt 12 % · answer 17 %"


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ({"vision": 4, "prompt": 48, "answer": 48}, "MBQ-W4310: vision tokens are 4.0 %"),
        ({"vision": 96, "prompt": 2, "answer": 2}, "MBQ-W4310: text tokens are 4.0 %"),
        ({"vision": 50, "prompt": 25, "answer": 25}, ""),
    ],
)
def test_share_below_five_percent_is_warned_of(
    counts: dict[str, int], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        token_shares([classes(**counts)])
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)
