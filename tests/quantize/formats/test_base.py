"""What all formats share: which scheme holds what, split groups, scales that are fp16 or refused."""

import copy
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mbq_export.errors import FormatError, UsageError
from mbq_export.quantize.formats import FORMATS
from mbq_export.quantize.formats.base import (
    Carried,
    Recipe,
    carried_over,
    fitting_group,
    scheme_of,
)
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight
from mbq_export.schemes.oracle import dequantized
from tests.reference import foreign

SETTINGS: list[Callable[[], dict[str, object]]] = [
    lambda: foreign.awq_settings(64),
    lambda: foreign.gptq_settings(3, 64, "gptq_v2"),
    lambda: foreign.tensors_settings(4, 64),
    lambda: foreign.tensors_settings(4, None, symmetric=True, activations=True),
]
ODD = (None, True, -1, 0, 1 << 70, 1.5, "", "x" * 500, [], [[]], {}, {"a": []})


def places(value: object, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every key of nested objects."""
    if not isinstance(value, dict):
        return []
    return [p for key in value for p in [(*path, key), *places(value[key], (*path, key))]]


@pytest.mark.parametrize("make", SETTINGS)
def test_odd_value_anywhere_in_the_settings_is_read_or_refused_never_a_traceback(
    make: Callable[[], dict[str, object]],
) -> None:
    errors = []
    for path in places(make()):
        for odd in ODD:
            config: dict[str, Any] = copy.deepcopy(make())
            place = config
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = odd
            form = FORMATS[str(make()["quant_method"])]
            try:
                scheme_of(form.recipe(config))
            except FormatError as error:
                errors.append(error)
    assert len(errors) > 20
    assert {error.code for error in errors} == {"E4011"}
    assert all(len(error.message) < 200 for error in errors), "a long value is cut"


@pytest.mark.parametrize(
    ("bits", "symmetric", "act_bits", "name"),
    [
        (3, False, 16, "w3a16"),
        (4, False, 16, "w4a16"),
        (4, True, 16, "w4a16"),
        (3, True, 16, "w3a16"),
        (4, True, 8, "w4a8"),
        (8, True, 8, "w8a8"),
        (8, True, 16, "w8a16"),
    ],
)
def test_scheme_is_the_one_of_these_widths(
    bits: int, symmetric: bool, act_bits: int, name: str
) -> None:
    recipe = Recipe(variant="", bits=bits, group_size=128, symmetric=symmetric, act_bits=act_bits)
    assert scheme_of(recipe).name == name


def test_zero_points_that_a_symmetric_format_would_lose_are_refused() -> None:
    """GPTQ stores them even where it calls its codes symmetric."""
    zeros = np.full((3, 1), 128, np.uint8)
    carried = Carried(
        words=np.zeros((3, 8), np.uint32), scales=np.ones((3, 1), np.float32), zeros=zeros
    )
    recipe = Recipe(variant="", bits=8, group_size=CHANNEL, symmetric=True)
    options = {"k": 32, "recipe": recipe, "scheme": SCHEMES["w8a16"], "group_size": CHANNEL}
    assert carried_over(carried, **options)[0].zeros is None  # type: ignore[arg-type]
    zeros[1] = 127
    with pytest.raises(FormatError, match="1 zero points are not 128") as caught:
        carried_over(carried, **options)  # type: ignore[arg-type]
    assert caught.value.code == "E4411"


@pytest.mark.parametrize(
    ("bits", "symmetric", "act_bits"),
    [(4, False, 8), (5, True, 16), (8, False, 16), (2, False, 16), (4, True, 4)],
)
def test_widths_that_no_scheme_holds_are_refused(bits: int, symmetric: bool, act_bits: int) -> None:
    recipe = Recipe(variant="", bits=bits, group_size=128, symmetric=symmetric, act_bits=act_bits)
    with pytest.raises(FormatError, match=f"codes of {bits} bits") as caught:
        scheme_of(recipe)
    assert caught.value.code == "E4011"


@pytest.mark.parametrize(
    ("scheme", "group", "widths", "ours"),
    [
        ("w4a16", 128, (256,), 128),
        ("w4a16", 256, (512,), 128),
        ("w4a16", 192, (384,), 64),
        ("w4a16", CHANNEL, (256, 768), 128),
        ("w4a16", CHANNEL, (256, 320), 64),
        ("w4a8", CHANNEL, (24,), CHANNEL),
        ("w4a8", 256, (512,), 128),
    ],
)
def test_larger_groups_are_split(
    scheme: str, group: int, widths: tuple[int, ...], ours: int
) -> None:
    assert fitting_group(SCHEMES[scheme], group, widths) == ours


@pytest.mark.parametrize(
    ("scheme", "group", "widths"),
    [("w4a16", 16, (64,)), ("w4a16", CHANNEL, (24,)), ("w4a8", 64, (64,))],
)
def test_groups_that_nothing_of_ours_divides_are_refused(
    scheme: str, group: int, widths: tuple[int, ...]
) -> None:
    with pytest.raises(FormatError, match="groups have") as caught:
        fitting_group(SCHEMES[scheme], group, widths)
    assert caught.value.code == "E4011"


@pytest.mark.parametrize("group", [CHANNEL, 192])
def test_split_groups_stand_for_the_same_weights(group: int) -> None:
    rng = np.random.default_rng(5)
    linear = foreign.random_linear(rng, 6, 384, bits=4, group=group or 384)
    words = np.array([foreign.stream(row.tolist(), 4) for row in linear.codes], np.uint32)
    recipe = Recipe(variant="", bits=4, group_size=group, symmetric=False)
    scheme = SCHEMES["w4a16"]
    weight, _ = carried_over(
        Carried(words=words, scales=linear.scales, zeros=linear.zeros),
        k=384,
        recipe=recipe,
        scheme=scheme,
        group_size=fitting_group(scheme, group, (384,)),
    )
    columns = np.arange(384) // (group or 384)
    real = linear.codes.astype(float) - linear.zeros[:, columns]
    assert np.array_equal(dequantized(weight), real * linear.scales.astype(float)[:, columns])


def scaled(scales: np.ndarray, group_size: int = 32) -> tuple[PackedWeight, object]:
    n, groups = scales.shape
    k = groups * group_size if group_size else 32
    recipe = Recipe(variant="", bits=4, group_size=group_size, symmetric=True, act_bits=16)
    carried = Carried(words=np.zeros((n, k // 8), np.uint32), scales=scales, zeros=None)
    scheme = SCHEMES["w4a8" if group_size == CHANNEL else "w4a16"]
    return carried_over(carried, k=k, recipe=recipe, scheme=scheme, group_size=group_size)


def test_bfloat16_scales_in_the_normal_range_are_kept_exactly() -> None:
    scales = (2.0 ** np.random.default_rng(0).uniform(-14, 15, (40, 8))).astype(ml_dtypes.bfloat16)
    weight, counts = scaled(scales)
    assert weight.scales.dtype == np.float16
    assert np.array_equal(weight.scales.astype(np.float32), scales.astype(np.float32))
    assert (counts.small, counts.rounded) == (0, 0)


def test_small_bfloat16_scales_are_counted_and_change_by_half_a_step_at_most() -> None:
    values = np.array([[2.0**-15, 2.0**-20 * 1.0078125, 1.0]]).astype(ml_dtypes.bfloat16)
    weight, counts = scaled(values)
    assert (counts.small, counts.rounded) == (2, 1)
    change = np.abs(weight.scales.astype(np.float64) - values.astype(np.float64))
    assert 0 < change.max() <= 2.0**-25


@pytest.mark.parametrize("value", [70000.0, 1e30, 0.1, np.nan])
def test_scale_that_is_no_fp16_number_is_refused(value: float) -> None:
    with pytest.raises(FormatError, match="1 of 2 scales are no fp16 numbers") as caught:
        scaled(np.array([[value, 0.5]], np.float32))
    assert caught.value.code == "E4112"


def test_scales_of_whole_rows_stay_float32() -> None:
    values = np.array([[0.1], [1e-6]], np.float32)
    weight, _ = scaled(values, CHANNEL)
    assert np.array_equal(weight.scales, values)
    assert weight.scales.dtype == np.float32


def test_group_that_does_not_divide_a_width_is_refused() -> None:
    with pytest.raises(FormatError, match="do not divide in_features 100") as caught:
        Recipe(variant="", bits=4, group_size=64, symmetric=False).groups(100)
    assert caught.value.code == "E4102"


def test_every_format_writes_some_scheme_and_no_unknown_one() -> None:
    assert FORMATS.names() == ("awq", "compressed-tensors", "gptq")
    for form in FORMATS.members().values():
        assert form.schemes
        assert set(form.schemes) <= set(SCHEMES.names())
    with pytest.raises(UsageError, match="Unknown format 'hqq'"):
        FORMATS["hqq"]
