"""Weights of token classes out of a report."""

from typing import Any

from mbq_export.blocks.loss import ClassWeights
from mbq_export.blocks.ratios import (
    ALIKE,
    prompt_weight_of,
    r_of,
    squared_weights,
    weighings,
    weights_of_linear,
)


def report() -> dict[str, Any]:
    clipped = {
        "self_attn.k_proj": {"vision": 8.0, "prompt": 2.0},
        "self_attn.o_proj": {"vision": 0.125, "prompt": None},
        "mlp.down_proj": {"vision": None, "prompt": 3.0},
    }
    return {
        "layers": [
            {
                "r": {"attn": 0.5, "mlp": 0.25},
                "linears": {name: {"clipped": values} for name, values in clipped.items()},
            }
        ]
    }


def test_a_unit_has_the_r_of_its_half() -> None:
    assert [r_of(report(), 0, unit) for unit in ("qkv", "o", "gate_up", "down")] == [
        0.5, 0.5, 0.25, 0.25,
    ]  # fmt: skip


def test_a_linear_has_weights_of_its_own() -> None:
    assert weights_of_linear(report(), 0, "self_attn.k_proj") == ClassWeights(
        vision=8.0, prompt=2.0
    )


def test_what_was_not_measured_weighs_one_in_a_hessian_and_nothing_in_the_search() -> None:
    found = weights_of_linear(report(), 0, "self_attn.o_proj")
    assert (found.vision, found.prompt) == (0.125, 1.0)
    assert weights_of_linear(report(), 0, "mlp.down_proj").vision == 1.0
    assert prompt_weight_of(report(), 0, "qkv") == 0.0
    assert prompt_weight_of(report(), 0, "down") == 3.0


def test_linears_with_one_input_share_a_matrix_only_where_classes_weigh_alike() -> None:
    linears = ("self_attn.k_proj", "self_attn.o_proj")
    assert weighings({}, 0, linears, alike=True) == (
        dict.fromkeys(linears, "plain"),
        {"plain": ALIKE},
    )
    names, weights = weighings(report(), 0, linears, alike=False)
    assert names == {linear: linear for linear in linears}
    assert weights == {linear: weights_of_linear(report(), 0, linear) for linear in linears}


def test_squared_errors_weigh_by_squared_gradients_and_nothing_where_nothing_is_read() -> None:
    def weights(**squares: float | None) -> ClassWeights:
        linears = {"mlp.down_proj": {"mean_sq": squares}}
        return squared_weights({"layers": [{"linears": linears}]}, 0, "mlp.down_proj")

    assert weights(answer=4.0, vision=1.0, prompt=8.0) == ClassWeights(vision=0.25, prompt=2.0)
    assert weights(answer=4.0, vision=0.0, prompt=None) == ClassWeights(vision=0.0, prompt=0.0)
    assert weights(answer=None, vision=1.0) == ClassWeights(vision=0.0, prompt=0.0)
