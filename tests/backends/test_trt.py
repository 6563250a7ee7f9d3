"""Full TensorRT as users meet it where it is not installed, which is every machine of this project."""

from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS, trt
from mbq_export.errors import MbqError
from mbq_export.pipeline.request import BuildRequest, targets_of


def test_backend_is_found_by_its_name() -> None:
    backend = BACKENDS["trt"]
    assert (backend.name, backend.lowerings, backend.isolated) == ("trt", ("plugin", "qdq"), True)


def test_missing_tensorrt_is_told_with_the_command_that_installs_it() -> None:
    if trt.available().ok:
        pytest.skip("TensorRT is installed")
    assert trt.available().fix == 'pip install "mbq-export[trt]"'
    with pytest.raises(MbqError) as error:
        targets_of(BuildRequest(model="m", out=Path("out"), targets=("orin:trt",)))
    assert (error.value.code, error.value.exit_status) == ("E3003", 3)
    assert "orin:trt" in error.value.message
