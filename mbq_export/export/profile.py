"""What a graph of one op level may use: opset, operators, cache forms, constant types.

Levels are those of the targets: L0 has primitives only, L1 adds Attention, L2 adds RotaryEmbedding,
RMSNormalization and TensorScatter. Written here: L2, the level of ONNX Runtime 1.31, of TensorRT from 10.15 on
and of TensorRT for RTX 1.7.
"""

from dataclasses import dataclass
from typing import Final

from mbq_export.errors import UsageError
from mbq_export.export.record import GraphForm

_SHAPING: Final = {
    "Cast",
    "Concat",
    "Gather",
    "Range",
    "Reshape",
    "Shape",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
_ARITHMETIC: Final = {"Add", "And", "Equal", "LessOrEqual", "MatMul", "Mul", "Or", "Sigmoid", "Sub"}
_FUSED: Final = {"Attention", "RMSNormalization", "RotaryEmbedding"}
_QUANTIZED: Final = {
    "Abs",
    "DequantizeLinear",
    "Div",
    "Max",
    "QuantizeLinear",
    "ReduceMax",
    "ReduceSum",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpProfile:
    """One op level.

    Attributes:
        name: Value of ``--op-level``.
        opset: Version of the standard operators, also imported by every function body.
        ir_version: Version of the file format.
        level: Level of the target table.
        ops: Standard operators that a decoder graph may use.
        kv_modes: Cache forms that exist at this level.
    """

    name: str
    opset: int
    ir_version: int
    level: int
    ops: frozenset[str]
    kv_modes: frozenset[str]


OPSET23: Final = OpProfile(
    name="opset23",
    opset=23,
    ir_version=11,
    level=2,
    ops=frozenset(_SHAPING | _ARITHMETIC | _FUSED | _QUANTIZED),
    kv_modes=frozenset({"concat"}),
)
OPSET24: Final = OpProfile(
    name="opset24",
    opset=24,
    ir_version=12,
    level=2,
    ops=OPSET23.ops | {"TensorScatter"},
    kv_modes=frozenset({"concat", "static"}),
)
PROFILES: Final = {profile.name: profile for profile in (OPSET23, OPSET24)}

PRIMITIVE_LEVELS: Final = ("opset20", "opset21")
"""Levels whose graphs would need attention, rotation and norms spelled out in primitives."""


def profile_for(form: GraphForm) -> OpProfile:
    """Choose the op level of a graph: the lowest that has what the form needs.

    Raises:
        UsageError: E2002 if the level lacks the cache form or is not written, E2001 if it is unknown.
    """
    if form.op_level in PRIMITIVE_LEVELS:
        raise UsageError(
            "E2002",
            f"Graphs of op level {form.op_level} are not written yet.",
            why="attention, rotation and norms in primitives exist for no target that was checked",
            fix="--op-level auto with a target of TensorRT 10.15 or later",
        )
    name = form.op_level
    if name == "auto":
        name = OPSET24.name if form.kv == "static" else OPSET23.name
    if name not in PROFILES:
        raise UsageError(
            "E2001",
            f"Unknown op level {name!r}.",
            why=f"known: auto, {', '.join(PROFILES)}",
            fix="--op-level auto",
        )
    profile = PROFILES[name]
    if form.kv not in profile.kv_modes:
        raise UsageError(
            "E2002",
            f"Op level {name} has no {form.kv} cache.",
            why="a static cache needs TensorScatter, which is new in opset 24",
            fix=("--op-level auto", "use the concat cache"),
        )
    return profile
