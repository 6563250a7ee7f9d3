"""What the folder of a quantized model decides, and what nobody may choose any more."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbq_export.errors import FormatError, UsageError
from mbq_export.pipeline.plan import make_plan
from mbq_export.pipeline.request import BuildRequest
from mbq_export.quantize.formats import FORMATS
from mbq_export.quantize.handover import hand_over
from tests.tiny import load_tiny, tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("foreign")
    checkpoint = tiny_checkpoint(
        place / "ours", load_tiny(place / "model"), scheme="w4a16", group_size=64
    )
    hand_over(checkpoint, FORMATS["awq"], place / "awq")
    return place / "awq"


@pytest.fixture
def request_(folder: Path, tmp_path: Path) -> BuildRequest:
    return BuildRequest(model=str(folder), out=tmp_path / "out", targets=("cpu",), takes_codes=True)


def test_folder_decides_scheme_group_and_method(request_: BuildRequest) -> None:
    plan = make_plan(request_)
    assert (plan.scheme_name, plan.group_size) == ("w4a16", 64)
    assert plan.switches.method == "imported"
    assert plan.data is None
    assert plan.foreign is not None
    assert "w4a16 g64, imported" in [row[3] for row in plan.table()]


def test_what_agrees_with_the_folder_may_be_said(request_: BuildRequest) -> None:
    agreeing = replace(request_, weight_bits=4, scheme="w4a16", group_size=64)
    assert make_plan(agreeing).fingerprint == make_plan(request_).fingerprint


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"weight_bits": 3}, "--wbits 3 contradicts awq"),
        ({"scheme": "w3a16"}, "--scheme w3a16"),
        ({"group_size": 128}, "--group-size 128"),
        ({"group_size": 0}, "--group-size channel"),
        ({"lm_head_bits": 4}, "--lm-head-bits 4"),
        ({"vision_bits": 8}, "--vision-bits 8"),
        ({"method": "rtn"}, "--method rtn"),
        ({"data": "builtin:shapes"}, "--data builtin:shapes"),
        ({"replaced": {"compat": "mbq"}}, "--compat"),
        ({"import_scales": Path("scales.safetensors")}, "--import-scales"),
        ({"sensitivity": Path("sensitivity.json")}, "--sensitivity"),
    ],
)
def test_choice_that_contradicts_the_folder_is_refused(
    request_: BuildRequest, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        make_plan(replace(request_, **asked))
    assert caught.value.code == "E2002"


def test_command_that_takes_no_codes_refuses_the_folder(request_: BuildRequest) -> None:
    with pytest.raises(FormatError, match=r"already quantized .method awq.") as caught:
        make_plan(replace(request_, takes_codes=False))
    assert caught.value.code == "E4009"
