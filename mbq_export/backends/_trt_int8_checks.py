"""A4: linears that round their activations multiply integers, and sum them in a type that holds the sums.

gemm    in  Int8 activations, Int8 weights      out  Float: sums of int8 products pass 65504, the end of Half, and need
                                                     more bits than the 8 of BFloat16
"""

from collections.abc import Iterable
from typing import Final

from mbq_export.backends._trt_layers import Layer, LayerTable
from mbq_export.backends.base import QuantizedLinear
from mbq_export.report import Check

INTEGER: Final = "Int8"
TOO_SMALL: Final = ("Half", "BFloat16")
SHOWN: Final = 3


def integer_products(table: LayerTable, linears: Iterable[QuantizedLinear]) -> Check:
    """Look for the integer product of every linear with 8-bit activations.

    Args:
        table: Rows of an engine.
        linears: All quantized linears of its graph; those with 16-bit activations are passed over.
    """
    found = {
        linear.node: _fault(table.rows_of(linear.node))
        for linear in linears
        if linear.act_bits == 8
    }
    bad = [f"{node} {fault}" for node, fault in found.items() if fault]
    shown = ", ".join(bad[:SHOWN]) + (", .." if len(bad) > SHOWN else "")
    return Check(
        name="engine.A4",
        ok=not bad,
        tier="engine",
        value=len(bad),
        threshold=0,
        place=", ".join(bad[:SHOWN]),
        why=f"not a product of integers with sums of 32 bits: {shown}; sums may pass 65504, and need more than 11 bits"
        if bad
        else "",
    )


def _fault(rows: Iterable[Layer]) -> str:
    """What is wrong with the rows that a linear became, or an empty string."""
    # Weights of 8 bits are a constant of the product, those of 4 come from a row that makes bytes of them.
    products = [
        row
        for row in rows
        if INTEGER in {each.type for each in row.inputs}
        and [each.type for each in (*row.inputs, *row.constants)].count(INTEGER) >= 2
    ]
    if not products:
        return "multiplies no integers"
    narrow = [each.type for row in products for each in row.outputs if each.type in TOO_SMALL]
    return f"writes its sums as {narrow[0]}" if narrow else ""
