"""The reference form: one body per operator, and only for models that fit when they run."""

from dataclasses import replace

import numpy as np
import pytest

from mbq_export.errors import UsageError
from mbq_export.export.lowerings import reference
from mbq_export.export.lowerings.reference import LOWERING
from mbq_export.schemes import SCHEMES
from tests.export.one_linear import one_node, random_packed

RNG = np.random.default_rng(5)


def test_graph_holds_one_body_of_its_own_opset() -> None:
    model = one_node(random_packed(RNG, n=16, k=64, bits=4, group_size=32), lowering="reference")
    assert [identifier[:2] for identifier in model.functions] == [("mbq", "W4A16Linear")]
    body = next(iter(model.functions.values()))
    assert body.opset_imports[""] == model.opset_imports[""] == 23


def test_a_model_too_large_to_unpack_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LARGEST_WEIGHTS", 1000)
    with pytest.raises(UsageError) as caught:
        one_node(random_packed(RNG, n=16, k=64, bits=3, group_size=32), lowering="reference")
    assert str(caught.value) == (
        "MBQ-E2002: A reference graph of 1,024 quantized weights would not fit in memory when it runs.\n"
        "  why     runtimes unpack it to floats; the limit is 1,000\n"
        "  fix     --lowering qdq"
    )


def test_a_scheme_without_an_operator_is_refused_with_the_reason() -> None:
    w2a16 = replace(SCHEMES["w3a16"], name="w2a16", weight_bits=2)
    assert LOWERING.supports(w2a16, "ort") == "there is no mbq operator for w2a16"
    assert LOWERING.supports(SCHEMES["w3a16"], "trt") is None
