"""Bytes are those of the tensors; times are looked up, and a missing one is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from mbq_export.errors import FormatError, UsageError
from mbq_export.families.base import linear_shapes
from mbq_export.quantize.unit_costs import LatencyTable, UnitShape, packed_bytes, unit_shapes
from mbq_export.schemes import SCHEMES
from tests.questions import tiny_model
from tests.tiny import load_tiny, tiny_checkpoint

W3, W4 = SCHEMES["w3a16"], SCHEMES["w4a16"]


def table(path: Path, rows: list[Any], schema: str = "mbq-export/latency@1") -> Path:
    path.write_text(json.dumps({"schema": schema, "rows": rows}))
    return path


def row(scheme: str, us: object, **changed: object) -> dict[str, object]:
    return {"scheme": scheme, "group_size": 64, "n": 256, "k": 128, "us": us, **changed}


def test_bytes_of_a_unit_can_be_counted_by_hand() -> None:
    shape = UnitShape(rows=(2, 1), columns=64)
    assert packed_bytes(shape, W3, 32) == 3 * (24 + 2 * 3)
    assert packed_bytes(shape, W4, 64) == 3 * (32 + 3)


@pytest.mark.parametrize("scheme", ["w3a16", "w4a16"])
def test_bytes_of_all_units_are_those_of_the_checkpoint(tmp_path: Path, scheme: str) -> None:
    model = load_tiny(tmp_path / "model")
    checkpoint = tiny_checkpoint(tmp_path / "c", model, scheme=scheme)
    units = unit_shapes(model.family, linear_shapes(model.text))
    counted = model.text.layers * sum(
        packed_bytes(shape, SCHEMES[scheme], 64) for shape in units.values()
    )
    stored = 0
    for name in checkpoint.linears:
        weight = checkpoint.packed(name)
        assert weight.zeros is not None
        stored += weight.words.nbytes + weight.scales.nbytes + weight.zeros.nbytes
    assert counted == stored


def test_units_have_the_rows_of_all_their_linears() -> None:
    model = tiny_model()
    units = unit_shapes(model.family, linear_shapes(model.text))
    assert units["qkv"] == UnitShape(rows=(128, 64, 64), columns=128)
    assert units["gate_up"].weights == 2 * 256 * 128


def test_a_time_is_found_by_the_shape_of_the_fused_unit(tmp_path: Path) -> None:
    rows = [row("w3a16", 2.5), row("w4a16", 3), row("w4a16", 2.75)]
    times = LatencyTable.read(table(tmp_path / "t.json", rows))
    shape = UnitShape(rows=(128, 64, 64), columns=128)
    assert times.nanoseconds(shape, W3, 64) == 2500
    assert times.nanoseconds(shape, W4, 64) == 2750  # the better of two measurements


def test_a_missing_shape_is_named(tmp_path: Path) -> None:
    times = LatencyTable.read(table(tmp_path / "t.json", [row("w3a16", 2.5)]))
    told = r"t\.json has no time of w4a16 g64, 256 x 128"
    with pytest.raises(UsageError, match=told) as caught:
        times.nanoseconds(UnitShape(rows=(256,), columns=128), W4, 64)
    assert caught.value.code == "E2001"
    assert "--shapes 256x128" in str(caught.value.fix)


def test_the_kernel_benchmark_is_read_where_it_timed_cuda_kernels_at_one_token(
    tmp_path: Path,
) -> None:
    def timed(us: float | None, **changed: object) -> dict[str, object]:
        like = {"source": "cuda", "dtype": "float16", "m": 1}
        timing = None if us is None else {"median_us": us}
        return {**row("w3a16", None), **like, "timing": timing, **changed}

    rows = [
        timed(4.0),
        timed(1.0, source="triton"),
        timed(1.0, dtype="bfloat16"),
        timed(1.0, m=8),
        timed(None, scheme="w4a16"),
    ]
    times = LatencyTable.read(table(tmp_path / "k.json", rows, "mbq-export/kernels@1")).times
    assert times == {("w3a16", 64, 256, 128): 4000}


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (row("w3a16", -1), "the time of a row is -1"),
        (row("w3a16", "fast"), "the time of a row is 'fast'"),
        (row("w3a16", True), "the time of a row is True"),
        (row("w3a16", 1.0, n="256"), "n of a row is '256'"),
        ([1], "a row is no object"),
    ],
)
def test_a_malformed_row_is_refused(tmp_path: Path, bad: Any, told: str) -> None:
    with pytest.raises(FormatError, match=told) as caught:
        LatencyTable.read(table(tmp_path / "t.json", [bad]))
    assert caught.value.code == "E4102"


def test_another_file_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="its schema is 'mbq-export/calib@1'"):
        LatencyTable.read(table(tmp_path / "t.json", [], "mbq-export/calib@1"))
