"""Benchmarks of real bundles: whole, short, and interleaved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.bundle import Bundle
from mbq_export.errors import UsageError
from mbq_export.evaluate.bench import Contender, Lane, Protocol, Workload, bench, matrix
from mbq_export.evaluate.bench_report import comparison_rows, noise_error, rows
from mbq_export.report import Report
from mbq_export.runtime import open_session
from tests.runtime.bundles import rounded_bundle
from tests.tiny import load_tiny

SHORT = Protocol(repetitions=2, warmup=1)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    model = load_tiny(folder / "model")
    return {
        "fp": rounded_bundle(folder / "fp", model, scheme=None),
        "w3": rounded_bundle(folder / "w3", model),
    }


@pytest.fixture(scope="module")
def report(bundles: dict[str, Bundle]) -> Report:
    """One report that several tests look at: two bundles, one also on torch, two workloads."""
    contenders = [Contender(bundle=b, name=name, threads=1) for name, b in bundles.items()]
    contenders.append(Contender(bundle=bundles["w3"], name="w3 torch", backend="torch"))
    return bench(contenders, matrix(new_tokens=(4,), images=(0, 1)), protocol=SHORT)


def lane(bundle: Bundle, workload: Workload, folder: Path) -> Lane:
    return Lane(
        Contender(bundle=bundle, name="w3"), open_session(bundle, threads=1), workload, folder
    )


def test_every_bundle_runs_every_workload_as_often_as_asked(report: Report) -> None:
    runs = report.details["runs"]
    assert [(run["name"], run["workload"]["images"]) for run in runs] == [
        ("fp", 0), ("w3", 0), ("w3 torch", 0), ("fp", 1), ("w3", 1), ("w3 torch", 1)
    ]  # fmt: skip
    assert {run["workload"]["requests"] for run in runs} == {2}
    assert {run["workload"]["output_tokens"] for run in runs} == {4}
    assert {run["workload"]["visual_tokens"] for run in runs} == {0, 78}
    assert {run["bundle"]["scheme"] for run in runs} == {"none", "w3a16"}


def test_phases_add_up_to_the_time_of_a_request(report: Report) -> None:
    for run in report.details["runs"]:
        name = f"{run['name']}/{run['workload']['name']}"
        ttft, e2e = report[f"{name}/ttft"].samples, report[f"{name}/e2e"].samples
        before = [
            sum(parts)
            for parts in zip(
                *(
                    report[f"{name}/{phase}"].samples
                    for phase in ("preprocess", "merge", "prefill")
                ),
                strict=True,
            )
        ]
        assert all(whole >= part > 0 for whole, part in zip(ttft, before, strict=True))
        assert all(whole > part for whole, part in zip(e2e, ttft, strict=True))
        assert len(report[f"{name}/itl"].samples) == 2 * 3


def test_others_are_compared_with_the_first(report: Report) -> None:
    pairs = {(row["baseline"], row["bundle"]) for row in report.details["comparison"]}
    assert pairs == {("fp", "w3"), ("fp", "w3 torch")}
    assert all(row["ratio"] > 0 for row in report.details["comparison"])


def test_the_graph_of_a_quantized_bundle_is_read_faster_at_the_same_bandwidth(
    report: Report,
) -> None:
    roofs = {run["name"]: run["roofline"] for run in report.details["runs"]}
    assert roofs["w3"]["graph"]["bytes_per_token"] < roofs["fp"]["graph"]["bytes_per_token"]
    assert roofs["w3"]["graph"]["percent"] > 0
    assert roofs["w3 torch"]["graph"] is None
    assert roofs["w3 torch"]["graph_why"] == "the torch backend runs no graph"
    assert roofs["w3 torch"]["packed"] is not None


def test_the_report_says_whether_it_may_be_believed(report: Report) -> None:
    noise = report.details["noise"]
    assert report.valid == (not noise["reasons"])
    error = noise_error(replace(report, valid=False, details={"noise": {"reasons": ["a reason"]}}))
    assert error is not None
    assert (error.code, str(error.message)) == ("E1301", "The figures are too noisy: a reason.")
    assert noise_error(replace(report, valid=True)) is None


def test_the_json_reads_back_and_every_null_has_a_reason(report: Report, tmp_path: Path) -> None:
    report.write(tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert Report.read(tmp_path / "bench.json").as_json() == found
    assert found["schema"] == "mbq-export/bench@1"

    def unexplained(value: object, path: str) -> list[str]:
        if isinstance(value, list):
            return [p for i, v in enumerate(value) for p in unexplained(v, f"{path}[{i}]")]
        if not isinstance(value, dict):
            return []
        return [
            p
            for key, inner in value.items()
            for p in (
                [f"{path}.{key}"]
                if inner is None and not value.get(f"{key}_why")
                else unexplained(inner, f"{path}.{key}")
            )
        ]

    assert unexplained({**found, "measurements": [], "checks": []}, "") == []


def test_tables_have_a_row_per_bundle_and_test(report: Report) -> None:
    tests = [row[1] for row in rows(report) if row[0] == "w3"]
    assert tests == [
        "pp8",
        "tg4",
        "itl",
        "ttft",
        "e2e",
        "vit@1",
        "pp86",
        "tg4",
        "itl",
        "ttft",
        "e2e",
    ]
    assert all(row[5].endswith("x") for row in comparison_rows(report))


def test_a_prompt_is_filled_to_the_tokens_asked_for(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    found = lane(bundles["w3"], Workload(new_tokens=2, prompt_tokens=40), tmp_path).run(keep=True)
    assert (found.prompt_tokens, found.visual_tokens, found.output_tokens) == (40, 78, 2)


def test_a_prompt_cannot_be_shorter_than_its_template(
    bundles: dict[str, Bundle], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"-p 1 is too short") as caught:
        lane(bundles["w3"], Workload(prompt_tokens=1), tmp_path)
    assert caught.value.code == "E2017"
    assert "one word and the chat template take 3 tokens" in caught.value.why


def test_a_workload_that_does_not_fit_names_the_bundle(bundles: dict[str, Bundle]) -> None:
    with pytest.raises(UsageError, match=r"the bundle allows 512") as caught:
        bench([Contender(bundle=bundles["w3"], name="w3", threads=1)], [Workload(new_tokens=600)])
    assert (caught.value.code, caught.value.where) == ("E2009", ["w3"])


def test_bundles_take_turns_and_warm_up_does_not_count(
    bundles: dict[str, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    run = Lane.run

    def watched(self: Lane, *, keep: bool) -> object:
        order.append((self.contender.name, keep))
        return run(self, keep=keep)

    monkeypatch.setattr(Lane, "run", watched)
    contenders = [Contender(bundle=bundles["w3"], name=name, threads=1) for name in "ab"]
    bench(contenders, [Workload(new_tokens=1, images=0)], protocol=SHORT)
    opening, turns = order[:2], order[2:]
    assert opening == [("a", False), ("b", False)]
    assert turns == [
        ("a", False), ("b", False), ("b", True), ("a", True), ("a", True), ("b", True)
    ]  # fmt: skip


def test_progress_counts_every_request(bundles: dict[str, Bundle]) -> None:
    seen: list[tuple[int, int]] = []
    contender = Contender(bundle=bundles["w3"], name="w3", threads=1)
    bench(
        [contender],
        [Workload(new_tokens=1, images=0)],
        protocol=SHORT,
        progress=lambda done, total, _note="": seen.append((done, total)),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_picture_of_ones_own_is_asked_about(bundles: dict[str, Bundle], tmp_path: Path) -> None:
    samples = tmp_path / "own"
    samples.mkdir()
    lane(bundles["w3"], Workload(images=1), samples)  # draws a picture there
    (picture,) = samples.glob("*.png")
    found = lane(bundles["w3"], Workload(new_tokens=1, images=2, picture=picture), tmp_path)
    assert found.run(keep=True).visual_tokens == 2 * 37  # of several pictures, one tile each
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("names", [(), ("a", "a")])
def test_bundles_need_names_of_their_own(
    bundles: dict[str, Bundle], names: tuple[str, ...]
) -> None:
    contenders = [Contender(bundle=bundles["w3"], name=name) for name in names]
    with pytest.raises(UsageError, match=r"Bundles to compare are called"):
        bench(contenders)


def test_nothing_repeated_measures_nothing() -> None:
    with pytest.raises(UsageError, match=r"0 repetitions after 3 warm-up") as caught:
        Protocol(repetitions=0)
    assert caught.value.code == "E2017"


def test_lists_make_a_matrix() -> None:
    found = matrix(prompt_tokens=(16, 32), new_tokens=(1,), images=(0, 1))
    assert [(w.images, w.prompt_tokens, w.new_tokens) for w in found] == [
        (0, 16, 1), (0, 32, 1), (1, 16, 1), (1, 32, 1)
    ]  # fmt: skip
