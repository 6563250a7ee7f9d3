"""The two files between parent and child."""

from pathlib import Path

import pytest

from mbq_export.backends._trt_job import RESULT, Job, Result


def test_child_reads_the_job_that_the_parent_wrote(tmp_path: Path) -> None:
    job = Job(
        op="build",
        workdir=tmp_path,
        flavour="rtx",
        module="tensorrt_rtx_bindings",
        link="libtensorrt_rtx.so",
        library="/lib/libtensorrt_rtx.so.1",
        onnx="decoder.onnx",
        inputs=("x", "past_key_values.0.key"),
        outputs=("logits",),
        profile={"x": ((1, 1, 8), (1, 1, 8), (1, 64, 8))},
        cc=("SM89",),
        workspace_mib=512,
    )
    read = Job.read(job.write())
    shapes = {name: tuple(map(tuple, each)) for name, each in read.profile.items()}
    assert shapes == job.profile
    assert (read.op, read.onnx, read.inputs, read.cc, read.workdir) == (
        ("build", "decoder.onnx", job.inputs, ("SM89",), tmp_path)
    )


def test_parent_reads_the_result_that_the_child_wrote(tmp_path: Path) -> None:
    result = Result(kind="trt-io", message="m", details=("a", "b"), version="1.7.1", parse_s=0.5)
    result.write(tmp_path)
    assert Result.read(tmp_path) == result
    assert [path.name for path in tmp_path.iterdir()] == [RESULT]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "kind": ""}', "null"]
)
def test_result_that_is_none_of_ours_is_no_result(tmp_path: Path, text: str) -> None:
    (tmp_path / RESULT).write_text(text)
    assert Result.read(tmp_path) is None


def test_missing_result_is_no_result(tmp_path: Path) -> None:
    assert Result.read(tmp_path) is None
