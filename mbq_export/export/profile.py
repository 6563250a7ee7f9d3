"""What a graph of one op level may use: opset, operators, cache forms.

| level | adds                                                | profile           | first full TensorRT |
|-------|-----------------------------------------------------|-------------------|---------------------|
| L0    | primitives: attention, rotation and norms spelled out | opset20, opset21 | 10.3                |
| L1    | Attention                                           | opset23-attention | 10.14               |
| L2    | RotaryEmbedding, RMSNormalization                   | opset23           | 10.15               |
| L2    | TensorScatter, for a static cache                   | opset24           | 10.15               |

The parser's own list of operators ends at opset 20 up to TensorRT 10.3; blocked 4-bit constants are new in opset 21, so
only graphs that hold them import it. ONNX Runtime 1.31 runs every level. SiLU is Sigmoid and Mul at each: Swish came
with TensorRT 11.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mbq_export.errors import UsageError
from mbq_export.export.record import GraphForm

PRIMITIVES, ATTENTION, FUSED = 0, 1, 2
"""Numbers of the levels, as `target.Target.op_level` has them."""

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
_NORM: Final = {"Div", "ReduceMean", "Sqrt"}
_SOFTMAX: Final = {"Softmax", "Where"}
_ROUNDED: Final = {
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
        first: First full TensorRT whose parser reads it.
        kv_modes: Cache forms that exist at this level.
    """

    name: str
    opset: int
    ir_version: int
    level: int
    ops: frozenset[str]
    first: tuple[int, int]
    kv_modes: frozenset[str] = frozenset({"concat"})


OPSET20: Final = OpProfile(
    name="opset20",
    opset=20,
    ir_version=9,
    level=PRIMITIVES,
    ops=frozenset(_SHAPING | _ARITHMETIC | _NORM | _SOFTMAX),
    first=(10, 3),
)
OPSET21: Final = OpProfile(
    name="opset21",
    opset=21,
    ir_version=10,
    level=PRIMITIVES,
    ops=OPSET20.ops | _ROUNDED,
    first=(10, 3),
)
OPSET23_ATTENTION: Final = OpProfile(
    name="opset23-attention",
    opset=23,
    ir_version=11,
    level=ATTENTION,
    ops=frozenset(_SHAPING | _ARITHMETIC | _NORM | _ROUNDED | {"Attention"}),
    first=(10, 14),
)
OPSET23: Final = OpProfile(
    name="opset23",
    opset=23,
    ir_version=11,
    level=FUSED,
    ops=frozenset(
        _SHAPING | _ARITHMETIC | _ROUNDED | {"Attention", "RMSNormalization", "RotaryEmbedding"}
    ),
    first=(10, 15),
)
OPSET24: Final = OpProfile(
    name="opset24",
    opset=24,
    ir_version=12,
    level=FUSED,
    ops=OPSET23.ops | {"TensorScatter"},
    first=(10, 15),
    kv_modes=frozenset({"concat", "static"}),
)
PROFILES: Final = {
    profile.name: profile for profile in (OPSET20, OPSET21, OPSET23_ATTENTION, OPSET23, OPSET24)
}

OF_LEVEL: Final = {
    PRIMITIVES: OPSET20.name,
    ATTENTION: OPSET23_ATTENTION.name,
    FUSED: "auto",
}
"""Value of ``--op-level`` that gives a level whatever the cache."""


def has_static_cache(op_level: str) -> bool:
    """Whether a value of ``--op-level`` leaves room for a static cache; an unknown one is refused elsewhere."""
    return op_level not in PROFILES or "static" in PROFILES[op_level].kv_modes


def traced_profile(profiles: Iterable[OpProfile]) -> OpProfile:
    """Op level of the graphs that all of some decoders share: the lowest of theirs.

    A traced graph uses whatever operators its opset has, of which towers need no more than Attention.
    """
    lowest = min((profile.level for profile in profiles), default=FUSED)
    return OPSET20 if lowest == PRIMITIVES else OPSET23


def profile_for(form: GraphForm, *, packed: bool = True) -> OpProfile:
    """Choose the op level of a graph: the lowest opset that has what the form needs.

    Args:
        form: Its lowering and cache; ``opset20`` becomes ``opset21`` where 4-bit constants feed standard operators.
        packed: Whether any linear is quantized.

    Raises:
        UsageError: E2001 if the level is unknown, E2002 if it lacks the cache form.
    """
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
            fix=("--op-level auto", "--kv concat"),
        )
    return OPSET21 if profile is OPSET20 and form.lowering == "qdq" and packed else profile
