"""Standard operators on constants of 4 or 8 bits: DequantizeLinear in blocks along K, then MatMul.

    w = DequantizeLinear(Q [K, N], S [K/G, N]; axis 0, block_size G)        y = MatMul(x, w)
    w = DequantizeLinear(Q [K, N], S [N]; axis 1)                           of 8 bits, which have no groups

| codes          | ONNX Runtime                     | TensorRT                                  |
|----------------|----------------------------------|-------------------------------------------|
| 3 bits         | INT4 q - z, exact                | the same                                  |
| 4 bits, middle | INT4 q - 8, exact                | the same                                  |
| 4 bits         | UINT4 q with UINT4 zero points   | INT4 q - 8 and a correction in fp32       |
| 8 bits, middle | INT8 q - 128, exact              | the same                                  |

TensorRT refuses UINT4 and zero points other than 0, and q - z of 4-bit codes spans -15 .. 15. There

    y = x . (q - 8) s - sum over groups (sum of x in the group) * (z - 8) s

with sums and products of the correction in fp32.

Where activations are rounded too, the token's scale stays outside of the quantize node, whose own scale is 1: a
computed one is refused by TensorRT for a token axis that varies, or ignored. Per channel only, in fp32, because the
sums of an int8 product may be stored in the type of its inputs before they are scaled, and pass what fp16 holds:

    s = max(max |x|, 1e-5) / 127        d = DequantizeLinear(QuantizeLinear(x / s, 1), 1)
    w = DequantizeLinear(Q [K, N], S [N]; axis 1)        y = MatMul(d, w) * s

Q of 4 bits is INT4 for TensorRT and INT8 for ONNX Runtime, which then sums integers; INT4 it would multiply in floats,
far slower. In groups TensorRT for RTX builds one int8 product over all of K: such graphs are never written.
A token with an infinity has no finite result. A NaN alone may get lost on the way, because ONNX Runtime's ReduceMax can
pass over it and QuantizeLinear makes a number of it; the reference form keeps it.

Constants are [K, N]: [N, K] with a Transpose costs ONNX Runtime
its fused kernel (44 times slower at 2048 x 2048).
"""

from typing import Final

import onnx_ir as ir

from mbq_export.errors import UsageError
from mbq_export.export import ops
from mbq_export.export.graph import packed_nodes, packed_source
from mbq_export.export.lowerings.base import Lowering
from mbq_export.export.standard_form import to_standard
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL, QuantScheme


def supports(scheme: QuantScheme, target: str) -> str | None:
    """Schemes with an operator, both targets."""
    del target
    return None if scheme.name in ops.OPS else f"there is no mbq operator for {scheme.name}"


def check_group(scheme: QuantScheme, group_size: int) -> None:
    """Refuse groups where activations are rounded too.

    Raises:
        UsageError: E2006.
    """
    if scheme.rounds_activations and group_size != CHANNEL:
        raise UsageError(
            "E2006",
            f"{scheme.name} in groups of {group_size} has no qdq form.",
            why=f"group-wise {scheme.name.upper()} needs the plugin lowering; TensorRT may compile this pattern to a "
            "wrong result",
            fix=(
                "--group-size channel",
                "--lowering plugin, for TensorRT",
                "--lowering reference: small models, ONNX Runtime",
            ),
        )


def refuses_dtype(scheme: QuantScheme | None, target: str, dtype: str) -> str | None:
    """bf16 is for TensorRT, and only where no group's scale would have to be rounded to it; channels keep theirs.

    A scale is fp16, with 11 bits. Rounded to the 8 bits of bf16 all weights of its group change. Kept, with a Cast
    behind the dequantized weight, TensorRT for RTX 1.7 writes that weight to memory and multiplies from there. Weights of 8 bits with FLOAT scales, one per channel, it
    multiplies from their codes, Cast or not.
    """
    if dtype != "bf16":
        return None
    if target == "ort":
        return "ONNX Runtime multiplies no bf16 on a CPU"
    if scheme is None or scheme.rounds_activations or scheme.group_sizes == (CHANNEL,):
        return None
    return "bf16 would round the scales of its groups, and with exact ones TensorRT keeps no 4-bit weights"


def lower(model: ir.Model, target: str) -> None:
    """Replace every ``mbq`` node; the MatMul takes its name and its output.

    Raises:
        UsageError: E2006 as `check_group`.
    """
    for node in packed_nodes(model):
        source = packed_source(node)
        check_group(SCHEMES[source.scheme], source.group_size)
        to_standard(model.graph, node, target)
    model.opset_imports.pop(ops.DOMAIN, None)


LOWERING: Final = Lowering(
    name="qdq",
    dtypes=("fp32", "fp16", "bf16"),
    keeps_functions=False,
    supports=supports,
    lower=lower,
    check_group=check_group,
    refuses_dtype=refuses_dtype,
)
