"""Activations to int8, tiles back to weights, and reading: bit for bit, on the emulated library."""

import ctypes
from collections.abc import Iterator
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, PackedWeight
from mbq_export.schemes.integers import quantize_activations
from mbq_export.schemes.layouts import dense
from mbq_export.schemes.layouts.tiles import tile
from mbq_export.schemes.oracle import dequantized
from mbq_kernels.cases import DTYPES, ragged_columns
from mbq_kernels.library import SCHEME_IDS, DeviceStruct, LinearCall
from mbq_kernels.testing import Case, Kind
from tests.kernels.emulated import Buffer
from tests.kernels.emulated_linear import (
    DTYPE_NAMES,
    FORCED_GEMM,
    SETTINGS,
    Emulator,
    Setting,
    as_bytes,
    described,
)

BYTE_ORDER: Final = (0, 2, 1, 3)
"""Column of each byte of four."""
GEMM_IDS: Final = (101, 105, 109, 112, 114, 116, 117, 120)
"""One config of each block shape."""
ONE_SM: Final = DeviceStruct(sm=90, sm_count=1, smem_optin=232448, l2_bytes=52428800)
H100: Final = DeviceStruct(sm=90, sm_count=132, smem_optin=232448, l2_bytes=52428800)

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_group_size = pytest.mark.parametrize(
    ("scheme", "group_size"),
    [(name, size) for name in SCHEME_IDS for size in SCHEMES[name].group_sizes],
)


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator.unbroken()


def quantized(
    emulator: Emulator, x: Tensor, setting: Setting
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(M, 128 * ceil(K / 128)) bytes as stored, and (M,) scales."""
    m, k = x.shape
    source = Buffer.of(as_bytes(x))
    codes = Buffer(m * -(-k // 128) * 128, writable=True)
    scales = Buffer(4 * m, writable=True)
    codes.bytes[:], scales.bytes[:] = setting.poison, setting.poison
    everything = [source, codes, scales]
    emulator.set_up(setting, everything)
    emulator.library.quant_act(
        dtype=DTYPE_NAMES[x.dtype], m=m, k=k, x=source.pointer, xq=codes.pointer, sx=scales.pointer
    )
    emulator.finish(everything)
    return codes.bytes.view(np.int8).reshape(m, -1).copy(), scales.bytes.view(np.float32).copy()


def assert_quantized(emulator: Emulator, x: Tensor) -> None:
    """Equal to the scheme's formula under every order of threads, and zero behind K."""
    with np.errstate(over="ignore"):
        codes, scales = quantize_activations(x.float().numpy())
    padding = -x.shape[1] % 128
    padded = np.pad(codes, ((0, 0), (0, padding)))
    stored = padded.reshape(len(codes), -1, 4)[:, :, BYTE_ORDER].reshape(padded.shape)
    for setting in SETTINGS:
        got, got_scales = quantized(emulator, x, setting)
        np.testing.assert_array_equal(got, stored)
        np.testing.assert_array_equal(got_scales.view(np.uint32), scales.view(np.uint32))


@each_dtype
@pytest.mark.parametrize("kind", [Kind.RANDOM, Kind.TIES, Kind.OUTLIERS, Kind.ZEROS, Kind.ONE_HOT])
def test_activations_are_rounded_as_the_format_says(
    emulator: Emulator, dtype: torch.dtype, kind: Kind
) -> None:
    for k in (8, 128, 136, 200, 896):
        case = Case(scheme="w4a8", dtype=dtype, m=5, n=16, k=k, group_size=CHANNEL, kind=kind)
        assert_quantized(emulator, case.make(k).x)


@each_dtype
def test_rows_longer_than_a_block_has_threads_are_rounded_whole(
    emulator: Emulator, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 18944, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[0, -1], x[1, 8 * 1024] = 9, -9  # the largest lie outside a thread's first eight
    assert_quantized(emulator, x)


@each_dtype
def test_every_finite_number_is_rounded_beside_every_magnitude(
    emulator: Emulator, dtype: torch.dtype
) -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)]
    ordered = finite[finite.float().abs().argsort(stable=True)]
    assert_quantized(emulator, ordered.view(-1, 256))


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_row(
    emulator: Emulator, dtype: torch.dtype, bad: float
) -> None:
    clean = torch.randn(3, 136, generator=torch.Generator().manual_seed(5)).to(dtype)
    x = clean.clone()
    x[1, 77] = bad
    got, scales = quantized(emulator, x, Setting())
    wanted, clean_scales = quantized(emulator, clean, Setting())
    np.testing.assert_array_equal(got[[0, 2]], wanted[[0, 2]])
    np.testing.assert_array_equal(scales[[0, 2]], clean_scales[[0, 2]])
    assert not got[1].any()
    assert not np.isfinite(scales[1]), "0 * scale has to be NaN"


def row_major(
    emulator: Emulator, call: LinearCall, buffers: list[Buffer], setting: Setting
) -> Tensor:
    """(N, K) weights by the library."""
    dtype = next(dtype for dtype, name in DTYPE_NAMES.items() if name == call.dtype)
    weights = Buffer(2 * call.n * call.k, writable=True)
    weights.bytes[:] = setting.poison
    everything = [*buffers, weights]
    emulator.set_up(setting, everything)
    emulator.library.dequant(call, weights=weights.pointer)
    emulator.finish(everything)
    return torch.from_numpy(weights.bytes.copy()).view(dtype).view(call.n, call.k)


