"""An edited report in a request: where it goes, and that a resumed build knows it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mbq_export.calibrate.methods import METHODS
from mbq_export.errors import FormatError, UsageError
from mbq_export.pipeline.ratios import ratio_facts, ratios_of
from mbq_export.pipeline.request import BuildRequest
from tests.questions import tiny_model

REQUEST = BuildRequest(model="m", out=Path("out"))
NAMED = replace(REQUEST, sensitivity=Path("sensitivity.json"))


def ratios(request: BuildRequest) -> dict[str, Any] | None:
    model = tiny_model()
    switches = METHODS[request.method].resolve(request.replaced)
    return ratios_of(request, switches, family=model.family, text=model.text)


def test_without_a_report_ratios_are_measured() -> None:
    assert ratios(REQUEST) is None
    assert ratio_facts(REQUEST) == {}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"method": "awq"}, "nothing in --method awq is weighed by a ratio"),
        ({"method": "rtn"}, "nothing in --method rtn"),
        ({"import_scales": Path("s.safetensors")}, "--import-scales replaces"),
        ({"replaced": {"r_floor": 0.1}}, "--r-floor would change them"),
        ({"replaced": {"modality_weight": 0.1}}, "--modality-weight would change them"),
    ],
)
def test_a_report_that_nothing_would_read_is_refused(changed: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=r"--sensitivity sensitivity\.json does not go") as caught:
        ratios(replace(NAMED, **changed))
    assert caught.value.code == "E2002"
    assert why in str(caught.value.why)


def test_a_fingerprint_knows_every_byte_of_it(tmp_path: Path) -> None:
    asked = replace(REQUEST, sensitivity=tmp_path / "s.json")
    with pytest.raises(FormatError) as caught:
        ratio_facts(asked)
    assert caught.value.code == "E4316"
    (tmp_path / "s.json").write_text("{}")
    one = ratio_facts(asked)
    (tmp_path / "s.json").write_text("{ }")
    assert ratio_facts(asked) != one
