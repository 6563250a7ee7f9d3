"""What must hold in a layer table, on tables that TensorRT for RTX 1.7.1.116 printed (see `test__trt_layers`)."""

from dataclasses import replace
from pathlib import Path

import pytest

from mbq_export.backends._trt_layer_checks import checks, checks_of
from mbq_export.backends._trt_layers import LayerTable
from mbq_export.backends.base import EngineGraph
from mbq_export.report import Check
from tests.backends import trt_graphs

RECORDED = Path(__file__).parents[1] / "golden" / "trt_layers"


def table_of(name: str) -> LayerTable:
    return LayerTable.parse(lines_of(name))


def lines_of(name: str) -> list[str]:
    return (RECORDED / f"rtx_1.7.1_{name}.log").read_text().split("\n")


@pytest.fixture
def graph(tmp_path: Path) -> EngineGraph:
    return trt_graphs.decoder_block(tmp_path)


def verdicts(table: LayerTable, graph: EngineGraph) -> dict[str, bool | None]:
    return {check.name.removeprefix("engine."): check.ok for check in checks(table, graph)}


def found(table: LayerTable, graph: EngineGraph, name: str) -> Check:
    return next(check for check in checks(table, graph) if check.name == f"engine.{name}")


def test_packed_engine_passes_every_check(graph: EngineGraph) -> None:
    assert verdicts(table_of("packed"), graph) == {
        "A2": True,
        "A3": True,
        "A5": True,
        "A6.attention": True,
        "A6.cache": True,
        "A7": True,
        "A8": True,
    }


def test_what_is_found_in_a_table_never_seen_before_fails_nothing(graph: EngineGraph) -> None:
    """Full TensorRT names its kernels otherwise; a verdict on them would be a guess."""
    table = table_of("slow")
    known = {check.name: check for check in checks_of(table, graph, known=True)}
    untold = {check.name: check for check in checks_of(table, graph, known=False)}
    assert known.keys() == untold.keys()
    for name, check in known.items():
        assert untold[name].ok is (True if check.ok else None)
        assert untold[name].value == check.value
    assert "tables of this library were never seen" in untold["engine.A2"].why


def test_table_that_could_not_be_read_says_so(graph: EngineGraph) -> None:
    (check,) = checks_of(LayerTable(layers=(), io=()), graph, known=False)
    assert (check.name, check.ok) == ("engine.table", None)
    assert "could not be read" in check.why


def test_dequantization_at_run_time_fails_a2_and_a3(graph: EngineGraph) -> None:
    table = table_of("slow")
    assert not verdicts(table, graph)["A2"]
    check = found(table, graph, "A3")
    assert check.ok is False
    assert check.value == 4
    assert "dequantized to memory before the multiplication: n.layers.0." in check.why


def test_float_weights_fail_a2_a5_and_a7(graph: EngineGraph) -> None:
    table = table_of("float")
    failed = {name for name, ok in verdicts(table, graph).items() if not ok}
    assert failed == {"A2", "A5", "A7"}
    assert "layers.0.o_proj (16384 elements, 256 allowed)" in found(table, graph, "A5").why
    assert "layers.0.q_proj" in found(table, graph, "A2").place


def test_linear_that_vanished_fails_a2(graph: EngineGraph) -> None:
    table = table_of("packed")
    rest = tuple(row for row in table.layers if "layers.0.o_proj" not in row.onnx)
    check = found(replace(table, layers=rest), graph, "A2")
    assert (check.ok, check.place) == (False, "layers.0.o_proj")


def test_decomposed_attention_fails_a6(graph: EngineGraph) -> None:
    table = table_of("packed")
    rest = tuple(row for row in table.layers if "_mha_" not in row.name)
    check = found(replace(table, layers=rest), graph, "A6.attention")
    assert (check.ok, check.why) == (False, "expected 1, found 0")


def test_cache_that_is_copied_fails_a6(graph: EngineGraph) -> None:
    """A row that writes an output without reading it copies the cache instead of updating it in place."""
    table = table_of("packed")
    copied = tuple(
        replace(row, inputs=tuple(each for each in row.inputs if "present" not in each.name))
        for row in table.layers
    )
    check = found(replace(table, layers=copied), graph, "A6.cache")
    assert (check.ok, check.value, check.threshold) == (False, 0, 2)


def test_checks_that_do_not_apply_are_left_out(graph: EngineGraph) -> None:
    plain = replace(graph, attention_layers=None, kv_updates=None, weight_bytes=None)
    assert set(verdicts(table_of("packed"), plain)) == {"A2", "A3", "A5", "A8"}


@pytest.mark.parametrize(
    ("share", "ok"), [(1.0, True), (0.985, True), (0.97, False), (1.03, False)]
)
def test_constants_may_differ_by_two_percent(graph: EngineGraph, share: float, ok: bool) -> None:
    assert graph.weight_bytes is not None
    other = replace(graph, weight_bytes=round(graph.weight_bytes * share))
    assert verdicts(table_of("packed"), other)["A7"] is ok


def test_a_constant_that_two_rows_read_counts_once(graph: EngineGraph) -> None:
    table = table_of("packed")
    (row,) = table.rows_of("layers.0.o_proj")
    twice = replace(table, layers=(*table.layers, replace(row, name="again")))
    assert found(twice, graph, "A7").value == found(table, graph, "A7").value


def test_other_name_type_or_profile_fails_a8(graph: EngineGraph) -> None:
    table = table_of("packed")
    x = graph.inputs[0]
    for spec, words in (
        (replace(x, name="inputs_embeds"), "inputs_embeds, x"),
        (replace(x, dtype="float32"), "x is Half, not float32"),
        (replace(x, shape=(1, "sequence_length", 64)), "x has profile"),
    ):
        check = found(table, replace(graph, inputs=(spec, *graph.inputs[1:])), "A8")
        assert check.ok is False
        assert words in check.why
