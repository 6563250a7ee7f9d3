"""What both forms of a packed node are checked for: attributes against its operator, types, sizes and values.

Raised here and in the contracts that use it: E4408 for an operator, E4409 for a contradiction, E4411 for a value.
"""

from typing import Any, Final, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from mbq_export.errors import FormatError
from mbq_export.export import ops
from mbq_export.schemes import SCHEMES
from mbq_export.schemes.base import CHANNEL
from mbq_export.schemes.layouts.base import Layout

_AGAIN: Final = "export the model again"


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes of a node by name, strings decoded."""
    values = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    return {name: _text(value) for name, value in values.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def check_facts(has: dict[str, Any], op: ops.LinearOp, *, layout: Layout) -> None:
    """Check attributes of a node that do not depend on its constants.

    Args:
        has: All attributes.
        op: Operator of the node.
        layout: What its words must be.

    Raises:
        FormatError: E4409.
        IncompatibleError: E7005 for another version of the layout.
    """
    scheme = SCHEMES[ops.scheme_of(op)]
    size = has["group_size"]
    facts = (
        (has["bits"] == op.bits, f"bits is {has['bits']}, {op.name} has {op.bits}"),
        (size in scheme.group_sizes, f"group_size is {size}"),
        (has["layout"] == layout.name, f"layout is {has['layout']!r}"),
        (has["plugin_namespace"] == ops.PLUGIN_NAMESPACE, "plugin_namespace is another"),
        (has["plugin_version"] == ops.PLUGIN_VERSION, "plugin_version is another"),
        (has["N"] > 0 and has["K"] > 0, f"N is {has['N']} and K is {has['K']}"),
    )
    for right, what in facts:
        if not right:
            contradiction(what)
    layout.check_version(has["layout_version"])
    if size != CHANNEL and has["K"] % size:
        contradiction(f"groups of {size} do not divide K = {has['K']}")


def constant_of(tensor: TensorProto | None, name: str, dtype: int, shape: list[int]) -> TensorProto:
    """Return a constant of the type and sizes that attributes ask for.

    Raises:
        FormatError: E4409 if it is no constant, or another.
    """
    if tensor is None:
        contradiction(f"{name} is no constant")
    if tensor.data_type != dtype or list(tensor.dims) != shape:
        found, asked = TensorProto.DataType.Name(tensor.data_type), TensorProto.DataType.Name(dtype)
        contradiction(
            f"{name} is {found} {list(tensor.dims)}, N, K and group_size ask for {asked} {shape}"
        )
    return tensor


def check_scales(scales: NDArray[Any], name: str) -> None:
    """Check that every scale is a positive number.

    Raises:
        FormatError: E4411.
    """
    good = np.isfinite(scales) & (scales > 0)
    if not good.all():
        index = tuple(int(each) for each in np.argwhere(~good)[0])
        raise FormatError(
            "E4411",
            f"{name} holds {int((~good).sum())} scales that are not positive numbers, the first at {index}.",
            why="a scale is positive and finite",
            fix="quantize the model again",
        )


def check_range(zeros: NDArray[Any], *, largest: int, name: str) -> None:
    """Check that every zero point is a code.

    Raises:
        FormatError: E4411.
    """
    bad = (zeros < 0) | (zeros > largest)
    if bad.any():
        index = tuple(int(each) for each in np.argwhere(bad)[0])
        raise FormatError(
            "E4411",
            f"{name} holds the zero point {int(zeros[index])} at {index}.",
            why=f"zero points are codes, 0 to {largest}",
            fix="quantize the model again",
        )


def contradiction(what: str) -> NoReturn:
    """Say that a node's attributes do not describe its constants.

    Raises:
        FormatError: E4409.
    """
    raise FormatError(
        "E4409",
        f"{what[0].upper()}{what[1:]}.",
        why="attributes of a packed linear describe its constants",
        fix=_AGAIN,
    )


def unknown(what: str) -> NoReturn:
    """Say that nothing here provides an operator.

    Raises:
        FormatError: E4408.
    """
    raise FormatError(
        "E4408",
        what,
        why=f"graphs use standard operators, and {', '.join(op.name for op in ops.OPS.values())} "
        f"of domain {ops.DOMAIN!r}, all with their bodies or all in the form of plugins",
        fix=_AGAIN,
    )
