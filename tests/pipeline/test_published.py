"""Scales of others instead of a search: what still needs data, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.channel_scales import Switches
from mbq_export.errors import FormatError, UsageError
from mbq_export.pipeline.published import needs_data, published_facts
from mbq_export.pipeline.request import BuildRequest
from mbq_export.pipeline.take_over import SWITCHES
from mbq_export.schemes import SCHEMES

REQUEST = BuildRequest(model="m", out=Path("out"))
W3 = SCHEMES["w3a16"]
SEARCH = Switches(method="mbq")


def test_search_needs_data_and_neither_baseline_nor_codes_do() -> None:
    assert needs_data(REQUEST, W3, SEARCH)
    assert not needs_data(REQUEST, None, SEARCH)
    assert not needs_data(REQUEST, W3, SWITCHES)


def test_published_scales_need_no_data() -> None:
    asked = replace(REQUEST, import_scales=Path("s.safetensors"))
    assert not needs_data(asked, W3, SEARCH)
    with pytest.raises(UsageError, match="contradicts --data") as caught:
        needs_data(replace(asked, data="calib.jsonl"), W3, SEARCH)
    assert caught.value.code == "E2002"
    with pytest.raises(UsageError, match="contradicts --wbits 16"):
        needs_data(asked, None, SEARCH)


def test_published_scales_beside_a_rounded_tower_need_its_pictures() -> None:
    asked = replace(REQUEST, import_scales=Path("s.safetensors"), vision_bits=8)
    assert needs_data(asked, W3, SEARCH)
    assert needs_data(replace(asked, data="calib.jsonl"), W3, SEARCH)


def test_published_scales_beside_a_rounded_head_take_data_and_do_without() -> None:
    asked = replace(REQUEST, import_scales=Path("s.safetensors"), lm_head_bits=4)
    assert not needs_data(asked, W3, SEARCH)
    assert needs_data(replace(asked, data="calib.jsonl"), W3, SEARCH)


def test_joint_search_on_scales_of_others_has_a_loss_of_its_own() -> None:
    asked = replace(REQUEST, import_scales=Path("s.safetensors"), replaced={"loss": "mse"})
    assert needs_data(asked, W3, Switches(method="qvlm", search_scope="block", loss="mse"))
    with pytest.raises(UsageError, match="--loss decides nothing here"):
        needs_data(asked, W3, Switches(method="mbq", loss="mse"))


def test_scales_of_others_leave_no_search_to_choose_for() -> None:
    asked = replace(REQUEST, import_scales=Path("s.safetensors"), replaced={"grid": "20"})
    with pytest.raises(UsageError, match="--grid decides nothing here") as caught:
        needs_data(asked, W3, SEARCH)
    assert caught.value.code == "E2002"


def test_fingerprint_knows_both_files(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(b"a")
    asked = replace(REQUEST, import_scales=path)
    with pytest.raises(FormatError, match=r"s\.json") as caught:
        published_facts(asked)
    assert caught.value.code == "E4314"
    path.with_suffix(".json").write_text("{}")
    one = published_facts(asked)
    path.with_suffix(".json").write_text("{ }")
    assert published_facts(asked) != one
    assert published_facts(REQUEST) == {}
