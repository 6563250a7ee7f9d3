"""ONNX Runtime as an engine, on graphs small enough to check by hand."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mbq_export.backends import ort
from mbq_export.backends.base import TensorSpec
from mbq_export.errors import BuildError, FormatError, MachineError, ResourceError

K, N, GROUP = 128, 64, 32


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: list[onnx.TensorProto] | None = None,
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, path)
    return path


@pytest.fixture
def doubler(tmp_path: Path) -> Path:
    """y = x + x over float32 (rows, 3)."""
    return save(
        tmp_path / "doubler.onnx",
        [helper.make_node("Add", ["x", "x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])],
    )


def int4_linear(path: Path) -> tuple[Path, NDArray[np.float64]]:
    """A blocked INT4 product as the qdq lowering writes it, and its dense weight."""
    draws = np.random.default_rng(5)
    codes = draws.integers(-7, 8, (K, N)).astype(ml_dtypes.int4)
    scales = draws.uniform(0.01, 0.02, (K // GROUP, N)).astype(np.float32)
    weight = codes.astype(np.float64) * np.repeat(scales, GROUP, axis=0)
    save(
        path,
        [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=GROUP),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "t", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "t", N])],
        [numpy_helper.from_array(codes, "q"), numpy_helper.from_array(scales, "s")],
    )
    return path, weight


def test_a_graph_runs_and_names_its_outputs(doubler: Path) -> None:
    with ort.open_graph(doubler) as engine:
        assert engine.inputs == (TensorSpec(name="x", dtype="float32", shape=("rows", 3)),)
        assert engine.provider == ort.CPU
        got = engine.run({"x": np.array([[1, 2, 3]], np.float32)})
    assert {name: value.tolist() for name, value in got.items()} == {"y": [[2, 4, 6]]}


def test_float_feeds_are_cast_to_the_type_of_the_graph(doubler: Path) -> None:
    with ort.open_graph(doubler) as engine:
        got = engine.run({"x": np.array([[1, 2, 0.5]], np.float16)})
    assert got["y"].dtype == np.float32
    assert got["y"].tolist() == [[2, 4, 1]]


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, r"Input x of doubler.onnx is missing"),
        ({"x": np.zeros((2, 4), np.float32)}, r"is float32 \[2, 4\]"),
        ({"x": np.zeros(3, np.float32)}, r"is float32 \[3\]"),
        ({"x": np.zeros((2, 3), np.int64)}, r"is int64 \[2, 3\]"),
        (
            {"x": np.zeros((2, 3), np.float32), "z": np.zeros(1)},
            r"Input z of doubler.onnx is given",
        ),
    ],
)
def test_a_wrong_feed_is_named_before_anything_runs(
    doubler: Path, feeds: dict[str, NDArray[np.generic]], words: str
) -> None:
    with ort.open_graph(doubler) as engine, pytest.raises(FormatError, match=words) as caught:
        engine.run(feeds)
    assert caught.value.code == "E4102"


def test_closing_twice_is_allowed_and_running_afterwards_is_not(doubler: Path) -> None:
    engine = ort.open_graph(doubler)
    engine.close()
    engine.close()
    with pytest.raises(BuildError, match=r"doubler.onnx is closed"):
        engine.run({"x": np.zeros((1, 3), np.float32)})


def test_four_bit_products_are_exact_unless_the_fast_level_is_asked_for(tmp_path: Path) -> None:
    path, weight = int4_linear(tmp_path / "linear.onnx")
    x = np.random.default_rng(6).standard_normal((1, 3, K)).astype(np.float32)
    exact = x.astype(np.float64) @ weight
    errors = {}
    for level in (ort.EXACT, ort.FAST):
        with ort.open_graph(path, accuracy_level=level) as engine:
            found = engine.run({"x": x})["y"]
        errors[level] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    assert errors[ort.EXACT] < 2e-6
    assert errors[ort.FAST] > 1e-3, (
        "the fast level no longer rounds activations: is it still faster?"
    )


def test_one_thread_and_all_threads_agree(tmp_path: Path) -> None:
    path, weight = int4_linear(tmp_path / "linear.onnx")
    x = np.random.default_rng(7).standard_normal((1, 2, K)).astype(np.float32)
    for threads in (1, 0):
        with ort.open_graph(path, threads=threads) as engine:
            np.testing.assert_allclose(engine.run({"x": x})["y"], x @ weight, atol=1e-4)


def test_a_refused_graph_says_in_whose_words(tmp_path: Path) -> None:
    path = save(
        tmp_path / "strange.onnx",
        [helper.make_node("Nonsense", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(BuildError, match=r"refuses strange.onnx(?s:.*)Nonsense") as caught:
        ort.open_graph(path)
    assert caught.value.code == "E6010"


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.onnx"
    path.write_text("<html>not here</html>")
    with pytest.raises(BuildError, match=r"refuses page.onnx"):
        ort.open_graph(path)


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no graph gone.onnx") as caught:
        ort.open_graph(tmp_path / "gone.onnx")
    assert caught.value.code == "E4404"


def test_a_failure_inside_the_graph_is_ours_with_its_words(tmp_path: Path) -> None:
    path = save(
        tmp_path / "reshape.onnx",
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
    )
    with (
        ort.open_graph(path) as engine,
        pytest.raises(BuildError, match=r"failed in reshape") as caught,
    ):
        engine.run({"x": np.zeros(4, np.float32), "shape": np.array([3])})
    assert caught.value.code == "E6011"
    assert "Reshape" in caught.value.why


def test_running_out_of_memory_is_a_resource_error(tmp_path: Path) -> None:
    path = save(
        tmp_path / "huge.onnx",
        [helper.make_node("Expand", ["x", "shape"], ["y"])],
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m"])],
    )
    with (
        ort.open_graph(path) as engine,
        pytest.raises(ResourceError, match=r"out of memory") as caught,
    ):
        engine.run({"x": np.zeros(1, np.float32), "shape": np.array([1 << 55])})
    assert caught.value.code == "E5004"


def test_a_provider_that_is_not_offered_is_never_replaced(doubler: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot use TensorrtExecutionProvider") as caught:
        ort.open_graph(doubler, providers=("TensorrtExecutionProvider",))
    assert caught.value.code == "E3006"


def test_cuda_comes_first_only_with_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "nvidiactl"
    monkeypatch.setattr(ort, "DEVICE_FILES", (str(device),))
    assert ort.default_providers((ort.CUDA, ort.CPU)) == (ort.CPU,)
    device.touch()
    assert ort.default_providers((ort.CUDA, ort.CPU)) == (ort.CUDA, ort.CPU)
    assert ort.default_providers((ort.CPU,)) == (ort.CPU,)


def test_without_a_package_the_install_command_is_named(
    doubler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "PACKAGES", ("a-distribution-nobody-installed",))
    with pytest.raises(MachineError, match=r"not installed(?s:.*)pip install") as caught:
        ort.open_graph(doubler)
    assert caught.value.code == "E3003"
    assert not ort.available().ok
    assert ort.available().fix == 'pip install "mbq-export[cpu]"'


def test_two_packages_in_one_folder_are_refused(
    tmp_path: Path, doubler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "site" / "onnxruntime_gpu-1.31.1.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n"
    )
    monkeypatch.syspath_prepend(str(record.parent))
    with pytest.raises(
        MachineError, match=r"Two ONNX Runtimes(?s:.*)onnxruntime-gpu 1.31.1"
    ) as caught:
        ort.open_graph(doubler)
    assert caught.value.code == "E3008"
    assert "pip uninstall onnxruntime onnxruntime-gpu" in caught.value.fix[0]


def test_this_environment_has_exactly_one_package() -> None:
    ort.check_packages(ort.installed_packages())
    assert ort.available().ok


def test_the_cpu_quota_of_the_cgroup_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(ort, "CPU_QUOTA", str(quota))
    everything = ort.granted_cpus()
    assert everything == len(os.sched_getaffinity(0))
    quota.write_text("max 100000\n")
    assert ort.granted_cpus() == everything
    quota.write_text("50000 100000\n")
    assert ort.granted_cpus() == 1
