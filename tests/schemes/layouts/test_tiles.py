"""A packed weight becomes tiles and comes back; tiles read by the formulas alone are the weight."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mbq_export.errors import FormatError, UsageError
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight, QuantScheme
from mbq_export.schemes.layouts import dense, tiles, w3t, w4t
from mbq_export.schemes.layouts.tiles import (
    RowOrder,
    TiledWeight,
    coordinates,
    fused,
    nk_of,
    tile,
    untile,
)
from mbq_export.schemes.oracle import dequantized
from tests.schemes.layouts.one_tile import FILLS, MODEL_COLUMNS, golden_tile

PAGE: Final = Path(__file__).parents[3] / "docs" / "formats" / "tiles.md"
PLACES: Final = {"w3a16": w3t.place_of, "w4a16": w4t.place_of, "w4a8": w4t.place_of}
WITH_KERNELS: Final = [name for name, each in SCHEMES.members().items() if each.kernel_layout]
GROUPED: Final = [(name, size) for name in WITH_KERNELS for size in SCHEMES[name].group_sizes]


def weight_of(
    scheme: str, *, n: int, k: int, group_size: int | None = None, seed: int = 0, bias: bool = False
) -> PackedWeight:
    """Random codes, scales and zero points; group scales are normal fp16 numbers."""
    facts, rng = SCHEMES[scheme], np.random.default_rng(seed)
    size = facts.group_size if group_size is None else group_size
    groups = facts.groups_of(k, size)
    scales = 0.01 + rng.random((n, groups))
    return PackedWeight(
        words=dense.pack(rng.integers(0, facts.levels, (n, k), np.uint8), bits=facts.weight_bits),
        scales=scales.astype(np.float32 if size == CHANNEL else np.float16),
        zeros=None if facts.symmetric else rng.integers(0, facts.levels, (n, groups), np.uint8),
        k=k,
        bits=facts.weight_bits,
        group_size=size,
        bias=rng.standard_normal(n).astype(np.float32) if bias else None,
    )


def with_codes(weight: PackedWeight, codes: NDArray[np.uint8]) -> PackedWeight:
    return replace(weight, words=dense.pack(codes, bits=weight.bits))


def assert_equal(found: PackedWeight, expected: PackedWeight) -> None:
    for name in ("words", "scales", "zeros", "bias"):
        one, other = getattr(found, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert one.dtype == other.dtype, name
            np.testing.assert_array_equal(one, other, err_msg=name)
    assert (found.k, found.bits, found.group_size) == (
        expected.k,
        expected.bits,
        expected.group_size,
    )


def read_element(tiled: TiledWeight, n: int, k: int) -> float:
    """(u - z) * s of one element with nothing but the formulas of FORMATS 4 to 8."""
    scheme = SCHEMES[tiled.scheme]
    tile_bytes = tiled.codes[n // 16, k // 128].tobytes()
    places = PLACES[tiled.scheme](n % 16, k % 128)
    code = sum((tile_bytes[byte] >> bit & 1) << e for e, (byte, bit) in enumerate(places))
    half, g = n % 16 // 8, n % 8
    if scheme.symmetric:
        value = code - 16 if code >= 8 else code
    else:
        assert tiled.zeros is not None
        packed = tiled.zeros[n // 16, k // tiled.group_size].tobytes()[g]
        value = code - (packed >> 4 if half else packed & 15)
    if tiled.group_size == CHANNEL:
        return value * float(tiled.scales[n]) * 16
    return value * float(tiled.scales[n // 16, k // tiled.group_size, g, half])


def described(places: list[tuple[int, int]]) -> str:
    """Places as the page words them."""
    in_bytes, bits = ([place[i] for place in places] for i in (0, 1))
    if len(set(in_bytes)) > 1:
        return f"bytes {', '.join(map(str, in_bytes))}, bit {bits[0]} each"
    if len(bits) == 3:
        return f"byte {in_bytes[0]} bits {', '.join(map(str, bits))}"
    return f"byte {in_bytes[0]} bits {bits[0]} .. {bits[-1]}"


def test_the_examples_of_the_page_are_what_the_code_does() -> None:
    page = PAGE.read_text()
    for n, k in ((0, 0), (10, 45), (15, 62), (8, 96), (3, 127)):
        at = coordinates(n, k)
        row = f"| ({n}, {k}) | {at.lane}, {at.slot} | {described(w3t.place_of(n, k))} |"
        assert row in page
    for n, k in ((0, 0), (10, 45), (15, 62), (8, 96)):
        assert f"| ({n}, {k}) | {described(w4t.place_of(n, k))} |" in page
    for layout in (w3t, w4t):
        tile_bytes = layout.pack(golden_tile(layout.BITS), bits=layout.BITS).tobytes()
        digest = hashlib.sha256(tile_bytes).hexdigest()[:16]
        assert f"`{tile_bytes[:16].hex()}` | `{digest}` |" in page


def test_coordinates_and_lane_slots_are_inverse() -> None:
    found = set()
    for n in range(16):
        for k in range(128):
            at = coordinates(n, k)
            assert nk_of(at.lane, at.slot, at.p) == (n, k)
            found.add((at.lane, at.slot, at.p))
    assert len(found) == 32 * 32 * 2


def test_the_worked_example_has_its_coordinates() -> None:
    at = coordinates(10, 45)
    assert (at.half, at.g, at.b, at.t, at.s, at.h, at.p) == (1, 2, 1, 1, 1, 0, 1)
    assert (at.lane, at.slot) == (9, 13)


@pytest.mark.parametrize(("scheme", "group_size"), GROUPED)
@pytest.mark.parametrize(("n", "k"), [(16, 128), (17, 256), (40, 896), (8, 384)])
def test_tiles_read_by_the_formulas_are_the_weight(
    scheme: str, group_size: int, n: int, k: int
) -> None:
    weight = weight_of(scheme, n=n, k=k, group_size=group_size, seed=n)
    tiled, expected = tile(weight, scheme=SCHEMES[scheme]), dequantized(weight)
    rng = np.random.default_rng(k)
    for row, column in zip(rng.integers(0, n, 300), rng.integers(0, k, 300), strict=True):
        assert read_element(tiled, int(row), int(column)) == expected[row, column]


@settings(max_examples=40, deadline=None)
@given(
    which=st.sampled_from(GROUPED),
    n=st.integers(1, 70),
    blocks=st.integers(1, 12),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_untile_returns_the_weight(
    which: tuple[str, int], n: int, blocks: int, bias: bool, seed: int
) -> None:
    scheme, group_size = which
    k = blocks * (group_size or 8)
    weight = weight_of(scheme, n=n, k=k, group_size=group_size, seed=seed, bias=bias)
    assert_equal(untile(tile(weight, scheme=SCHEMES[scheme])), weight)


@pytest.mark.parametrize("k", MODEL_COLUMNS)
@pytest.mark.parametrize("n", [16, 40])
@pytest.mark.parametrize("scheme", WITH_KERNELS)
def test_the_widths_of_real_models_come_back(scheme: str, n: int, k: int) -> None:
    weight = weight_of(scheme, n=n, k=k)
    tiled = tile(weight, scheme=SCHEMES[scheme])
    rows = -(-n // 16)
    assert tiled.codes.shape == (rows, k // 128, 64 * weight.bits)
    assert_equal(untile(tiled), weight)


def test_a_tall_weight_is_packed_in_parts_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of("w3a16", n=100, k=128)
    whole = tile(weight, scheme=SCHEMES["w3a16"]).codes
    monkeypatch.setattr(tiles, "ROWS_AT_ONCE", 32)
    np.testing.assert_array_equal(tile(weight, scheme=SCHEMES["w3a16"]).codes, whole)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("zero", [0, 7])
def test_extreme_codes_and_zero_points_come_back(fill: str, zero: int) -> None:
    weight = weight_of("w3a16", n=32, k=256)
    weight = replace(
        with_codes(weight, FILLS[fill](32, 256, 7)), zeros=np.full((32, 2), zero, np.uint8)
    )
    assert_equal(untile(tile(weight, scheme=SCHEMES["w3a16"])), weight)


@pytest.mark.parametrize(("scheme", "group_size"), GROUPED)
def test_a_one_hot_input_reads_one_column_of_a_tile(scheme: str, group_size: int) -> None:
    """Each column proves its place, because all others are multiplied by 0."""
    weight = weight_of(scheme, n=16, k=128, group_size=group_size, seed=3)
    tiled = tile(weight, scheme=SCHEMES[scheme])
    read = np.array([[read_element(tiled, n, k) for k in range(128)] for n in range(16)])
    np.testing.assert_array_equal(
        np.eye(128) @ read.T, SCHEMES["w3a16"].linear_reference(np.eye(128), weight)
    )


@pytest.mark.parametrize(("scheme", "group_size"), GROUPED)
@pytest.mark.parametrize(("n", "k"), [(17, 64), (24, 192), (1, 64), (40, 160)])
def test_padding_is_zero_in_every_array(scheme: str, group_size: int, n: int, k: int) -> None:
    if group_size and k % group_size:
        k = group_size
    tiled = tile(weight_of(scheme, n=n, k=k, group_size=group_size), scheme=SCHEMES[scheme])
    rows, columns = 16 * len(tiled.codes), 128 * tiled.codes.shape[1]
    layout = {"w3a16": w3t, "w4a16": w4t, "w4a8": w4t}[scheme]
    codes = layout.unpack(tiled.codes.view(np.uint32), bits=layout.BITS, columns=columns)
    assert not codes[n:].any()
    assert not codes[:, k:].any()
    if group_size == CHANNEL:
        assert tiled.scales.shape == (rows,)
        assert not tiled.scales[n:].any()
        return
    whole = replace(tiled, n=rows, k=columns)
    assert not untile(whole).scales[n:].any()
    assert not untile(whole).scales[:, k // group_size :].any()
    if tiled.zeros is not None:
        zeros = untile(whole).zeros
        assert zeros is not None
        assert not zeros[n:].any()
        assert not zeros[:, k // group_size :].any()


def test_the_padding_of_a_row_of_groups_follows_the_tile() -> None:
    tiled = tile(weight_of("w3a16", n=20, k=160, group_size=32), scheme=SCHEMES["w3a16"])
    assert tiled.codes.shape == (2, 2, 192)
    assert tiled.scales.shape == (2, 8, 8, 2)
    assert tiled.zeros is not None
    assert tiled.zeros.shape == (2, 8, 2)


def test_metadata_lies_where_the_format_says() -> None:
    weight = weight_of("w4a16", n=32, k=256)
    tiled = tile(weight, scheme=SCHEMES["w4a16"])
    assert weight.zeros is not None
    assert tiled.zeros is not None
    for row in range(32):
        for group in range(2):
            g, half = row % 8, row % 16 // 8
            assert tiled.scales[row // 16, group, g, half] == weight.scales[row, group]
            byte = tiled.zeros[row // 16, group].tobytes()[g]
            assert (byte >> 4 if half else byte & 15) == weight.zeros[row, group]


def test_w3_reads_808_bytes_per_tile_in_groups_of_128() -> None:
    tiled = tile(weight_of("w3a16", n=16, k=128, bias=True), scheme=SCHEMES["w3a16"])
    assert tiled.nbytes == 768 + 32 + 8
    assert 8 * tiled.nbytes / (16 * 128) == SCHEMES["w3a16"].bits_per_weight(128)


def test_arrays_are_contiguous_little_endian_and_signed() -> None:
    for scheme, group_size in GROUPED:
        tiled = tile(weight_of(scheme, n=40, k=256, group_size=group_size), scheme=SCHEMES[scheme])
        scales = "<f4" if group_size == CHANNEL else "<f2"
        assert (tiled.codes.dtype, tiled.scales.dtype) == (np.dtype("<i4"), np.dtype(scales))
        arrays = [tiled.codes, tiled.scales, *([] if tiled.zeros is None else [tiled.zeros])]
        assert all(array.flags["C_CONTIGUOUS"] for array in arrays)
        assert tiled.zeros is None or tiled.zeros.dtype == np.dtype("<i4")


def test_a_channel_scale_is_stored_as_its_sixteenth() -> None:
    weight = weight_of("w4a8", n=20, k=136)
    tiled = tile(weight, scheme=SCHEMES["w4a8"])
    assert (tiled.scales[:20] * 16).tolist() == weight.scales[:, 0].tolist()


def test_a_signed_nibble_is_the_weight_itself() -> None:
    codes = np.full((16, 128), 8, np.uint8)
    codes[0, 0] = 7  # q = -1, two's complement 15
    tiled = tile(with_codes(weight_of("w4a8", n=16, k=128), codes), scheme=SCHEMES["w4a8"])
    assert tiled.codes.tobytes() == b"\xf0" + bytes(1023)


@pytest.mark.parametrize(
    ("scheme", "change", "code", "words"),
    [
        ("w4a16", {}, "E4102", "A weight of 3 bits with zero points is not w4a16"),
        ("w3a16", {"zeros": None}, "E4102", "A weight of 3 bits without zero points is not w3a16"),
        ("w3a16", {"scales": np.zeros((16, 1), np.float16)}, "E4411", "16 scales"),
    ],
)
def test_a_weight_of_another_format_is_refused(
    scheme: str, change: dict[str, object], code: str, words: str
) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        tile(replace(weight_of("w3a16", n=16, k=128), **change), scheme=SCHEMES[scheme])
    assert caught.value.code == code


def test_a_row_that_kernels_cannot_read_is_refused() -> None:
    with pytest.raises(FormatError, match="rows of 132 activations") as caught:
        tile(weight_of("w4a8", n=16, k=132), scheme=SCHEMES["w4a8"])
    assert caught.value.why.startswith("in_features must be a multiple of 8")


def test_a_group_size_the_scheme_does_not_have_is_refused() -> None:
    weight = weight_of("w4a8", n=16, k=128, group_size=128)
    small = replace(weight, group_size=32, scales=np.ones((16, 4), np.float16))
    with pytest.raises(UsageError, match="w4a8 has no groups of 32") as caught:
        tile(small, scheme=SCHEMES["w4a8"])
    assert caught.value.fix == ("--group-size channel", "--group-size 128")


def test_a_layer_too_wide_for_exact_sums_is_refused() -> None:
    scheme: QuantScheme = SCHEMES["w4a8"]
    assert scheme.largest_k is not None
    assert 127 * 128 * scheme.largest_k < 2**31 <= 127 * 128 * (scheme.largest_k + 1)
    with pytest.raises(UsageError, match="132112 products of w4a8") as caught:
        tile(weight_of("w4a8", n=1, k=132_112), scheme=scheme)
    assert caught.value.code == "E2007"


@pytest.mark.parametrize("bias", [False, True])
def test_concatenated_parts_follow_each_other(bias: bool) -> None:
    parts = [weight_of("w3a16", n=n, k=256, seed=n, bias=bias) for n in (48, 16, 32)]
    found = fused(parts)
    assert found.n == 96
    expected = np.concatenate([dequantized(part) for part in parts])
    np.testing.assert_array_equal(dequantized(found), expected)
    if bias:
        assert found.bias is not None
        stacked = np.concatenate([part.bias for part in parts if part.bias is not None])
        np.testing.assert_array_equal(found.bias, stacked)
    apart = [tile(part, scheme=SCHEMES["w3a16"]).codes for part in parts]
    np.testing.assert_array_equal(tile(found, scheme=SCHEMES["w3a16"]).codes, np.concatenate(apart))


@pytest.mark.parametrize("scheme", WITH_KERNELS)
def test_interleaved_rows_alternate_by_sixteen(scheme: str) -> None:
    gate, up = (weight_of(scheme, n=48, k=128, seed=seed, bias=True) for seed in (1, 2))
    found = fused([gate, up], row_order="interleave16")
    values = dequantized(found)
    assert found.bias is not None
    for row in range(48):
        place = 32 * (row // 16) + row % 16
        for part, at in ((gate, place), (up, place + 16)):
            assert part.bias is not None
            assert values[at].tolist() == dequantized(part)[row].tolist()
            assert found.bias[at] == part.bias[row]


APART: Final = {
    "a part that ends inside a tile": ((("w3a16", 24), ("w3a16", 16)), "concat", "does not end with a tile"),
    "two schemes": ((("w3a16", 16), ("w4a16", 16)), "concat", "their formats differ"),
    "three interleaved": ((("w3a16", 16),) * 3, "interleave16", "takes two parts"),
    "unequal interleaved": ((("w3a16", 16), ("w3a16", 32)), "interleave16", "parts of equal size"),
    "none": ((), "concat", "there are none"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "order", "reason"), APART.values(), ids=APART)
def test_parts_that_cannot_be_one_matrix_are_refused(
    parts: tuple[tuple[str, int], ...], order: RowOrder, reason: str
) -> None:
    weights = [weight_of(scheme, n=n, k=128) for scheme, n in parts]
    with pytest.raises(FormatError, match=reason) as caught:
        fused(weights, row_order=order)
    assert caught.value.code == "E4102"


def test_parts_of_two_widths_or_with_one_bias_are_refused() -> None:
    narrow, wide = weight_of("w3a16", n=16, k=128), weight_of("w3a16", n=16, k=256)
    with pytest.raises(FormatError, match="their inputs differ in width"):
        fused([narrow, wide])
    with pytest.raises(FormatError, match="only some have a bias"):
        fused([narrow, weight_of("w3a16", n=16, k=128, bias=True)])


def test_a_format_without_a_kernel_is_refused_with_what_runs_it() -> None:
    with pytest.raises(UsageError, match="No kernel multiplies weights of w8a8") as caught:
        tile(weight_of("w8a8", n=16, k=128), scheme=SCHEMES["w8a8"])
    assert caught.value.code == "E2006"
    assert caught.value.why == f"kernels and plugins exist for {', '.join(WITH_KERNELS)}"
    assert caught.value.fix[0] == "--lowering qdq: standard operators"
