"""Operators and cache of the decoder for engines, by what the targets read."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS
from mbq_export.backends.base import Availability, Backend
from mbq_export.errors import UsageError
from mbq_export.export import GraphForm
from mbq_export.export.profile import profile_for
from mbq_export.native import LocalGpu
from mbq_export.pipeline import request as request_module
from mbq_export.pipeline.engine_options import EngineOptions
from mbq_export.pipeline.levels import Level, engine_level, growing_sizes
from mbq_export.pipeline.plan import Plan, make_plan
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.stages import graph_forms
from mbq_export.target import Target

ORIN = Target.parse("orin:trt")
CARD = Target.parse("rtx4090:rtx")
QDQ = GraphForm(lowering="qdq", target="trt", dtype="fp16")


@pytest.mark.parametrize(
    ("version", "level", "profile"),
    [
        ((10, 3), Level(op_level="opset20", kv="concat"), "opset21"),
        ((10, 13), Level(op_level="opset20", kv="concat"), "opset21"),
        ((10, 14), Level(op_level="opset23-attention", kv="concat"), "opset23-attention"),
        ((10, 15), Level(op_level="auto", kv="static"), "opset24"),
        ((11, 4), Level(op_level="auto", kv="static"), "opset24"),
    ],
)
def test_each_version_gets_the_most_that_it_reads(
    version: tuple[int, int], level: Level, profile: str
) -> None:
    target = replace(ORIN, version=version)
    assert engine_level("auto", None, targets=[target]) == level
    found = profile_for(replace(QDQ, op_level=level.op_level, kv=level.kv))
    assert (found.name, found.level) == (profile, target.op_level)


def test_one_graph_serves_the_oldest_of_several_targets() -> None:
    level = engine_level("auto", None, targets=[CARD, ORIN])
    assert level == Level(op_level="opset20", kv="concat")


def test_without_targets_graphs_are_for_the_newest_or_as_asked_for() -> None:
    assert engine_level("auto", None, targets=[]) == Level(op_level="auto", kv="static")
    assert engine_level("opset20", None, targets=[]) == Level(op_level="opset20", kv="concat")


def test_a_lower_level_and_the_other_cache_can_be_asked_for() -> None:
    assert engine_level("auto", "concat", targets=[CARD]) == Level(op_level="auto", kv="concat")
    assert engine_level("opset20", None, targets=[CARD]).op_level == "opset20"


def test_a_level_above_the_targets_is_refused_with_what_they_read() -> None:
    with pytest.raises(UsageError) as caught:
        engine_level("opset23", None, targets=[CARD, ORIN])
    assert str(caught.value) == (
        "MBQ-E2012: orin:trt does not read op level opset23.\n"
        "  why     version 10.3 of its parser reads up to opset21\n"
        "  fix     --op-level auto"
    )


@pytest.mark.parametrize(
    ("op_level", "kv", "code", "words"),
    [
        ("opset19", None, "E2001", "Unknown op level 'opset19'"),
        ("auto", "paged", "E2001", "Unknown kv 'paged'"),
        ("auto", "static", "E2002", "Op level opset20 has no static cache"),
        ("opset20", "static", "E2002", "Op level opset20 has no static cache"),
    ],
)
def test_what_does_not_exist_is_refused(
    op_level: str, kv: str | None, code: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        engine_level(op_level, kv, targets=[ORIN])
    assert caught.value.code == code


def test_sizes_of_a_growing_cache_add_up_at_every_end() -> None:
    sizes = growing_sizes(EngineOptions(opt_tokens=2).decoder_sizes(1000), 1000)
    new, past = sizes["sequence_length"], sizes["past_sequence_length"]
    total = sizes["total_sequence_length"]
    assert (past.smallest, past.typical, past.largest) == (1, 500, 1000)
    assert (total.smallest, total.typical, total.largest) == (2, 502, 1512)
    for end in ("smallest", "typical", "largest"):
        assert getattr(total, end) == getattr(new, end) + getattr(past, end)
    small = growing_sizes(EngineOptions().decoder_sizes(1), 1)["past_sequence_length"]
    assert (small.smallest, small.typical, small.largest) == (1, 1, 1)


class Installed:
    """The registry of backends on a device with some version of TensorRT."""

    def __init__(self, version: str) -> None:
        self.version = version

    def __getitem__(self, flavour: str) -> Backend:
        told = Availability(ok=True, found=f"trt {self.version}", needed="", version=self.version)
        return replace(BACKENDS[flavour], available=lambda: told)


def planned(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str, **options: object) -> Plan:
    """Plan a build on an Orin."""
    gpu = LocalGpu(name="Orin", sm=87, driver="540.4")
    monkeypatch.setattr(request_module, "BACKENDS", Installed(version))
    monkeypatch.setattr(request_module, "local_gpu", lambda: gpu)
    fixed = {"model": "tiny-llava-ov", "out": folder / "out", "samples": 4, "lowering": "qdq"}
    return make_plan(BuildRequest(targets=("orin:trt",), **{**fixed, **options}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "op_level", "kv"),
    [
        ("10.3.0.26", "opset20", "concat"),
        ("10.13.3.9", "opset20", "concat"),
        ("10.14.1.48", "opset23-attention", "concat"),
        ("10.15.1.29", "auto", "static"),
    ],
)
def test_plan_on_a_device_follows_the_version_that_is_installed(
    version: str, op_level: str, kv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(monkeypatch, tmp_path, version)
    form = graph_forms(plan)[-1]
    assert (form.target, form.op_level, form.kv) == ("trt", op_level, kv)
    assert plan.fingerprint["graphs"]["op_level"] == op_level  # type: ignore[index]
    assert plan.fingerprint["graphs"]["kv"] == kv  # type: ignore[index]


def test_plan_refuses_a_level_that_the_device_does_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="does not read op level opset24") as caught:
        planned(monkeypatch, tmp_path, "10.3.0.26", op_level="opset24")
    assert caught.value.code == "E2012"


def test_plan_refuses_a_version_older_than_any_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError) as caught:
        planned(monkeypatch, tmp_path, "8.6.2")
    assert str(caught.value) == (
        "MBQ-E2012: trt 8.6.2 reads no graph that this release writes for orin:trt.\n"
        "  why     graphs are written for version 10.3 and newer\n"
        "  fix     install version 10.3 or newer\n"
        "  fix     --target cpu: the bundle runs on ONNX Runtime"
    )
