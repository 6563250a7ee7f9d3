"""Requests that cannot work, refused before TensorRT sees them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbq_export.backends import _trt_preflight
from mbq_export.backends.base import BuilderOptions, EngineGraph, EngineRequest
from mbq_export.errors import FormatError, MbqError, ResourceError, UsageError
from mbq_export.native import LocalGpu
from mbq_export.target import Target
from tests.backends import trt_graphs

RTX4090 = LocalGpu(name="GeForce RTX 4090", sm=89, driver="580.95")


def request(*targets: str, **changes: object) -> EngineRequest:
    target, *also = map(Target.parse, targets)
    return EngineRequest(graphs=(), target=target, also=tuple(also), out=Path("out"), **changes)


def refusal(flavour: str, wanted: EngineRequest) -> MbqError:
    def check() -> None:
        _trt_preflight.check_options(flavour, wanted.devices, wanted.options)
        _trt_preflight.check_device(flavour, wanted.target, RTX4090)

    with pytest.raises(MbqError) as error:
        check()
    return error.value


def test_several_devices_share_an_ahead_of_time_plan_only() -> None:
    both = request("sm86:rtx", "sm89:rtx")
    _trt_preflight.check_options("rtx", both.devices, both.options)
    error = refusal("trt", request("sm89:trt", "sm120:trt"))
    assert (error.code, error.exit_status) == ("E2012", 2)
    assert "sm89:trt, sm120:trt" in error.message


def test_second_device_of_another_flavour_is_refused() -> None:
    assert refusal("rtx", request("sm86:rtx", "sm89:trt")).code == "E2012"


def test_timing_cache_goes_with_builds_that_time() -> None:
    options = BuilderOptions(timing_cache=Path("times"))
    assert refusal("rtx", request("sm89:rtx", options=options)).code == "E2002"
    _trt_preflight.check_options("trt", request("sm89:trt").devices, options)


def test_full_tensorrt_builds_on_the_device_only() -> None:
    _trt_preflight.check_device("trt", Target.parse("sm89:trt"), RTX4090)
    error = refusal("trt", request("orin:trt"))
    assert error.code == "E2012"
    assert "this GPU is a GeForce RTX 4090 (sm89)" in error.message
    with pytest.raises(MbqError) as none:
        _trt_preflight.check_device("trt", Target.parse("orin:trt"), None)
    assert (none.value.code, none.value.exit_status) == ("E3001", 3)
    _trt_preflight.check_device("rtx", Target.parse("sm120:rtx"), None)


def profile_error(graph: EngineGraph) -> UsageError:
    with pytest.raises(UsageError) as error:
        _trt_preflight.check_profile(graph)
    assert error.value.code == "E2008"
    return error.value


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ((0, 1, 4), "the smallest size is at least 1"),
        ((-1, 1, 4), "the smallest size is at least 1"),
        ((2, 1, 4), "smallest <= typical <= largest"),
        ((1, 8, 4), "smallest <= typical <= largest"),
    ],
)
def test_impossible_profile_is_refused_before_tensorrt_sees_it(
    tmp_path: Path, sizes: tuple[int, int, int], rule: str
) -> None:
    graph = trt_graphs.with_sizes(trt_graphs.relu(tmp_path), "rows", *sizes)
    error = profile_error(graph)
    assert error.message == (
        "The optimization profile is invalid: "
        f"rows runs from {sizes[0]} over {sizes[1]} to {sizes[2]}."
    )
    assert error.why == rule


def test_symbol_without_a_range_is_named(tmp_path: Path) -> None:
    error = profile_error(replace(trt_graphs.relu(tmp_path), sizes={}))
    assert "rows has no range" in error.message


def test_tensor_of_two_billion_elements_is_refused(tmp_path: Path) -> None:
    graph = trt_graphs.with_sizes(trt_graphs.relu(tmp_path), "rows", 1, 1, 2**28)
    assert "x would have 2147483648 elements" in profile_error(graph).message


def test_memory_is_compared_before_the_build(tmp_path: Path) -> None:
    graph = trt_graphs.relu(tmp_path)
    (tmp_path / "vision.onnx_data").write_bytes(bytes(10 << 20))
    with pytest.raises(ResourceError) as error:
        _trt_preflight.check_memory(graph, available=100 << 20)
    assert error.value.code == "E5003"
    assert error.value.message == (
        "Building vision needs about 0.5 GiB of memory, 0.1 GiB is free."
    )
    assert error.value.why == "3.5 times 10 MiB of weights, and 0.5 GiB"
    needed: Any = error.value.context["needed_bytes"]
    assert needed == pytest.approx(35 * 2**20 + 2**29, rel=1e-3)
    _trt_preflight.check_memory(graph, available=needed)


def test_missing_graph_is_named(tmp_path: Path) -> None:
    graph = replace(trt_graphs.relu(tmp_path), onnx=tmp_path / "none.onnx")
    with pytest.raises(FormatError, match=r"none\.onnx does not exist") as error:
        _trt_preflight.check_memory(graph, available=1 << 40)
    assert error.value.code == "E4404"


def test_external_data_belongs_to_the_graph(tmp_path: Path) -> None:
    for name in ("a.onnx", "a.onnx_data", "a.onnx_data_1", "ab.onnx_data", "a.onnx.bak"):
        (tmp_path / name).touch()
    found = [path.name for path in _trt_preflight.graph_files(tmp_path / "a.onnx")]
    assert found == ["a.onnx", "a.onnx_data", "a.onnx_data_1"]
