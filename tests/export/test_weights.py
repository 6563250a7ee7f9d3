"""Constants made block by block equal those made in one piece."""

import io
import os
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from mbq_export.errors import FormatError, InternalError
from mbq_export.export import weights
from mbq_export.export.weights import PackedSource, StreamedTensor
from mbq_export.schemes.layouts.dense import unpack
from tests.export.one_linear import Shelf, packed, random_packed, source_of


def written(tensor: ir.TensorProtocol) -> bytes:
    file = io.BytesIO()
    tensor.tofile(file)  # type: ignore[attr-defined]
    return file.getvalue()


@pytest.fixture(params=[3, 4])
def source(request: pytest.FixtureRequest) -> PackedSource:
    """Two linears of one input, stacked."""
    rng = np.random.default_rng(request.param)
    shelf = Shelf(
        {
            "a": random_packed(rng, n=32, k=384, bits=request.param, group_size=64),
            "b": random_packed(rng, n=16, k=384, bits=request.param, group_size=64),
        }
    )
    return PackedSource.of(shelf, "a").stacked(PackedSource.of(shelf, "b"))  # type: ignore[arg-type]


def codes_of(source: PackedSource) -> np.ndarray:
    return np.concatenate([unpack(w.words, bits=w.bits, columns=w.k) for w in source.weights()])


def test_stacked_source_lists_its_parts(source: PackedSource) -> None:
    assert (source.modules, source.n, source.row_counts) == (("a", "b"), 48, (32, 16))


def test_codes_come_in_blocks_of_whole_groups(
    source: PackedSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 48 * 128)
    blocks = list(source.codes())
    assert [columns.start for columns, _ in blocks] == [0, 128, 256]
    np.testing.assert_array_equal(
        np.concatenate([codes for _, codes in blocks]), codes_of(source).T
    )


def test_words_are_those_of_the_checkpoint(source: PackedSource) -> None:
    wanted = b"".join(weight.words.tobytes() for weight in source.weights())
    assert written(weights.words_tensor("q", source)) == wanted


def test_signed_codes_are_code_minus_zero_point() -> None:
    source = source_of(random_packed(np.random.default_rng(0), n=16, k=64, bits=3, group_size=32))
    tensor = weights.signed_codes_tensor("q", source, minus_zero=True)
    wanted = codes_of(source).T.astype(int) - np.repeat(source.zeros().T.astype(int), 32, axis=0)
    assert tensor.dtype == ir.DataType.INT4
    np.testing.assert_array_equal(tensor.numpy().astype(int), wanted)


def test_nibbles_are_written_with_the_earlier_column_in_the_low_half() -> None:
    codes = np.zeros((2, 32), int)
    codes[:, 0] = [5, 1]  # column 0 of rows 0 and 1: neighbours once transposed
    source = source_of(packed(codes, bits=3, group_size=32, zeros=0))
    assert written(weights.signed_codes_tensor("q", source, minus_zero=True))[:2] == bytes(
        [0x15, 0]
    )


@pytest.mark.parametrize("make", [weights.unsigned_codes_tensor, weights.unsigned_zeros_tensor])
def test_what_is_written_reads_back_as_the_same_nibbles(make: object, source: PackedSource) -> None:
    tensor = make("q", source)  # type: ignore[operator]
    whole = ir.PackedTensor(
        np.frombuffer(written(tensor), np.uint8), tensor.dtype, shape=tensor.shape, name="q"
    )
    np.testing.assert_array_equal(whole.numpy().astype(int), tensor.numpy().astype(int))
    assert tensor.numpy().dtype == ml_dtypes.uint4


def test_block_scales_are_transposed_and_exact_in_float32(source: PackedSource) -> None:
    tensor = weights.block_scales_tensor("s", source, ir.DataType.FLOAT)
    np.testing.assert_array_equal(tensor.numpy(), source.scales().T.astype(np.float32))
    assert written(tensor) == np.ascontiguousarray(tensor.numpy()).tobytes()


def test_offsets_are_what_the_middle_gets_wrong() -> None:
    source = source_of(
        packed(np.zeros((1, 32)), bits=4, group_size=32, zeros=6, scales=np.full((1, 1), 0.5))
    )
    np.testing.assert_array_equal(weights.offsets_tensor("o", source).numpy(), [[(6 - 8) * 0.5]])


def test_symmetric_codes_have_the_middle_as_zero_point() -> None:
    source = source_of(packed(np.zeros((2, 32)), bits=4, group_size=32, zeros=None))
    np.testing.assert_array_equal(source.zeros(), [[8], [8]])


def test_four_bit_codes_minus_zero_point_do_not_fit_and_are_refused() -> None:
    source = source_of(packed(np.full((2, 32), 15), bits=4, group_size=32, zeros=0))
    with pytest.raises(InternalError, match=r"Signed codes span 15 .. 15 and do not fit INT4"):
        weights.signed_codes_tensor("q", source, minus_zero=True).numpy()


def test_float_linear_is_transposed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 20)
    matrix = np.arange(60, dtype=np.float32).reshape(6, 10)
    tensor = weights.transposed_tensor(
        "w", lambda: matrix, shape=(10, 6), dtype=ir.DataType.FLOAT16
    )
    assert written(tensor) == matrix.T.astype(np.float16).tobytes()


def test_number_that_fp16_cannot_hold_is_named() -> None:
    values = np.array([1.0, 7e4, -1e9], np.float32)
    tensor = weights.plain_tensor(
        "norm.weight", lambda: values, shape=(3,), dtype=ir.DataType.FLOAT16
    )
    with pytest.raises(FormatError, match=r"2 values of norm.weight are not finite in float16"):
        tensor.tobytes()


def test_constant_that_yields_too_little_is_a_bug_of_ours() -> None:
    tensor = StreamedTensor(
        "w", dtype=ir.DataType.FLOAT, shape=(4,), blocks=lambda: iter([np.zeros(3, np.float32)])
    )
    with pytest.raises(InternalError, match="w yielded 12 bytes instead of 16"):
        written(tensor)


def test_writing_a_large_weight_holds_one_block_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unpacked, the weight has 4 MB of codes; a block has a sixteenth of that."""
    monkeypatch.setattr(weights, "BLOCK_ELEMENTS", 1 << 18)
    rng = np.random.default_rng(0)
    source = source_of(random_packed(rng, n=1024, k=4096, bits=3, group_size=128))
    tensor = weights.signed_codes_tensor("q", source, minus_zero=True)
    with Path(os.devnull).open("wb") as file:
        tracemalloc.start()
        tensor.tofile(file)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 << 20
