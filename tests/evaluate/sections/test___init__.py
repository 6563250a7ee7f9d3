"""All chapters, from whatever was found."""

import json
from pathlib import Path

from mbq_export.evaluate.gathering import Found, gather
from mbq_export.evaluate.sections import RAW_LIMIT_BYTES, SECTIONS, document
from tests.evaluate.reported import bundle_folder, everything

EMPTY = Found(subjects=(), results=(), qualities=(), remarks=())


def test_every_chapter_has_an_anchor_of_its_own() -> None:
    sections = document(EMPTY, title="x").sections
    assert len({section.key for section in sections}) == len(SECTIONS) == len(sections)


def test_a_chapter_without_inputs_says_why_it_is_empty() -> None:
    for section in document(EMPTY, title="x").sections:
        assert section.blocks, section.key


def test_raw_data_are_the_inputs_key_by_key(tmp_path: Path) -> None:
    found = everything(tmp_path)
    raw = dict(document(found, title="x").raw)
    assert list(raw) == [
        "w3/manifest.json",
        "w3/reports/validate.json",
        "bench.json",
        "quality.json",
    ]
    assert json.loads(raw["w3/manifest.json"]) == found.subjects[0].manifest
    assert raw["quality.json"].count("\n") == 2 + len(found.qualities[0].content) - 1


def test_raw_data_end_where_the_page_would_grow_too_large(tmp_path: Path) -> None:
    large = bundle_folder(tmp_path / "large", facts={"padding": "x" * RAW_LIMIT_BYTES})
    raw = dict(document(gather([large, bundle_folder(tmp_path / "small")]), title="x").raw)
    assert raw["large/manifest.json"].startswith("left out: ")
    assert json.loads(raw["small/manifest.json"])
