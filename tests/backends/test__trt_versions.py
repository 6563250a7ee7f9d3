"""What is said to full TensorRT 10 and 11, to a double that records it: by name, never by number."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mbq_export.backends import _trt_versions, _trt_worker
from mbq_export.backends._trt_job import PLAN, PLUGINS, TIMES, Job, Refused, Result
from tests.backends import recorded_builder as double

SHAPES = {"x": ((1, 128), (1, 128), (512, 128))}


def built(major: int, folder: Path, **changes: Any) -> tuple[Result, dict[str, Any]]:
    """Build with the double in this process; return the result and what it was told."""
    said: dict[str, Any] = {}
    fixed = {
        "inputs": ("x",),
        "outputs": ("y",),
        "profile": SHAPES,
        "plugins": PLUGINS,
        "plugin_layers": {"W3Linear": double.PLUGINS},
        "workspace_mib": 256,
    }
    job = Job(
        op="build",
        workdir=folder,
        flavour="trt",
        module="tensorrt",
        link="",
        library="",
        **{**fixed, **changes},
    )
    return _trt_worker.build(double.module(major, said), job), said


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("major", "flags"), [(10, 0b10), (11, 0)])
def test_network_is_strongly_typed_where_that_is_a_choice(
    tmp_path: Path, major: int, flags: int
) -> None:
    _, said = built(major, tmp_path)
    assert said["network"] == flags


@pytest.mark.parametrize("major", [10, 11])
def test_same_job_builds_with_both_majors(tmp_path: Path, major: int) -> None:
    result, said = built(major, tmp_path)
    assert (tmp_path / PLAN).read_bytes() == b"plan"
    assert (result.plan_bytes, result.plugin_layers) == (4, {"W3Linear": 1})
    assert result.version.startswith(f"{major}.")
    assert said["library"] == PLUGINS
    assert said["profile"] == SHAPES
    assert said["workspace"] == 256 << 20
    assert "caches" not in said
    assert "flags" not in said


@pytest.mark.parametrize(("major", "number"), [(10, 22), (11, 17)])
def test_flag_is_found_by_its_name(tmp_path: Path, major: int, number: int) -> None:
    _, said = built(major, tmp_path, flags=("WEIGHT_STREAMING",))
    assert said["flags"] == [number]


def test_flag_that_a_version_lacks_is_an_option_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no builder flag FP16") as error:
        built(11, tmp_path, flags=("FP16",))
    assert error.value.kind == "trt-option"


@pytest.mark.parametrize("times", [None, b"earlier;"])
def test_times_of_a_build_are_read_and_written(tmp_path: Path, times: bytes | None) -> None:
    if times is not None:
        (tmp_path / TIMES).write_bytes(times)
    result, said = built(10, tmp_path, timing_cache=True)
    assert said["caches"] == [(times or b"", False)]
    assert (tmp_path / TIMES).read_bytes() == (times or b"") + b"measured;"
    assert result.notes == ()


@pytest.mark.parametrize(
    ("times", "why", "asked"),
    [
        (double.DAMAGED, "it is damaged", 1),
        (double.FOREIGN, "it is of another version or device", 2),
    ],
)
def test_times_that_do_not_fit_are_told_and_measured_again(
    tmp_path: Path, times: bytes, why: str, asked: int
) -> None:
    (tmp_path / TIMES).write_bytes(times)
    result, said = built(10, tmp_path, timing_cache=True)
    assert result.notes == (f"The timing cache is not used: {why}.",)
    assert len(said["caches"]) == asked
    assert said["caches"][-1] == (b"", False)
    assert (tmp_path / TIMES).read_bytes() == b"measured;"


def test_builder_without_any_timing_cache_is_an_option_that_does_not_fit() -> None:
    config = SimpleNamespace(create_timing_cache=lambda _: None)
    with pytest.raises(Refused, match="not even an empty one") as error:
        _trt_versions.read_timing_cache(config, Path(TIMES))
    assert error.value.kind == "trt-option"


def test_named_device_is_refused_by_a_builder_that_knows_its_own_only(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="cannot build for SM87") as error:
        built(11, tmp_path, cc=("SM87",))
    assert error.value.details == ("it knows only the GPU it runs on",)


def test_parser_error_of_a_version_without_function_stacks_is_told() -> None:
    error = SimpleNamespace(
        node_name=lambda: "fc", node_operator=lambda: "W3Linear", desc=lambda: "no"
    )
    assert _trt_versions.parser_error(error) == "node 'fc' (W3Linear): no"


@pytest.mark.parametrize("name", ["weight_streaming_budget_v2", "weight_streaming_budget"])
def test_streaming_budget_has_two_names(name: str) -> None:
    engine = SimpleNamespace(**{name: 0})
    _trt_versions.set_streaming_budget(engine, 7)
    assert vars(engine) == {name: 7}


def test_engine_of_a_version_without_aliases_has_none() -> None:
    assert _trt_versions.aliased_input(SimpleNamespace(), "present.0.key") is None
