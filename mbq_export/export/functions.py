"""Bodies of the ``mbq`` operators in standard operators: the file explains itself to any runtime.

    words ── floor modulus ──► bytes ──► codes ──► (q - z) * s ──► transpose ──► MatMul

Integer Div and Mod only: TensorRT for RTX refuses shifts, bitwise operators and unsigned words. Words may be negative
and Div truncates towards zero, so the remainder is subtracted first; then the division is exact:

    r    = Mod(w, 2^(8 i))            the remainder takes the divisor's sign, so r >= 0
    byte = Mod(Div(w - r, 2^(8 i)), 256)

3 bits: 8 codes lie in 3 bytes, none straddles two such triples. 4 bits: 2 codes in a byte. 8 bits: a byte.

Symmetric codes of weights alone become numbers in FLOAT, where the scale of a channel is exact, and T at the end.
Where activations are rounded too, integers travel in FLOAT, per group along K (one group per channel):

    s_x = max(max |x|, 1e-5) / 127    xq = Round(x / s_x)    y = (sum over groups of (xq . (u - middle)) * s) * s_x

A product of integers is exact while every partial sum stays below 2^24: always, up to `exact_columns` columns in a
group, and beyond unless nearly all factors are the largest there are; then a sum is off by one part in 2^24. Integer
matrix operators would be exact for ever, but TensorRT has none.
"""

from typing import Final

import onnx

from mbq_export.errors import InternalError
from mbq_export.export import ops
from mbq_export.schemes.integers import LARGEST_ACTIVATION, SMALLEST_ABSMAX

_HEAD: Final = """
<domain: "{domain}", opset_import: ["" : {opset}], overload: "">
{name} <{attributes}> ({inputs}) => (y)
{{
  last = Constant <value = int64[1] {{-1}}> ()
  first = Constant <value = int64[1] {{0}}> ()
  radix = Constant <value = int32[4] {{1, 256, 65536, 16777216}}> ()
  byte_range = Constant <value = int32[1] {{256}}> ()
  n = Constant <value_int: int = @N> ()
  rows = Unsqueeze (n, first)
  k = Constant <value_int: int = @K> ()
  columns = Unsqueeze (k, first)
{groups}  word = Unsqueeze (qweight, last)
  remainder = Mod (word, radix)
  multiple = Sub (word, remainder)
  shifted = Div (multiple, radix)
  byte = Mod (shifted, byte_range)
"""

_GROUPS: Final = """\
  group = Constant <value_int: int = @group_size> ()
  group_columns = Unsqueeze (group, first)
"""

_CODES: Final = {
    3: """
  three = Constant <value = int64[1] {3}> ()
  place = Constant <value = int32[3] {1, 256, 65536}> ()
  power = Constant <value = int32[8] {1, 8, 64, 512, 4096, 32768, 262144, 2097152}> ()
  range = Constant <value = int32[1] {8}> ()
  triple_shape = Concat <axis = 0> (rows, last, three)
  triple = Reshape (byte, triple_shape)
  weighted = Mul (triple, place)
  joined = ReduceSum <keepdims = 1> (weighted, last)
  above = Div (joined, power)
  code = Mod (above, range)
""",
    4: """
  power = Constant <value = int32[2] {1, 16}> ()
  range = Constant <value = int32[1] {16}> ()
  joined = Unsqueeze (byte, last)
  above = Div (joined, power)
  code = Mod (above, range)
""",
    8: """
  code = Identity (byte)
""",
}

_WEIGHT_ONLY: Final = """
  grouped_shape = Concat <axis = 0> (rows, last, group_columns)
  grouped = Reshape (code, grouped_shape)
  q = CastLike (grouped, x)
  zero = Unsqueeze (zeros, last)
  z = CastLike (zero, x)
  scale = Unsqueeze (scales, last)
  s = CastLike (scale, x)
  centred = Sub (q, z)
  scaled = Mul (centred, s)
  matrix_shape = Concat <axis = 0> (rows, columns)
  matrix = Reshape (scaled, matrix_shape)
  matrix_t = Transpose <perm = [1, 0]> (matrix)
  y = MatMul (x, matrix_t)
}
"""

