"""Bodies of the ``mbq`` operators in standard operators: the file explains itself to any runtime.

    words ── floor modulus ──► bytes ──► codes ──► (q - z) * s ──► transpose ──► MatMul

Integer Div and Mod only: TensorRT for RTX refuses shifts, bitwise operators and unsigned words. Words may be negative
and Div truncates towards zero, so the remainder is subtracted first; then the division is exact:

    r    = Mod(w, 2^(8 i))            the remainder takes the divisor's sign, so r >= 0
    byte = Mod(Div(w - r, 2^(8 i)), 256)

3 bits: 8 codes lie in 3 bytes, none straddles two such triples. 4 bits: 2 codes in a byte.
"""

from typing import Final

import onnx

from mbq_export.errors import InternalError
from mbq_export.export import ops

_HEAD: Final = """
<domain: "{domain}", opset_import: ["" : {opset}], overload: "">
{name} <{attributes}> (x, qweight, scales, zeros) => (y)
{{
  last = Constant <value = int64[1] {{-1}}> ()
  first = Constant <value = int64[1] {{0}}> ()
  radix = Constant <value = int32[4] {{1, 256, 65536, 16777216}}> ()
  byte_range = Constant <value = int32[1] {{256}}> ()
  n = Constant <value_int: int = @N> ()
  rows = Unsqueeze (n, first)
  k = Constant <value_int: int = @K> ()
  columns = Unsqueeze (k, first)
  group = Constant <value_int: int = @group_size> ()
  group_columns = Unsqueeze (group, first)
  word = Unsqueeze (qweight, last)
  remainder = Mod (word, radix)
  multiple = Sub (word, remainder)
  shifted = Div (multiple, radix)
  byte = Mod (shifted, byte_range)
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
}

_TAIL: Final = """
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


def body(op: ops.LinearOp, *, opset: int) -> onnx.FunctionProto:
    """Write the body of an operator.

    Args:
        op: Operator of the domain.
        opset: Standard opset of the model; the checker demands that both are equal.

    Raises:
        InternalError: E9001 if nobody wrote a body for this width.
    """
    if op.bits not in _CODES or op.act_bits != 16:
        raise InternalError(
            "E9001",
            f"{op.name} has no body for codes of {op.bits} bits and activations of {op.act_bits}.",
        )
    head = _HEAD.format(
        domain=ops.DOMAIN, opset=opset, name=op.name, attributes=", ".join(ops.ATTRIBUTES)
    )
    return onnx.parser.parse_function(head + _CODES[op.bits] + _TAIL)
