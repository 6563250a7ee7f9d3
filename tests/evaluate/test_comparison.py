"""The comparisons of the numeric tier on values made here, with faults planted in them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mbq_export.evaluate.comparison import (
    NO_POSITIONS,
    StreamComparison,
    linear_check,
    linear_errors,
    stream_checks,
    weights_of,
)
from mbq_export.evaluate.metrics import Array, cosines
from mbq_export.evaluate.tolerances import PARITY_FP32, PARITY_ROUNDED, QUALITY_W3
from mbq_export.families.base import ANSWER, PROMPT, VISION
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.affine import quantize
from mbq_export.schemes.base import PackedWeight
from mbq_export.schemes.integers import quantize_activations
from mbq_export.schemes.layouts.dense import pack
from mbq_export.schemes.oracle import dequantized
from tests.schemes.integer_weights import weight_of

LINEARS = ("self_attn.q_proj", "self_attn.k_proj")
GROUP = 32
CLASSES = np.array([VISION] * 12 + [PROMPT] * 6 + [ANSWER] * 4, np.int8)


def packed_weight(seed: int, n: int = 16, k: int = 96) -> PackedWeight:
    torch.manual_seed(seed)
    codes = quantize(torch.randn(n, k), scheme=SCHEMES["w3a16"], group_size=GROUP)
    return PackedWeight(
        words=pack(codes.codes.numpy(), bits=3),
        scales=codes.scales.numpy(),
        zeros=codes.zeros.numpy(),
        k=k,
        bits=3,
        group_size=GROUP,
        bias=np.linspace(-1, 1, n, dtype=np.float32),
    )


def one_block() -> tuple[Any, Any, dict[str, np.ndarray]]:
    """A checkpoint of two linears that share an input, and what a right graph would give."""
    weights = {f"blocks.0.{name}": packed_weight(i) for i, name in enumerate(LINEARS)}
    records = {name: SimpleNamespace(scheme=SCHEMES["w3a16"]) for name in weights}
    checkpoint = SimpleNamespace(
        linears=tuple(weights), packed=weights.__getitem__, records=records
    )
    family = SimpleNamespace(linears=LINEARS, linear_path=lambda i, name: f"blocks.{i}.{name}")
    x = np.random.default_rng(0).normal(size=(len(CLASSES), 96)).astype(np.float32)
    values = {"layers.0.q_proj.in": x}
    for name, weight in weights.items():
        role = name.rpartition(".")[2]
        values[f"layers.0.{role}.out"] = (
            x @ dequantized(weight).T.astype(np.float32) + weight.bias
        ).astype(np.float32)
    return checkpoint, family, values


def test_right_linears_are_within_the_gate_by_far() -> None:
    checkpoint, family, values = one_block()
    errors = linear_errors(checkpoint, family, 0, values=values, classes=CLASSES)
    assert [error.linear for error in errors] == list(LINEARS)
    assert max(error.error for error in errors) < 0.02 * PARITY_FP32.linear_error
    assert linear_check(errors, PARITY_FP32).ok is True


def rounding_block(round_input: Callable[[Array], Array]) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """A linear that rounds its activations, and what a graph gives that rounds them in its own way."""
    weight = weight_of(np.random.default_rng(4).integers(-7, 8, (16, 96)))
    checkpoint = SimpleNamespace(
        linears=("blocks.0.self_attn.q_proj",),
        packed=lambda _name: weight,
        records={"blocks.0.self_attn.q_proj": SimpleNamespace(scheme=SCHEMES["w4a8"])},
    )
    family = SimpleNamespace(
        linears=("self_attn.q_proj",), linear_path=lambda i, name: f"blocks.{i}.{name}"
    )
    x = np.random.default_rng(0).normal(size=(len(CLASSES), 96)).astype(np.float32)
    rows = round_input(x) @ dequantized(weight).T
    values = {"layers.0.q_proj.in": x, "layers.0.q_proj.out": rows.astype(np.float32)}
    return checkpoint, family, values


def as_the_format(x: Array) -> Array:
    codes, scales = quantize_activations(x)
    return codes * scales[:, None]


def downwards(x: Array) -> Array:
    scales = np.abs(x).max(1, keepdims=True) / 127
    return np.floor(x / scales) * scales


def to_six_bits(x: Array) -> Array:
    scales = np.abs(x).max(1, keepdims=True) / 31
    return np.rint(x / scales) * scales


def test_rounded_activations_are_judged_on_the_codes_of_the_format() -> None:
    checkpoint, family, values = rounding_block(as_the_format)
    (error,) = linear_errors(checkpoint, family, 0, values=values, classes=CLASSES)
    assert error.error < 0.02 * PARITY_ROUNDED["fp32"].linear_error


@pytest.mark.parametrize("wrong", [lambda x: x, downwards, to_six_bits])
def test_activations_rounded_in_another_way_fail(wrong: Callable[[Array], Array]) -> None:
    """Left alone, rounded downwards, or rounded to fewer steps: each by far more than the gate."""
    checkpoint, family, values = rounding_block(wrong)
    errors = linear_errors(checkpoint, family, 0, values=values, classes=CLASSES)
    assert errors[0].error > 30 * PARITY_ROUNDED["fp32"].linear_error
    assert linear_check(errors, PARITY_ROUNDED["fp32"]).ok is False


def test_a_wrong_scale_in_one_fused_part_names_this_part_and_column() -> None:
    checkpoint, family, values = one_block()
    weight = checkpoint.packed("blocks.0.self_attn.k_proj")
    scales = weight.scales.copy()
    scales[7, 1] *= np.float16(1.1)
    wrong = PackedWeight(
        words=weight.words, scales=scales, zeros=weight.zeros, k=96, bits=3, group_size=GROUP
    )
    x = values["layers.0.q_proj.in"]
    values["layers.0.k_proj.out"] = (x @ dequantized(wrong).T + weight.bias).astype(np.float32)
    errors = linear_errors(checkpoint, family, 0, values=values, classes=CLASSES)
    check = linear_check(errors, PARITY_FP32)
    assert check.ok is False
    assert errors[0].error < PARITY_FP32.linear_error < errors[1].error
    assert errors[1].column == 7
    assert check.place == "layers.0.self_attn.k_proj column 7"
    assert "1 of 2 linears" in check.why


def test_an_error_upstream_does_not_spread_into_the_next_linear() -> None:
    checkpoint, family, values = one_block()
    x = values["layers.0.q_proj.in"] * np.float32(3)
    values["layers.0.q_proj.in"] = x
    for role in ("q_proj", "k_proj"):
        weight = checkpoint.packed(f"blocks.0.self_attn.{role}")
        values[f"layers.0.{role}.out"] = (x @ dequantized(weight).T + weight.bias).astype(
            np.float32
        )
    errors = linear_errors(checkpoint, family, 0, values=values, classes=CLASSES)
    assert linear_check(errors, PARITY_FP32).ok is True


def test_an_output_that_is_not_finite_fails() -> None:
    checkpoint, family, values = one_block()
    values["layers.0.q_proj.out"][20, 3] = np.nan
    errors = linear_errors(checkpoint, family, 0, values=values, classes=CLASSES)
    assert (errors[0].column, errors[0].modality) == (3, "answer")
    assert linear_check(errors, PARITY_FP32).ok is False


def test_unquantized_linear_is_compared_with_the_stored_weight() -> None:
    stored = {"m.weight": np.ones((2, 3)), "m.bias": np.zeros(2)}
    checkpoint = SimpleNamespace(linears=(), has=stored.__contains__, tensor=stored.__getitem__)
    weights, bias = weights_of(checkpoint, "m")
    assert weights is stored["m.weight"]
    assert bias is stored["m.bias"]
    del stored["m.bias"]
    assert weights_of(checkpoint, "m")[1] is None


def stream(layers: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    names = StreamComparison(layers).values
    return {name: random.normal(size=(len(CLASSES), 8)).astype(np.float32) for name in names}


def compared(reference: dict[str, Any], tested: dict[str, Any]) -> StreamComparison:
    comparison = StreamComparison(2)
    comparison.add(reference, tested, CLASSES)
    return comparison


def failed(comparison: StreamComparison) -> set[tuple[str, str]]:
    checks = stream_checks(comparison.errors(), PARITY_FP32)
    return {(check.name, check.modality) for check in checks if not check.ok}


def test_equal_streams_pass_every_gate_in_the_order_of_computation() -> None:
    values = stream()
    comparison = compared(values, values)
    assert failed(comparison) == set()
    order = list(dict.fromkeys(error.value for error in comparison.errors()))
    assert order == ["inputs_embeds", "layers.0.hidden", "layers.1.hidden", "norm.out", "logits"]


def test_a_lost_scale_fails_the_norm_ratio_where_cosine_is_blind() -> None:
    values = stream()
    comparison = compared(values, values | {"layers.1.hidden": values["layers.1.hidden"] * 1.01})
    assert failed(comparison) == {
        (f"parity.{name}", modality)
        for name in ("norm_ratio", "relative_error")
        for modality in ("vision", "prompt", "answer")
    }


def test_a_turned_vector_fails_the_cosine_where_the_norm_ratio_is_blind() -> None:
    values = stream()
    turned = values["layers.0.hidden"].copy()
    turned[CLASSES == VISION] = np.roll(turned[CLASSES == VISION], 1, axis=1)
    comparison = compared(values, values | {"layers.0.hidden": turned})
    assert failed(comparison) == {
        ("parity.cosine", "vision"),
        ("parity.cosine_worst", "vision"),
        ("parity.relative_error", "vision"),
    }
    check = next(c for c in stream_checks(comparison.errors(), PARITY_FP32) if c.ok is False)
    assert check.place == "layers.0.hidden"
    expected = cosines(
        values["layers.0.hidden"][CLASSES == VISION], turned[CLASSES == VISION]
    ).mean()
    assert check.value == pytest.approx(expected)
    assert check.worst is not None
    assert check.worst < check.value


def test_a_small_error_of_one_position_fails_the_relative_error_alone() -> None:
    values = stream()
    off = values["logits"].copy()
    off[-1, 0] += 5e-4 * np.linalg.norm(off[-1])
    assert failed(compared(values, values | {"logits": off})) == {
        ("parity.relative_error", "answer")
    }


def test_not_a_number_fails_every_gate_of_its_modality() -> None:
    values = stream()
    off = values["logits"].copy()
    off[0] = np.nan
    found = failed(compared(values, values | {"logits": off}))
    assert found == {
        (f"parity.{name}", "vision")
        for name in ("cosine", "cosine_worst", "norm_ratio", "relative_error")
    }


def test_a_modality_that_does_not_occur_is_not_measured_and_has_not_passed() -> None:
    values = stream()
    comparison = StreamComparison(2)
    comparison.add(values, values, np.full(len(CLASSES), PROMPT, np.int8))
    checks = stream_checks(comparison.errors(), PARITY_FP32)
    missing = [check for check in checks if check.ok is None]
    assert {check.modality for check in missing} == {"vision", "answer"}
    assert {check.why for check in missing} == {NO_POSITIONS}


def test_quality_gates_the_mean_norm_and_leaves_single_positions_alone() -> None:
    values = stream()
    off = values["logits"].copy()
    off[CLASSES == VISION] *= np.linspace(0.6, 1.4, 12)[:, None].astype(np.float32)
    comparison = compared(values, values | {"logits": off})
    checks = stream_checks(comparison.errors(), QUALITY_W3, prefix="quality")
    assert {check.name for check in checks} == {"quality.cosine", "quality.norm_ratio"}
    assert all(check.ok for check in checks)


def test_samples_are_joined_position_by_position() -> None:
    values = stream()
    one, two = StreamComparison(2), StreamComparison(2)
    one.add(values, values, CLASSES)
    for rows in (slice(None, 13), slice(13, None)):
        part = {name: value[rows] for name, value in values.items()}
        two.add(part, part, CLASSES[rows])
    assert one.errors() == two.errors()
