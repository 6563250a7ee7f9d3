"""compressed-tensors: our words under another name, the older ten per word, bytes, and refusals."""

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbq_export.errors import FormatError
from mbq_export.quantize.formats.base import (
    Kept,
    StoredLinear,
    carried_over,
    fitting_group,
    scheme_of,
)
from mbq_export.quantize.formats.compressed_tensors import FORMAT, recipe
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, check_packed
from mbq_export.schemes.layouts.dense import unpack
from tests.reference import foreign

WIDTHS = st.sampled_from([(32, 32), (96, 32), (192, 64), (256, 128)])
ROWS = st.sampled_from([1, 7, 11, 20, 32, 45])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 4]), ROWS, WIDTHS, st.booleans())
def test_what_a_slow_packer_wrote_is_read(
    seed: int, bits: int, n: int, widths: tuple[int, int], symmetric: bool
) -> None:
    k, group = widths
    linear = foreign.random_linear(np.random.default_rng(seed), n, k, bits=bits, group=group)
    found = recipe(foreign.tensors_settings(bits, group, symmetric=symmetric))
    tensors = foreign.pack_quantized(linear, symmetric=symmetric)
    carried = FORMAT.read(StoredLinear(n=n, k=k, tensors=tensors), found)
    scheme = scheme_of(found)
    weight, _ = carried_over(carried, k=k, recipe=found, scheme=scheme, group_size=group)
    assert np.array_equal(unpack(weight.words, bits=bits, columns=k), linear.codes)
    assert weight.zeros is not None
    wanted = np.full_like(linear.zeros, 2 ** (bits - 1)) if symmetric else linear.zeros
    assert np.array_equal(weight.zeros, wanted)
    assert np.array_equal(weight.scales, linear.scales)
    if not symmetric:
        again = FORMAT.write(weight, scheme)
        assert again.keys() == tensors.keys()
        for part, array in tensors.items():
            assert again[part].dtype == array.dtype
            assert np.array_equal(again[part], array), part


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([3, 4]), ROWS, WIDTHS)
def test_codes_that_do_not_straddle_words_are_told_by_their_number(
    seed: int, bits: int, n: int, widths: tuple[int, int]
) -> None:
    k, group = widths
    linear = foreign.random_linear(np.random.default_rng(seed), n, k, bits=bits, group=group)
    tensors = foreign.pack_quantized(linear, straddling=False)
    carried = FORMAT.read(
        StoredLinear(n=n, k=k, tensors=tensors), recipe(foreign.tensors_settings(bits, group))
    )
    assert np.array_equal(unpack(carried.words, bits=bits, columns=k), linear.codes)
    assert np.array_equal(carried.zeros, linear.zeros)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32),
    ROWS,
    st.sampled_from([8, 24, 128]),
    st.sampled_from([(4, True), (4, False), (8, True)]),
)
def test_bytes_of_signed_codes_are_read_and_written_again(
    seed: int, n: int, k: int, form: tuple[int, bool]
) -> None:
    """Of 8 bits also -128, which llm-compressor writes and rounding of ours never chooses."""
    bits, channel = form
    group = k if channel or k != 128 else 128
    linear = foreign.random_linear(np.random.default_rng(seed), n, k, bits=bits, group=group)
    linear.codes[0, 0] = 0
    tensors = foreign.int_quantized(linear)
    size = None if channel or k != 128 else group
    found = recipe(foreign.tensors_settings(bits, size, symmetric=True, activations=True))
    scheme = scheme_of(found)
    assert scheme.name == f"w{bits}a8"
    carried = FORMAT.read(StoredLinear(n=n, k=k, tensors=tensors), found)
    weight, _ = carried_over(carried, k=k, recipe=found, scheme=scheme, group_size=found.group_size)
    assert np.array_equal(unpack(weight.words, bits=bits, columns=k), linear.codes)
    check_packed(weight)
    assert weight.zeros is None
    assert weight.scales.dtype == (np.float32 if size is None else np.float16)
    assert np.array_equal(weight.scales, linear.scales)
    again = FORMAT.write(weight, scheme)
    assert np.array_equal(again["weight"], tensors["weight"])
    assert again["weight"].dtype == np.int8


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), ROWS, st.sampled_from([8, 24, 128]))
def test_words_of_8_bits_without_zero_points_are_read_and_written_again(
    seed: int, n: int, k: int
) -> None:
    linear = foreign.random_linear(np.random.default_rng(seed), n, k, bits=8, group=k)
    tensors = foreign.pack_quantized(linear, symmetric=True)
    found = recipe(foreign.tensors_settings(8, None, symmetric=True))
    scheme = scheme_of(found)
    assert scheme.name == "w8a16"
    carried = FORMAT.read(StoredLinear(n=n, k=k, tensors=tensors), found)
    weight, _ = carried_over(carried, k=k, recipe=found, scheme=scheme, group_size=CHANNEL)
    check_packed(weight)
    assert np.array_equal(unpack(weight.words, bits=8, columns=k), linear.codes)
    assert weight.zeros is None
    again = FORMAT.write(weight, scheme)
    assert again.keys() == tensors.keys()
    for part, array in tensors.items():
        assert np.array_equal(again[part], array), part


