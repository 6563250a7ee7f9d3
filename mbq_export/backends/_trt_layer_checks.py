"""What must hold in the layer table of an engine, whatever the compiler made of the graph."""

import math
from dataclasses import replace
from typing import Final

from mbq_export.backends._trt_int8_checks import integer_products
from mbq_export.backends._trt_layers import (
    FLOATS,
    NUMPY_NAMES,
    PLUGIN_ROW,
    Layer,
    LayerTable,
    profile_shapes,
)
from mbq_export.backends.base import EngineGraph, QuantizedLinear
from mbq_export.report import Check

BYTES_TOLERANCE: Final = 0.02
"""A7: share by which constants may differ from the exporter's count."""

PACKED: Final = ("Int4", "Int8")
"""Types of constants that hold codes."""

DROPPED_TYPES: Final = frozenset({"Int64", "Int32", "Bool"})
"""Constants of these types are shapes, indices and masks, which the builder folds away: not counted. Plugins read
theirs as they are."""


def checks_of(table: LayerTable, graph: EngineGraph, *, known: bool) -> tuple[Check, ...]:
    """The checks of a table, or what they found, where nobody has seen a table of this library before.

    Args:
        table: Without a row if it could not be read.
        graph: What was asked for.
        known: Whether these checks were held to tables of this library. If not, a failed one is one that was not run.
    """
    if not table.layers:
        why = "the layer table in the build log could not be read"
        return (Check(name="engine.table", ok=None, tier="engine", why=why),)
    found = checks(table, graph)
    if known:
        return found
    untold = "tables of this library were never seen, so it may mean nothing"
    return tuple(
        replace(each, ok=None, why=f"{each.why}; {untold}") if each.ok is False else each
        for each in found
    )


def checks(table: LayerTable, graph: EngineGraph) -> tuple[Check, ...]:
    """Compare an engine with what was asked for.

    ``A1`` each plugin node is one plugin row and there is no other, ``A2`` each quantized linear multiplies from an Int4 constant, or Int8 of 8 bits, ``A3`` no row writes dequantized weights to
    memory, ``A5`` no other constant of a quantized linear is as large as its weights, ``A6`` attention is fused
    and the cache is updated in place, ``A7`` all constants together weigh what the exporter counted, ``A8``
    inputs, outputs and profile are the contract's.
    """
    found = []
    if graph.plugin_layers:
        found += [_plugins_are_there(table, graph), _plugins_read_rows(table)]
    found += [_weights_stay_integers(table, graph.linears), _no_slow_dequantize(table)]
    if any(linear.act_bits == 8 for linear in graph.linears):
        found.append(integer_products(table, graph.linears))
    found.append(_weights_stay_packed(table, graph.linears))
    if graph.attention_layers is not None:
        found.append(_count("A6.attention", len(_fused_attention(table)), graph.attention_layers))
    if graph.kv_updates is not None:
        found.append(_count("A6.cache", len(_updated_in_place(table)), graph.kv_updates))
    if graph.weight_bytes is not None:
        found.append(_weighs(table, graph.weight_bytes))
    found.append(_same_interface(table, graph))
    return tuple(found)


def _plugins_are_there(table: LayerTable, graph: EngineGraph) -> Check:
    """A1."""
    planned = [name for names in graph.plugin_layers.values() for name in names]
    rows = [node for row in table.layers if row.type == PLUGIN_ROW for node in row.onnx]
    wrong = [name for name in planned if rows.count(name) != 1]
    wrong += sorted(set(rows) - set(planned))
    return _none_of("A1", wrong, f"not one plugin row each, of {len(planned)} planned")


def _plugins_read_rows(table: LayerTable) -> Check:
    """A9: what a plugin reads and writes lies row after row, as its kernels take it, whatever the format is called."""
    bad = [
        row.name
        for row in table.layers
        if row.type == PLUGIN_ROW
        for each in (*row.inputs, *row.constants, *row.outputs)
        if not each.by_rows
    ]
    return _none_of("A9", bad, "a tensor of a plugin is laid out otherwise")


def _weights_stay_integers(table: LayerTable, linears: tuple[QuantizedLinear, ...]) -> Check:
    """A2."""

    def holds(linear: QuantizedLinear) -> bool:
        rows = table.rows_of(linear.node)
        return any(each.type == linear.constant for row in rows for each in row.constants)

    bad = [linear for linear in linears if not holds(linear)]
    kinds = " or ".join(sorted({linear.constant for linear in bad}))
    return _none_of("A2", [linear.node for linear in bad], f"no {kinds} constant")


