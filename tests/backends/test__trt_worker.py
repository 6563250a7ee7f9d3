"""TensorRT for RTX itself, asked for things it refuses in its own ways. Nothing here is imitated."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import helper

from mbq_export.backends import _tensorrt, _trt_flavour
from mbq_export.backends._trt_job import PLAN, Job, Result
from mbq_export.backends.base import EngineGraph, EngineRequest
from mbq_export.errors import MbqError
from mbq_export.target import Target
from tests.backends import trt_graphs

pytestmark = pytest.mark.trt


def job_for(graph: EngineGraph, work: Path, op: str = "build") -> Job:
    """The job that the parent would write for one graph, its own checks left out."""
    work.mkdir(exist_ok=True)
    (work / graph.onnx.name).symlink_to(graph.onnx)
    request = EngineRequest(graphs=(graph,), target=Target.parse("sm89:rtx"), out=work)
    job = _tensorrt._job("build", _trt_flavour.find("rtx"), work, graph, request)
    return replace(job, op=op)


def run(job: Job, *, worker: tuple[str, ...] = _tensorrt.WORKER) -> Result:
    installed = _trt_flavour.find("rtx")
    return _tensorrt.run_job(job, installed, timeout_s=60, worker=worker).result


def refusal(job: Job, **options: tuple[str, ...]) -> MbqError:
    with pytest.raises(MbqError) as error:
        run(job, **options)
    assert not (job.workdir / PLAN).exists()
    return error.value


def test_probe_reports_version_and_devices() -> None:
    result = _tensorrt.probe("rtx")
    assert result.version == _trt_flavour.find("rtx").version
    assert {"SM86", "SM89", "SM120"} <= set(result.devices)
    assert "SM87" not in result.devices


def test_parse_counts_layers_and_builds_nothing(tmp_path: Path) -> None:
    job = job_for(trt_graphs.decoder_block(tmp_path), tmp_path / "work", "parse")
    result = run(job)
    assert result.network_layers > 10
    assert result.plan_bytes == 0
    assert not (job.workdir / PLAN).exists()


def test_build_writes_a_plan(tmp_path: Path) -> None:
    job = job_for(trt_graphs.relu(tmp_path), tmp_path / "work")
    result = run(job)
    plan = (job.workdir / PLAN).read_bytes()
    assert len(plan) == result.plan_bytes
    assert plan.startswith(b"vtrt")
    assert 0 < result.peak_rss_bytes < 2 << 30


def test_unknown_operator_is_named_with_its_node(tmp_path: Path) -> None:
    error = refusal(job_for(trt_graphs.relu(tmp_path, op="Nope"), tmp_path / "work"))
    assert error.code == "E6001"
    assert "node 'n.y' (Nope)" in error.message


def test_zero_point_on_int4_is_refused_by_the_parser(tmp_path: Path) -> None:
    draft = trt_graphs.Draft()
    draft.linear("fc", "x", (64, 128))
    draft.nodes[0].input.append("z")
    draft.constants.append(helper.make_tensor("z", helper.TensorProto.INT4, (2, 64), [1] * 128))
    draft.nodes[-1].output[0] = "y"
    graph = trt_graphs.save(trt_graphs.relu(tmp_path), draft)
    error = refusal(job_for(graph, tmp_path / "work"))
    assert error.code == "E6001"
    assert "Non-zero zero point is not supported" in error.message


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html><body>404</body></html>"])
def test_file_without_a_graph_parses_and_is_refused_by_us(tmp_path: Path, content: bytes) -> None:
    graph = trt_graphs.relu(tmp_path)
    graph.onnx.write_bytes(content)
    error = refusal(job_for(graph, tmp_path / "work"))
    assert error.code == "E4404"
    assert "no layer in the file and called that success" in error.message


def test_builder_without_an_implementation_returns_none(tmp_path: Path) -> None:
    error = refusal(job_for(trt_graphs.fp32_attention(tmp_path), tmp_path / "work"))
    assert error.code == "E6002"
    assert "was not supported by a dedicated kernel" in error.message
    assert "driver" not in error.message


def test_profile_that_the_builder_refuses(tmp_path: Path) -> None:
    job = job_for(trt_graphs.relu(tmp_path), tmp_path / "work")
    error = refusal(replace(job, profile={"x": ((4, 8), (2, 8), (1, 8))}))
    assert error.code == "E2008"
    assert "MIN<=OPT<=MAX" in error.message


def test_profile_without_an_input_is_named(tmp_path: Path) -> None:
    error = refusal(replace(job_for(trt_graphs.relu(tmp_path), tmp_path / "work"), profile={}))
    assert error.code == "E2008"
    assert error.message.startswith("The profile of x is invalid.")


def test_network_with_other_outputs_than_the_contract(tmp_path: Path) -> None:
    job = job_for(trt_graphs.relu(tmp_path), tmp_path / "work")
    error = refusal(replace(job, outputs=("y", "present.0.key")))
    assert error.code == "E6005"
    assert "has other outputs than the graph. missing: present.0.key; unexpected: none" in (
        error.message
    )


def test_device_without_code_in_the_library(tmp_path: Path) -> None:
    job = job_for(trt_graphs.relu(tmp_path), tmp_path / "work")
    error = refusal(replace(job, cc=("SM87",)))
    assert error.code == "E2012"
    assert "SM89" in error.message


def test_builder_that_runs_out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is real: the builder's own allocation of the weights fails in the child."""
    monkeypatch.setattr(_tensorrt, "available_memory", lambda: 0)
    monkeypatch.setattr(_tensorrt, "ADDRESS_SPACE_MARGIN", 900 << 20)
    error = refusal(job_for(trt_graphs.wide(tmp_path, columns=8_000_000), tmp_path / "work"))
    assert error.code == "E5004"
    assert error.message.startswith("The builder returned no engine.")


def test_library_path_without_the_link_is_found_before_the_parser_aborts(tmp_path: Path) -> None:
    job = job_for(trt_graphs.relu(tmp_path), tmp_path / "work")
    error = refusal(job, worker=("env", "-u", "LD_LIBRARY_PATH", *_tensorrt.WORKER))
    assert error.code == "E3013"
    assert "libtensorrt_rtx.so cannot be opened" in error.message


def test_another_copy_of_the_library_is_found(tmp_path: Path) -> None:
    job = job_for(trt_graphs.relu(tmp_path), tmp_path / "work")
    error = refusal(replace(job, library="/opt/libtensorrt_rtx.so.1"))
    assert error.code == "E3013"
    assert "expected /opt/libtensorrt_rtx.so.1" in error.message


def test_broken_installation_is_not_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "site" / "tensorrt_rtx_bindings"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    error = refusal(job_for(trt_graphs.relu(tmp_path), tmp_path / "work"))
    assert error.code == "E3003"
    assert "libcudart.so.13" in error.message
    assert error.why == "the package is installed but broken"


def test_worker_runs_without_the_current_folder_on_its_path(tmp_path: Path) -> None:
    """A module that lies beside the graph is never imported."""
    job = job_for(trt_graphs.relu(tmp_path), tmp_path / "work")
    (job.workdir / "numpy.py").write_text("raise SystemExit('hijacked')\n")
    assert run(job).network_layers > 0
    assert sys.executable == _tensorrt.WORKER[0]