def test_golden_bytes_of_8_bits_are_ours() -> None:
    tensors = {
        "weight": np.array([[-127, -1, 0, 100, -128, 127, 1, 2]], np.int8),
        "weight_scale": np.array([[0.5]], np.float32),
    }
    found = recipe(foreign.tensors_settings(8, None, symmetric=True, activations=True))
    carried = FORMAT.read(StoredLinear(n=1, k=8, tensors=tensors), found)
    assert carried.words.tolist() == [[0xE4807F01, 0x8281FF00]]


def test_groups_of_8_bits_are_refused_because_we_have_none() -> None:
    found = recipe(foreign.tensors_settings(8, 128, symmetric=True, activations=True))
    with pytest.raises(FormatError, match="Its groups have 128 columns") as caught:
        fitting_group(scheme_of(found), found.group_size, (256,))
    assert caught.value.code == "E4011"
    assert str(caught.value.why).startswith("w8a8 has groups of channel")


def test_golden_words_are_ours() -> None:
    codes = np.array([[(5 * k + 3) % 8 for k in range(32)]], np.uint8)
    linear = foreign.Linear(
        codes=codes, zeros=np.zeros((1, 1), np.uint8), scales=np.ones((1, 1), np.float16), bits=3
    )
    tensors = foreign.pack_quantized(linear)
    found = recipe(foreign.tensors_settings(3, 32))
    carried = FORMAT.read(StoredLinear(n=1, k=32, tensors=tensors), found)
    assert carried.words.tolist() == [[0x43C67543, 0x7543C675, 0xC67543C6]]


def changed(*path: str, value: object) -> dict[str, object]:
    """Settings with one value replaced."""
    found = copy.deepcopy(foreign.tensors_settings(4, 64))
    place: dict = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