def once_rounded(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """(N, K) weights: the product in float32, which for fp16 scales is exact, then one rounding."""
    return torch.from_numpy(dequantized(packed).astype(np.float32)).to(dtype)


def assert_same_bits(got: Tensor, wanted: Tensor) -> None:
    """As integers: NaN and the sign of zero count."""
    np.testing.assert_array_equal(got.view(torch.int16).numpy(), wanted.view(torch.int16).numpy())


def dequant_cases(scheme: str, group_size: int, dtype: torch.dtype) -> Iterator[Case]:
    """Ragged and whole shapes, extreme codes."""
    base = {"scheme": scheme, "dtype": dtype, "m": 1, "group_size": group_size}
    for k in (128, 640, *ragged_columns(group_size)):
        yield Case(**base, n=40, k=k)
    for kind in (Kind.MAX_CODES, Kind.MIN_CODES, Kind.SMALL_SCALES):
        yield Case(**base, n=16, k=256, kind=kind)


@each_dtype
@each_group_size
def test_dequantized_weights_are_rounded_once(
    emulator: Emulator, dtype: torch.dtype, scheme: str, group_size: int
) -> None:
    for case in dequant_cases(scheme, group_size, dtype):
        problem = case.make(1)
        buffers, call = described(problem)
        for setting in SETTINGS[:2]:
            got = row_major(emulator, call, list(buffers.values()), setting)
            assert_same_bits(got, once_rounded(problem.packed, dtype))


@each_dtype
@pytest.mark.parametrize("scheme", ["w3a16", "w4a16"])
@pytest.mark.parametrize("zero", [0, 5])
def test_every_scale_times_every_code_is_rounded_once(
    emulator: Emulator, dtype: torch.dtype, scheme: str, zero: int
) -> None:
    """All positive fp16 scales, spread over 16 rows of groups of 32; every code occurs in each group."""
    positive = np.arange(0x0001, 0x7C00, dtype=np.uint16).view(np.float16)
    patterns = np.append(positive, np.float16(1)).reshape(16, -1)
    quant = SCHEMES[scheme]
    groups = patterns.shape[1]
    codes = np.tile(np.arange(32, dtype=np.uint8) % quant.levels, (16, groups))
    packed = PackedWeight(
        words=dense.pack(codes, bits=quant.weight_bits),
        scales=patterns,
        zeros=np.full(patterns.shape, zero, np.uint8),
        k=32 * groups,
        bits=quant.weight_bits,
        group_size=32,
        bias=None,
    )
    tiled = tile(packed, scheme=quant)
    assert tiled.zeros is not None
    buffers = [Buffer.of(part) for part in (tiled.codes, tiled.scales, tiled.zeros)]
    call = LinearCall(
        scheme=scheme,
        dtype=DTYPE_NAMES[dtype],
        n=16,
        k=packed.k,
        group_size=32,
        codes=buffers[0].pointer,
        scales=buffers[1].pointer,
        zeros=buffers[2].pointer,
    )
    with np.errstate(over="ignore"):
        assert_same_bits(row_major(emulator, call, buffers, Setting()), once_rounded(packed, dtype))


@each_dtype
@pytest.mark.parametrize("scheme", ["w3a16", "w4a16"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_gemm_multiplies_by_the_dequantized_weights(
    emulator: Emulator, dtype: torch.dtype, scheme: str, group_size: int
) -> None:
    """Rows of the identity pick single weights: sums of one product are exact."""
    case = Case(
        scheme=scheme, dtype=dtype, m=256, n=48, k=256, group_size=group_size, kind=Kind.ONE_HOT
    )
    problem = case.make(0)
    wanted = once_rounded(problem.packed, dtype).T
    for config in GEMM_IDS:
        assert config >= FORCED_GEMM
        assert_same_bits(
            emulator.linear(problem, Setting(), config).contiguous(), wanted.contiguous()
        )


@pytest.mark.parametrize("device", [ONE_SM, H100], ids=["one-sm", "h100"])
@pytest.mark.parametrize("vectors", [1, 255, 1024, 1025, 3 * 8 * 1024 + 77])
def test_reading_adds_every_word_once(
    emulator: Emulator, device: DeviceStruct, vectors: int
) -> None:
    rng = np.random.default_rng(vectors)
    words = rng.integers(0, 2**32, 4 * vectors, dtype=np.uint32)
    source, total = Buffer.of(words), Buffer(16, writable=True)
    emulator.library.cdll.mbq_emulation_device(ctypes.byref(device))
    try:
        for setting in SETTINGS:
            total.bytes[:] = setting.poison
            emulator.set_up(setting, [source, total])
            emulator.library.read_bw(data=source.pointer, size=words.nbytes, total=total.pointer)
            emulator.finish([source, total])
            found = total.bytes.view(np.uint32)
            assert found[0] == words.sum(dtype=np.uint32)
            assert (found[1:].view(np.uint8) == setting.poison).all()
    finally:
        emulator.library.cdll.mbq_emulation_device(ctypes.byref(H100))
