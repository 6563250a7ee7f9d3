"""One page, Markdown and CSV: complete, in order, and nothing from outside is ever markup."""

import csv
import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mbq_export.bundle import Bundle
from mbq_export.errors import MbqError
from mbq_export.evaluate.gathering import Found, gather
from mbq_export.evaluate.render import as_csv, as_html, as_markdown
from tests.evaluate.browser import ABSENT, Tab, browser_path, open_tab
from tests.evaluate.reported import (
    HOSTILE,
    benchmark,
    bundle_folder,
    everything,
    found_of,
    numeric,
    quality,
    validation,
    write,
)

SECTIONS = [
    "Provenance",
    "Quantization",
    "Validation",
    "Latency",
    "Roofline",
    "Memory",
    "Energy",
    "Accuracy",
    "Comparison",
    "Engines",
    "Warnings and skipped",
]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; closing tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return everything(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A model, a bundle and results that try to be markup, commands and terminal codes."""
    root = tmp_path_factory.mktemp("hostile")
    folder = bundle_folder(
        root / "<b>bold</b>",
        model=f"{HOSTILE}\x1b[31m",
        facts={
            "skipped_engines": {"=1+1": "</table><script>"},
            "gate_override": {"gate": "warn", "reason": HOSTILE},
        },
    )
    report = validation(name=HOSTILE, worst=1.0)
    check = replace(report.checks[0], name=HOSTILE, why="<img src=x onerror=alert(1)>", ok=False)
    replace(report, checks=(check,)).write(root / "validate.json")
    benchmark(("=cmd", "@sum<i>"), reasons=("</pre>`x`|y",)).write(root / "bench.json")
    table = quality()
    table["rows"][0]["kinds"] = {"<script>kind": {"accuracy": 0.5}}
    return gather(
        [folder, root / "validate.json", root / "bench.json", write(root / "q.json", table)]
    )


def test_sections_come_in_the_order_of_reading(found: Found) -> None:
    page = as_html(found, title="A report")
    assert re.findall(r'<section id="\w+">\s*<h2>([^<]+)</h2>', page) == [*SECTIONS, "Raw data"]
    assert re.findall(r"^## (.+)$", as_markdown(found, title="A report"), re.MULTILINE) == SECTIONS


def test_the_page_says_what_the_inputs_say(found: Found) -> None:
    text = Page(as_html(found, title="A report")).text
    for said in (
        "All 3 checks passed, 1 not run",
        "w3a16 g128 mbq",
        "mbq-export build --wbits 3",
        "1970-01-01 00:00 UTC",
        "not verified: built without a GPU",
        "Energy: not measured: no energy counter is read",
        "Test CPU",
        "answer was not measured",
        "full precision",
    ):
        assert said in text, said


def test_the_page_loads_nothing_and_runs_nothing(found: Found) -> None:
    page = as_html(found, title="A report")
    parsed = Page(page)
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page
    assert not {"script", "link", "iframe", "img", "object", "form"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert {
        value for name, value in parsed.attributes if name == "href" and value[:1] != "#"
    } == set()
    assert "url(" not in page
    assert "@import" not in page


def test_every_drawing_has_words(found: Found) -> None:
    page = as_html(found, title="A report")
    drawings = re.findall(r'<svg[^>]*role="img"[^>]*aria-label="([^"]{20,})"', page)
    assert len(drawings) == page.count("<svg ") >= 10


def test_the_raw_data_is_embedded_as_it_was(found: Found) -> None:
    page = Page(as_html(found, title="A report"))
    assert '"sha256":' in page.text
    (result,) = found.of_kind("validate")
    start = page.text.index('"kind": "validate"')
    start = page.text.rindex("{\n", 0, start)
    document, _ = json.JSONDecoder().raw_decode(page.text[start:])
    assert document == result.report.as_json()


def test_the_same_inputs_give_the_same_bytes(found: Found) -> None:
    for form in (as_html, as_markdown, as_csv):
        assert form(found, title="x") == form(found, title="x")


@pytest.mark.parametrize(
    "report", [validation(), benchmark(), benchmark(("w3",))], ids=["validate", "bench", "one run"]
)
def test_what_was_not_given_is_said_to_be_missing(report: Any) -> None:
    text = Page(as_html(found_of(report), title="x")).text
    assert "Provenance: not measured: no bundle was given" in text
    assert "Quantization: not measured: no bundle was given" in text
    assert "Accuracy: not measured: no task was run" in text
    assert ("Latency: not measured: no benchmark was given" in text) == (report.kind == "validate")
    assert ("Validation: not measured" in text) == (report.kind == "bench")


def test_nothing_hostile_becomes_markup(hostile: Found) -> None:
    page = as_html(hostile, title=HOSTILE)
    parsed = Page(page)
    assert not {"script", "b", "i", "img"} & set(parsed.tags)
    assert "onerror" not in dict(parsed.attributes)
    assert HOSTILE in parsed.text
    assert "\x1b" not in page


def test_nothing_hostile_becomes_markdown(hostile: Found) -> None:
    told = as_markdown(hostile, title=HOSTILE)
    assert "<" not in told
    assert "\x1b" not in told
    for block in re.findall(r"(?:^\|.*\|$\n?)+", told, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
        assert len(widths) == 1, block
    assert re.findall(r"(?<!\\)`", told) == []


def test_no_cell_of_csv_is_run_by_a_spreadsheet(hostile: Found) -> None:
    cells = [cell for row in csv.reader(io.StringIO(as_csv(hostile, title=""))) for cell in row]
    run = [cell for cell in cells if cell[:1] in {"=", "+", "-", "@", "\t"} and not _is_float(cell)]
    assert run == []
    assert "'=cmd" in cells
    assert "'@sum<i>" in cells


def _is_float(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def test_csv_has_one_line_per_test_and_statistic(found: Found) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(found, title=""))))
    keys = [(r["source"], r["subject"], r["test"], r["statistic"]) for r in rows]
    assert len(keys) == len(set(keys))
    median = next(r for r in rows if r["test"].endswith("/decode") and r["statistic"] == "p50")
    assert (median["subject"], median["unit"], float(median["value"])) == ("fp", "ms", 4.0)
    few = next(r for r in rows if r["statistic"] == "p99" and "decode" in r["test"])
    assert (few["value"], few["why"]) == ("", "9 samples, needs 100")
    verdict = next(
        r for r in rows if r["test"].startswith("tokens parity.logits") and r["statistic"] == "pass"
    )
    assert (verdict["value"], verdict["why"]) == ("", "no positions")
    assert any(
        r["subject"] == "seed0 plain rtn w3-g128 0" and r["test"] == "KL answer" for r in rows
    )


def test_a_model_of_eighty_layers_stays_below_a_megabyte(tmp_path: Path) -> None:
    report = replace(validation(), details={"layers": numeric(80).as_json(), "first_bad": None})
    folder = bundle_folder(tmp_path / "large", layers=80, report=report)
    found = gather([folder, bundle_folder(tmp_path / "other", layers=80)])
    assert len(as_html(found, title="x").encode()) < 1_000_000


def test_raw_data_beyond_the_limit_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3", facts={"padding": "x" * 500_000})
    text = Page(as_html(gather([folder]), title="x")).text
    assert re.search(r"left out: 50\d kB, see the file", text)


def changed(value: Any, chance: random.Random) -> Any:
    """The same JSON with some values replaced by values of other kinds."""
    if chance.random() < 0.01:
        return chance.choice(
            [None, "nan", -1, 1e99, [], {}, [1], {"a": 1}, True, "x" * 50, ["nan"]]
        )
    if isinstance(value, dict):
        return {key: changed(inner, chance) for key, inner in value.items()}
    return [changed(inner, chance) for inner in value] if isinstance(value, list) else value


def mutated(document: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A document that keeps its keys and what tells its kind."""
    kept = {"schema", "kind", "files"}
    return {
        key: value if key in kept else changed(value, chance) for key, value in document.items()
    }


@pytest.mark.parametrize("seed", range(40))
def test_no_shape_of_json_breaks_a_report(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    folder = bundle_folder(tmp_path / "w3", report=validation(worst=1.0))
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["files"]:
        path = folder / record["path"]
        write(path, mutated(json.loads(path.read_text()), chance))
        record["bytes"] = path.stat().st_size
    write(folder / "manifest.json", mutated(manifest, chance))
    inputs = [folder]
    for name, content in (
        ("validate.json", validation(worst=1.0).as_json()),
        ("bench.json", benchmark(reasons=("x",)).as_json()),
        ("quality.json", quality()),
    ):
        inputs.append(write(tmp_path / name, mutated(content, chance)))
    readable = []
    for path in inputs:
        try:
            gather([path])
        except MbqError:
            continue
        readable.append(path)
    found = gather(readable)
    for form in (as_html, as_markdown, as_csv):
        assert form(found, title="x").encode()
    Page(as_html(found, title="x"))


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    if browser_path() is None:
        pytest.skip(ABSENT)
    with open_tab() as opened:
        yield opened


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_shows_the_page_without_scrolling_sideways(
    tab: Tab, found: Found, hostile: Found, tmp_path: Path, width: int
) -> None:
    for name, inputs in (("plain", found), ("hostile", hostile)):
        page = tmp_path / f"{name}.html"
        page.write_text(as_html(inputs, title="A report " * 20))
        tab.open(page, width=width)
        assert tab.value("document.documentElement.scrollWidth") == width
        assert tab.value("document.querySelectorAll('svg').length") >= 10
        assert tab.requests == [page.as_uri()]


def test_a_browser_uses_dark_colours_where_they_are_wanted(
    tab: Tab, found: Found, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(as_html(found, title="A report"))
    background = "getComputedStyle(document.body).backgroundColor"
    shown = []
    for dark in (False, True):
        tab.open(page, width=1200, dark=dark)
        red, green, blue = map(int, re.findall(r"\d+", tab.value(background)))
        shown.append(red + green + blue)
    assert shown[0] > 600
    assert shown[1] < 150


def test_a_browser_runs_no_script_that_got_into_the_page(
    tab: Tab, found: Found, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    planted = "<script>document.title = 'ran'</script><img src=https://example.org/x.png>"
    page.write_text(as_html(found, title="A report").replace("</body>", f"{planted}</body>"))
    tab.open(page, width=400)
    assert tab.value("document.title") == "A report"
    assert tab.loaded == [page.as_uri()]


def test_the_bundle_in_a_report_is_left_as_it_was(tmp_path: Path) -> None:
    folder = bundle_folder(tmp_path / "w3", report=validation())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    as_html(gather([folder]), title="x")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert Bundle.open(folder, verify=True)
