"""Which engines of a bundle a session takes; that they run is shown on `tests/backends/recorded_tensorrt.py`."""

import json
from pathlib import Path

import pytest

from mbq_export.backends import BACKENDS
from mbq_export.bundle import Bundle
from mbq_export.errors import MbqError
from mbq_export.native import LocalGpu
from mbq_export.runtime import ISOLATED, host

CARD = LocalGpu(name="GeForce RTX 4090", sm=89, driver="580.95")


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """Records of three engine folders on a machine with an RTX 4090."""
    monkeypatch.setattr(host, "gpu_for", lambda _: CARD)
    for name, flavour, sms in (
        ("rtx-1.7/sm120", "rtx", ["sm120"]),
        ("rtx-1.7/sm86-sm89", "rtx", ["sm86", "sm89"]),
        ("trt-11.4/sm87", "trt", ["sm87"]),
    ):
        folder = tmp_path / "engines" / name
        folder.mkdir(parents=True)
        (folder / "engine.json").write_text(json.dumps({"flavour": flavour, "sm": sms}))
    return Bundle(root=tmp_path, manifest={}, sha256="")


def test_engines_for_this_gpu_are_chosen(bundle: Bundle) -> None:
    assert host.engine_folder(bundle, "rtx").name == "sm86-sm89"


def test_engines_for_another_gpu_are_left_to_the_check_that_tells_why(bundle: Bundle) -> None:
    assert host.engine_folder(bundle, "trt").name == "sm87"


def test_flavour_without_engines_lists_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(MbqError, match="has no engines of trt") as error:
        host.engine_folder(Bundle(root=tmp_path, manifest={}, sha256=""), "trt")
    assert error.value.code == "E2001"


def test_backends_with_engines_are_those_that_say_so() -> None:
    assert tuple(name for name, each in BACKENDS.members().items() if each.isolated) == ISOLATED