WEIGHTS = ("config_groups", "group_0", "weights")
ACTIVATIONS = ("config_groups", "group_0", "input_activations")
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed("format", value="nvfp4-pack-quantized"), "format"),
        (changed("format", value="marlin-24"), "format"),
        (changed("quantization_status", value="frozen"), "quantization_status"),
        (changed("kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme"),
        (changed("transform_config", value={"config_groups": {"R1": {}}}), "transform_config"),
        (changed("sparsity_config", value={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (changed("config_groups", value={}), "config_groups"),
        (changed("config_groups", value={"a": {}, "b": {}}), "config_groups"),
        (changed("config_groups", value="W4A16"), "config_groups"),
        (changed("config_groups", "group_0", value=None), "no weights"),
        (changed("config_groups", "group_0", "weights", value=None), "no weights"),
        (changed("config_groups", "group_0", "format", value="dense"), "format"),
        (changed("config_groups", "group_0", "output_activations", value=TOKEN), "output_activ"),
        (changed(*WEIGHTS, "type", value="float"), "type"),
        (changed(*WEIGHTS, "dynamic", value=True), "dynamic"),
        (changed(*WEIGHTS, "actorder", value="group"), "actorder"),
        (changed(*WEIGHTS, "actorder", value=True), "actorder"),
        (changed(*WEIGHTS, "strategy", value="tensor"), "strategy"),
        (changed(*WEIGHTS, "strategy", value="block"), "strategy"),
        (changed(*WEIGHTS, "num_bits", value=16), "num_bits"),
        (changed(*WEIGHTS, "group_size", value=None), "group_size"),
        (changed(*WEIGHTS, "group_size", value=-1), "group_size"),
        (changed(*WEIGHTS, "symmetric", value=1), "symmetric"),
        (changed(*ACTIVATIONS, value=TOKEN | {"dynamic": False}), "dynamic"),
        (changed(*ACTIVATIONS, value=TOKEN | {"type": "float"}), "type"),
        (changed(*ACTIVATIONS, value=TOKEN | {"strategy": "tensor"}), "strategy"),
        (changed(*ACTIVATIONS, value=8), "input_activations"),
    ],
)
def test_other_settings_are_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(FormatError, match=said) as caught:
        recipe(config)
    assert caught.value.code == "E4011"


@pytest.mark.parametrize(
    ("part", "array", "code"),
    [
        ("weight_packed", None, "E4103"),
        ("weight_shape", None, "E4103"),
        ("weight_zero_point", None, "E4103"),
        ("weight_shape", np.array([11, 64]), "E4102"),
        ("weight_shape", np.array([12.0, 64.0]), "E4102"),
        ("weight_packed", np.zeros((12, 9), np.int32), "E4102"),
        ("weight_packed", np.zeros((), np.int32), "E4102"),
        ("weight_zero_point", np.zeros((12, 2), np.int8), "E4102"),
        ("weight_zero_point", np.zeros((2, 2), np.float16), "E4102"),
        ("weight_scale", np.zeros((12, 1), np.float16), "E4102"),
        ("weight_g_idx", np.zeros(64, np.int32), "E4011"),
        ("weight", np.zeros((12, 64), np.float16), "E4103"),
    ],
)
def test_tensor_that_is_not_what_the_format_says_is_refused(
    part: str, array: np.ndarray | None, code: str
) -> None:
    linear = foreign.random_linear(np.random.default_rng(0), 12, 64, bits=4, group=32)
    tensors = {**foreign.pack_quantized(linear), part: array}
    if array is None:
        del tensors[part]
    found = recipe(foreign.tensors_settings(4, 32))
    with pytest.raises(FormatError) as caught:
        FORMAT.read(StoredLinear(n=12, k=64, tensors=tensors), found)
    assert caught.value.code == code


def test_zero_points_of_symmetric_codes_are_not_ignored() -> None:
    linear = foreign.random_linear(np.random.default_rng(0), 8, 64, bits=4, group=32)
    found = recipe(foreign.tensors_settings(4, 32, symmetric=True))
    with pytest.raises(FormatError, match="weight_zero_point too") as caught:
        FORMAT.read(StoredLinear(n=8, k=64, tensors=foreign.pack_quantized(linear)), found)
    assert caught.value.code == "E4103"


@pytest.mark.parametrize("code", [-9, 8, 127])
def test_byte_beyond_the_width_is_refused(code: int) -> None:
    linear = foreign.random_linear(np.random.default_rng(0), 8, 64, bits=4, group=64)
    tensors = foreign.int_quantized(linear)
    tensors["weight"][3, 5] = code
    found = recipe(foreign.tensors_settings(4, None, symmetric=True, activations=True))
    with pytest.raises(FormatError, match=f"Codes reach from .*{code}") as caught:
        FORMAT.read(StoredLinear(n=8, k=64, tensors=tensors), found)
    assert caught.value.code == "E4411"


@pytest.mark.parametrize(
    ("scheme", "group"),
    [
        ("w3a16", 64),
        ("w4a16", 128),
        ("w4a8", CHANNEL),
        ("w4a8", 128),
        ("w8a8", CHANNEL),
        ("w8a16", CHANNEL),
    ],
)
def test_settings_written_are_those_read(scheme: str, group: int) -> None:
    kept = Kept(patterns=("lm_head",), modules=("lm_head", "model.vision_tower.fc"))
    written = FORMAT.config(SCHEMES[scheme], group, kept)
    found = recipe(written)
    assert scheme_of(found) is SCHEMES[scheme]
    assert found.group_size == group
    assert written["ignore"] == ["lm_head", "model.vision_tower.fc"]