def _no_slow_dequantize(table: LayerTable) -> Check:
    """A3: a row that reads packed weights and writes as many halves puts a dequantized weight into memory."""
    bad: list[str] = []
    for row in table.layers:
        packed = {each.elements for each in row.constants if each.type in PACKED}
        written = {each.elements for each in row.outputs if each.type in FLOATS}
        if packed & written:
            bad.extend(row.onnx or (row.name,))
    return _none_of("A3", bad, "dequantized to memory before the multiplication")


def _weights_stay_packed(table: LayerTable, linears: tuple[QuantizedLinear, ...]) -> Check:
    """A5: beside its scales a row of linears needs no float constant longer than a bias or a norm's weight."""
    named = {linear.node: linear for linear in linears}
    bad = []
    for row in table.layers:
        here = [named[node] for node in row.onnx if node in named]
        allowed = sum(_scales_of(here))
        for each in row.constants:
            as_long = any(linear.shape[1] in each.dims for linear in here)
            if each.type in FLOATS and as_long and each.elements > allowed:
                nodes = ", ".join(linear.node for linear in here)
                bad.append(f"{nodes} ({each.elements} elements, {allowed} allowed)")
    return _none_of("A5", bad, "a float constant as large as weights")


def _scales_of(linears: list[QuantizedLinear]) -> list[int]:
    """Elements that each linear's scales, or a vector of its inputs or outputs, may have."""
    return [
        max(n * math.ceil(k / (linear.group_size or k)), n, k)
        for linear in linears
        for n, k in (linear.shape,)
    ]


def _fused_attention(table: LayerTable) -> list[Layer]:
    """Rows that are one fused attention kernel; the compiler calls them ``_gemm_mha_v2_..``."""
    return [row for row in table.layers if "_mha_" in row.name]


def _updated_in_place(table: LayerTable) -> list[str]:
    """Outputs that some row reads and writes: cache and output share memory."""
    outputs = {each.name for each in table.io if each.mode == "Output"}
    return [
        each.name
        for row in table.layers
        for each in row.outputs
        if each.name in outputs and each.name in {read.name for read in row.inputs}
    ]


def _weighs(table: LayerTable, expected: int) -> Check:
    """A7."""
    constants = {
        each.name: each.size
        for row in table.layers
        for each in row.constants
        if row.type == PLUGIN_ROW or each.type not in DROPPED_TYPES
    }
    found = sum(constants.values())
    difference = abs(found - expected) / max(expected, 1)
    return Check(
        name="engine.A7",
        ok=difference <= BYTES_TOLERANCE,
        tier="engine",
        value=difference,
        threshold=BYTES_TOLERANCE,
        why=f"constants weigh {found} bytes, the exporter counted {expected}",
    )


def _same_interface(table: LayerTable, graph: EngineGraph) -> Check:
    """A8: names, types and profile shapes."""
    found = {each.name: each for each in table.io}
    wrong = sorted(found.keys() ^ {spec.name for spec in (*graph.inputs, *graph.outputs)})
    for spec in (*graph.inputs, *graph.outputs):
        tensor = found.get(spec.name)
        if tensor is not None and NUMPY_NAMES.get(tensor.type) != spec.dtype:
            wrong.append(f"{spec.name} is {tensor.type}, not {spec.dtype}")
    for spec in graph.inputs:
        shapes = profile_shapes(spec, graph)
        if spec.name in found and found[spec.name].profile not in {(), shapes}:
            wrong.append(f"{spec.name} has profile {found[spec.name].profile}, not {shapes}")
    return _none_of("A8", wrong, "differs from the graph's contract")


def _count(name: str, found: int, expected: int) -> Check:
    return Check(
        name=f"engine.{name}",
        ok=found == expected,
        tier="engine",
        value=found,
        threshold=expected,
        why="" if found == expected else f"expected {expected}, found {found}",
    )


def _none_of(rule: str, bad: list[str], what: str) -> Check:
    """A check that a list of offenders is empty."""
    return Check(
        name=f"engine.{rule}",
        ok=not bad,
        tier="engine",
        value=len(bad),
        threshold=0,
        place=", ".join(bad[:3]),
        why=f"{what}: {', '.join(bad[:3])}{', ..' if len(bad) > 3 else ''}" if bad else "",
    )
