"""A4 on tables that TensorRT for RTX 1.7.1.116 printed for `rounded_graphs.rounded_linear`, in both types.

``rounded`` surrounds the integers with float32, as our graphs do; ``rounded_half`` with float16: its product is written
as Half before the scales come. ``rounded_bytes`` is ``rounded`` with weights of 8 bits, ``channel_bytes`` has such
weights alone.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mbq_export.backends import rtx
from mbq_export.backends._trt_int8_checks import integer_products
from mbq_export.backends._trt_layer_checks import checks
from mbq_export.backends._trt_layers import LayerTable
from mbq_export.backends.base import EngineGraph, EngineRequest
from mbq_export.progress import silent
from mbq_export.target import Target
from tests.backends import rounded_graphs

RECORDED = Path(__file__).parents[1] / "golden" / "trt_layers"


def table_of(name: str) -> LayerTable:
    return LayerTable.parse((RECORDED / f"rtx_1.7.1_{name}.log").read_text().split("\n"))


@pytest.fixture
def graph(tmp_path: Path) -> EngineGraph:
    return rounded_graphs.rounded_linear(tmp_path)


def test_integer_product_with_wide_sums_passes(graph: EngineGraph) -> None:
    check = integer_products(table_of("rounded"), graph.linears)
    assert (check.name, check.ok, check.value) == ("engine.A4", True, 0)


def test_sums_as_half_fail_and_the_reason_is_overflow(graph: EngineGraph) -> None:
    check = integer_products(table_of("rounded_half"), graph.linears)
    assert (check.ok, check.value) == (False, 1)
    assert check.place == "n.sums writes its sums as Half"
    assert "may pass 65504" in check.why


def test_sums_as_bfloat16_fail(graph: EngineGraph) -> None:
    """It holds numbers that large, but only 8 bits of them; the table is that of Half with the other name."""
    rows = table_of("rounded_half").layers
    narrow = tuple(
        replace(
            row,
            outputs=tuple(
                replace(each, type="BFloat16" if each.type == "Half" else each.type)
                for each in row.outputs
            ),
        )
        for row in rows
    )
    check = integer_products(replace(table_of("rounded_half"), layers=narrow), graph.linears)
    assert check.place == "n.sums writes its sums as BFloat16"


def test_a_linear_that_multiplies_no_integers_fails(graph: EngineGraph) -> None:
    table = table_of("rounded")
    without = replace(table, layers=tuple(row for row in table.layers if row.type != "gemm"))
    check = integer_products(without, graph.linears)
    assert (check.ok, check.place) == (False, "n.sums multiplies no integers")


def test_a_linear_that_got_lost_fails(graph: EngineGraph) -> None:
    lost = replace(graph.linears[0], node="layers.7.q_proj")
    check = integer_products(table_of("rounded"), [lost])
    assert check.place == "layers.7.q_proj multiplies no integers"


def test_linears_of_16_bit_activations_are_passed_over(graph: EngineGraph) -> None:
    assert integer_products(table_of("packed"), [replace(graph.linears[0], act_bits=16)]).ok


def failed(name: str, graph: EngineGraph) -> set[str]:
    return {check.name for check in checks(table_of(name), graph) if not check.ok}


def test_weights_of_8_bits_pass_as_int8_and_are_no_int4(tmp_path: Path) -> None:
    rounded = rounded_graphs.rounded_linear(tmp_path, bits=8)
    assert not failed("rounded_bytes", rounded)
    assert not failed("channel_bytes", rounded_graphs.channel_linear(tmp_path))
    narrow = replace(rounded, linears=(replace(rounded.linears[0], bits=4),))
    assert failed("rounded_bytes", narrow) == {"engine.A2"}
    why = next(each.why for each in checks(table_of("rounded_bytes"), narrow) if not each.ok)
    assert why == "no Int4 constant: n.sums"


def test_weights_of_8_bits_that_are_written_to_memory_fail(tmp_path: Path) -> None:
    """A made table: the product's row, writing as many halves as it has codes."""
    graph, table = rounded_graphs.channel_linear(tmp_path), table_of("channel_bytes")
    whole = (rounded_graphs.K, rounded_graphs.N)
    rows = tuple(
        replace(row, outputs=tuple(replace(each, dims=whole) for each in row.outputs))
        for row in table.layers
    )
    found = {check.name: check.ok for check in checks(replace(table, layers=rows), graph)}
    assert found["engine.A3"] is False


@pytest.mark.trt
@pytest.mark.parametrize("kind", ["rounded", "channel"])
def test_the_library_here_keeps_weights_of_8_bits(tmp_path: Path, kind: str) -> None:
    if kind == "rounded":
        graph = rounded_graphs.rounded_linear(tmp_path, bits=8)
    else:
        graph = rounded_graphs.channel_linear(tmp_path)
    request = EngineRequest(
        graphs=(graph,), target=Target.parse("rtx4090:rtx"), out=tmp_path / "out"
    )
    built = rtx.BACKEND.build(request, silent).engines["decoder"].checks
    assert not [check.name for check in built if not check.ok]


@pytest.mark.trt
@pytest.mark.parametrize(("island", "ok"), [(np.float32, True), (np.float16, False)])
def test_the_library_here_builds_what_was_recorded(
    tmp_path: Path, island: type[np.floating], ok: bool
) -> None:
    graph = rounded_graphs.rounded_linear(tmp_path, island=island)
    request = EngineRequest(
        graphs=(graph,), target=Target.parse("rtx4090:rtx"), out=tmp_path / "out"
    )
    checks = rtx.BACKEND.build(request, silent).engines["decoder"].checks
    assert {check.name: check.ok for check in checks}["engine.A4"] is ok