# Scales may be [N], one per channel, or [N, groups]: as a table of N rows they are alike. Everything is FLOAT, so the
# result is the same in every T but for its own rounding.
_TABLE: Final = """
  table_shape = Concat <axis = 0> (rows, last)
  table = Reshape (scales, table_shape)
  group_count = Shape <start = 1, end = 2> (table)
"""

_SCALES_OF_GROUPS: Final = """\
  table_t = Transpose <perm = [1, 0]> (table)
  row_axis = Constant <value = int64[1] {1}> ()
  s_rows = Unsqueeze (table_t, row_axis)
  s = Cast <to = 1> (s_rows)
"""

_SIGNED: Final = """\
  grouped_shape = Concat <axis = 0> (rows, group_count, last)
  grouped = Reshape (code, grouped_shape)
  u = Cast <to = 1> (grouped)
  middle = Constant <value = float {%d}> ()
  q = Sub (u, middle)
"""

_SYMMETRIC: Final = """\
  wide_table = Cast <to = 1> (table)
  s = Unsqueeze (wide_table, last)
  scaled = Mul (q, s)
  matrix_shape = Concat <axis = 0> (rows, columns)
  wide_matrix = Reshape (scaled, matrix_shape)
  matrix = CastLike (wide_matrix, x)
  matrix_t = Transpose <perm = [1, 0]> (matrix)
  y = MatMul (x, matrix_t)
}
"""

_ROUNDING: Final = f"""\
  q_t = Transpose <perm = [1, 2, 0]> (q)
  wide = Cast <to = 1> (x)
  size = Abs (wide)
  largest = ReduceMax <keepdims = 1> (size, last)
  smallest = Constant <value = float {{{SMALLEST_ABSMAX}}}> ()
  bounded = Max (largest, smallest)
  steps = Constant <value = float {{{LARGEST_ACTIVATION}}}> ()
  s_x = Div (bounded, steps)
  quotient = Div (wide, s_x)
  xq = Round (quotient)
  group_columns = Div (columns, group_count)
  xq_shape = Concat <axis = 0> (last, group_count, group_columns)
  xq_grouped = Reshape (xq, xq_shape)
  xq_t = Transpose <perm = [1, 0, 2]> (xq_grouped)
  sums = MatMul (xq_t, q_t)
  scaled = Mul (sums, s)
  total = ReduceSum <keepdims = 0> (scaled, first)
  leading = Shape <start = 0, end = -1> (x)
  rows_shape = Concat <axis = 0> (leading, rows)
  rows_of_x = Reshape (total, rows_shape)
  wide_y = Mul (rows_of_x, s_x)
  y = CastLike (wide_y, x)
}}
"""

_BODIES: Final = {
    (3, 16): (_GROUPS, _WEIGHT_ONLY),
    (4, 16): (_GROUPS, _WEIGHT_ONLY),
    (4, 8): ("", _TABLE + _SCALES_OF_GROUPS + _SIGNED % 8 + _ROUNDING),
    (8, 8): ("", _TABLE + _SCALES_OF_GROUPS + _SIGNED % 128 + _ROUNDING),
    (8, 16): ("", _TABLE + _SIGNED % 128 + _SYMMETRIC),
}
"""Widths of codes and activations: constants in front of the codes, and what is computed with them."""


def exact_columns(bits: int) -> int:
    """Largest group, or channel, whose integer sums FLOAT always holds: products reach 127 * 2**(bits - 1)."""
    return int((1 << 24) // (LARGEST_ACTIVATION * 2 ** (bits - 1)))


def body(op: ops.LinearOp, *, opset: int) -> onnx.FunctionProto:
    """Write the body of an operator.

    Args:
        op: Operator of the domain.
        opset: Standard opset of the model; the checker demands that both are equal.

    Raises:
        InternalError: E9001 if nobody wrote a body for these widths.
    """
    if (op.bits, op.act_bits) not in _BODIES:
        raise InternalError(
            "E9001",
            f"{op.name} has no body for codes of {op.bits} bits and activations of {op.act_bits}.",
        )
    groups, tail = _BODIES[op.bits, op.act_bits]
    head = _HEAD.format(
        domain=ops.DOMAIN,
        opset=opset,
        name=op.name,
        attributes=", ".join(ops.ATTRIBUTES),
        inputs=", ".join(op.inputs),
        groups=groups,
    )
    return onnx.parser.parse_function(head + _CODES[op.bits] + tail)
