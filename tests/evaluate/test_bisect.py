"""Naming the first bad place from what the comparisons found."""

import numpy as np
import pytest

from mbq_export.evaluate.bisect import (
    HINT_TEXT,
    HINT_VISION,
    HINT_WEIGHTS,
    first_bad_op,
    named,
    operations,
    statistics,
    suspect,
)
from mbq_export.evaluate.comparison import LinearError, StreamError
from mbq_export.evaluate.tolerances import PARITY_FP32
from mbq_export.families.base import ANSWER, LINEARS, PROMPT, VISION

MODALITIES = ("vision", "prompt", "answer")
VALUES = ("inputs_embeds", "layers.0.hidden", "layers.1.hidden", "norm.out", "logits")
CLASSES = np.array([VISION, VISION, PROMPT, ANSWER], np.int8)


def stream(**off: str) -> list[StreamError]:
    """A stream that is off from a value on, for the modalities given: ``stream(vision="logits")``."""
    return [
        StreamError(
            value=value,
            modality=modality,
            cosine=0.9 if bad else 1.0,
            cosine_worst=0.9 if bad else 1.0,
            norm_ratio=1.3 if bad else 1.0,
            norm_off=0.3 if bad else 0.0,
            error=0.5 if bad else 1e-7,
            positions=9,
        )
        for index, value in enumerate(VALUES)
        for modality in MODALITIES
        for bad in [modality in off and index >= VALUES.index(off[modality])]
    ]


def linear(layer: int, name: str, error: float, column: int = 3) -> LinearError:
    return LinearError(layer=layer, linear=name, error=error, column=column, modality="prompt")


def linears(*bad: tuple[int, str]) -> list[LinearError]:
    return [
        linear(layer, name, 1e-2 if (layer, name) in bad else 1e-7)
        for layer in range(2)
        for name in LINEARS
    ]


def test_nothing_is_suspected_where_every_gate_holds() -> None:
    assert suspect(linears(), stream(), PARITY_FP32) is None


def test_a_bad_linear_is_the_cause_of_its_blocks_bad_output() -> None:
    everywhere = dict.fromkeys(MODALITIES, "layers.1.hidden")
    found = suspect(linears((1, "mlp.up_proj")), stream(**everywhere), PARITY_FP32)
    assert found is not None
    bad = named(found, occurring=MODALITIES)
    assert (bad.layer, bad.op, bad.column, bad.modality) == (1, "mlp.up_proj", 3, "all")
    assert (bad.cos, bad.norm_ratio, bad.error) == (0.9, 1.3, 1e-2)
    assert bad.hint == HINT_WEIGHTS
    assert str(bad) == "layer 1 mlp.up_proj column 3"


def test_a_bad_linear_that_does_not_show_in_the_stream_is_found_all_the_same() -> None:
    found = suspect(linears((0, "self_attn.v_proj")), stream(), PARITY_FP32)
    assert found is not None
    bad = named(found, occurring=MODALITIES)
    assert (bad.layer, bad.op, bad.modality) == (0, "self_attn.v_proj", "prompt")


def test_the_first_of_several_bad_linears_is_named() -> None:
    both = linears((1, "self_attn.q_proj"), (0, "mlp.down_proj"))
    found = suspect(both, stream(), PARITY_FP32)
    assert found is not None
    assert (found.linear.layer, found.linear.linear) == (0, "mlp.down_proj")


def test_a_stream_that_is_bad_before_any_bad_linear_is_the_cause() -> None:
    found = suspect(linears((1, "mlp.up_proj")), stream(vision="layers.0.hidden"), PARITY_FP32)
    assert found is not None
    assert (found.value, found.linear) == ("layers.0.hidden", None)


def test_a_linear_whose_error_is_not_a_number_is_bad() -> None:
    found = suspect([linear(0, "mlp.up_proj", np.nan)], stream(), PARITY_FP32)
    assert found is not None


@pytest.mark.parametrize(
    ("off", "op", "modality", "hint"),
    [
        ({"vision": "inputs_embeds"}, "vision_encoder", "vision", HINT_VISION),
        (
            {"prompt": "inputs_embeds", "answer": "inputs_embeds"},
            "embed_tokens",
            "prompt, answer",
            HINT_TEXT,
        ),
        ({"answer": "norm.out"}, "norm", "answer", HINT_TEXT),
        ({"vision": "logits"}, "lm_head", "vision", HINT_VISION),
    ],
)
def test_places_outside_the_blocks_are_named(
    off: dict[str, str], op: str, modality: str, hint: str
) -> None:
    found = suspect(linears(), stream(**off), PARITY_FP32)
    assert found is not None
    bad = named(found, occurring=MODALITIES)
    assert (bad.layer, bad.op, bad.modality, bad.hint) == (None, op, modality, hint)


def block_values(wrong_from: str = "", rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """Values of block 2, off from one of them on."""
    random = np.random.default_rng(0)
    values, off = {}, False
    for _, value in operations(2, LINEARS):
        off = off or value == wrong_from
        values[value] = random.normal(size=(4, 6))
        if off:
            values[value][rows] *= 1.01
    return values


@pytest.mark.parametrize(
    ("value", "op"),
    [
        ("layers.2.q_proj.in", "input_layernorm"),
        ("layers.2.k_proj.out", "self_attn.k_proj"),
        ("layers.2.o_proj.in", "attention"),
        ("layers.2.gate_proj.in", "post_attention_layernorm"),
        ("layers.2.down_proj.in", "activation"),
        ("layers.2.hidden", "residual"),
    ],
)
def test_the_operation_between_the_last_good_and_the_first_bad_value_is_named(
    value: str, op: str
) -> None:
    sides = (block_values(), block_values(value))
    bad = first_bad_op(2, LINEARS, sides, CLASSES, PARITY_FP32)
    assert (bad.layer, bad.op, bad.modality) == (2, op, "all")
    assert bad.norm_ratio == pytest.approx(1.01)
    assert bad.statistics["tested"]["max"] > bad.statistics["reference"]["max"]


def test_an_operation_that_is_off_at_vision_positions_alone_says_so() -> None:
    sides = (block_values(), block_values("layers.2.o_proj.in", slice(0, 2)))
    bad = first_bad_op(2, LINEARS, sides, CLASSES, PARITY_FP32)
    assert (bad.op, bad.modality, bad.hint) == ("attention", "vision", HINT_VISION)


def test_statistics_leave_out_what_is_not_finite_but_count_it() -> None:
    assert statistics(np.array([1.0, np.nan, -2.0, np.inf])) == {
        "min": -2.0,
        "max": 1.0,
        "non_finite": 0.5,
    }
    assert statistics(np.array([np.nan]))["max"] is None
