"""The contract of the ``mbq`` domain and of the graphs that carry it: names, attributes, schemas.

    y = W3Linear(x, qweight, scales, zeros)      y = x . ((q - z) * s)^T
    x        T       [.., K]
    qweight  INT32   [N, ceil(K * bits / 32)]    layout dense: negative words are legal
    scales   FLOAT16 [N, K / group_size]
    zeros    INT32   [N, K / group_size]
    y        T       [.., N]                     T: FLOAT, FLOAT16 or BFLOAT16

    y = W4A8Linear(x, qweight, scales)           x rounded to int8 per token, then (sums * s) * sx
    scales   FLOAT   [N], or FLOAT16 [N, K / group_size] in groups; codes are q + 8, there are no zero points

    y = W8A8Linear(x, qweight, scales)           the same with codes q + 128, per channel only
    y = W8A16Linear(x, qweight, scales)          y = x . (q * s)^T, likewise; neither has a plugin

Two forms of one node. *Reference*: as above, with a body. *Plugin*: constants in tiles, Np and Kp being N and K rounded
up to 16 and 128, and no body; N and K stay the sizes of y and x.

    qweight  INT32   [Np / 16, Kp / 128, words of a tile]      layout w3t or w4t
    scales   FLOAT16 [Np / 16, Kp / group_size, 8, 2]          per channel FLOAT [Np], a sixteenth of each scale
    zeros    INT32   [Np / 16, Kp / group_size, 2]             none in W4A8Linear
    bias     T       [N]                                       last, if has_bias is 1

Packed words are INT32 because TensorRT widens UINT8 fourfold and refuses UINT32. Zero points are INT32 because
TensorRT for RTX refuses INT8 constants that feed neither a DequantizeLinear nor a plugin.

Names of values that tools may rely on (`evaluate` taps them), for decoder block i:

    layers.i.<role>.in       what a linear reads (`linear_input`)
    layers.i.<role>.out      what a linear of the original model returns, bias included (`linear_output`)
    layers.i.hidden          residual stream behind block i (`hidden_value`)
    norm.out                 what the head reads
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, cast

import onnx
from onnx.defs import OpSchema

DOMAIN: Final = "mbq"
DOMAIN_VERSION: Final = 1
PLUGIN_NAMESPACE: Final = "mbq"
PLUGIN_VERSION: Final = "1"
PLUGIN_ABI: Final = 1
"""Of the fields that a compiled engine holds: another number cannot be read back."""

INPUTS_EMBEDS: Final = "inputs_embeds"
ATTENTION_MASK: Final = "attention_mask"
POSITION_IDS: Final = "position_ids"
WRITE_INDICES: Final = "write_indices"
LOGITS: Final = "logits"
INPUT_IDS: Final = "input_ids"
PIXEL_VALUES: Final = "pixel_values"
IMAGE_FEATURES: Final = "image_features"
IMAGE_NEWLINE: Final = "image_newline"
"""Name of the end-of-row feature in ``host_tensors.safetensors``."""

PARTS: Final = ("key", "value")
"""What a cache holds of each layer, in this order."""

BATCH: Final = "batch_size"
SEQUENCE: Final = "sequence_length"
PAST: Final = "past_sequence_length"
TOTAL: Final = "total_sequence_length"
TILES: Final = "num_tiles"

SOURCE: Final = "mbq.source"
"""Node metadata: module paths in the original model, comma separated, in the order of the output columns."""

PLUGIN_LAYERS: Final = "mbq.plugin_layers"
"""Metadata of a graph in the plugin form: a JSON object of node names by operator (`plugin_layers`)."""

LARGEST_OPSET: Final = 26
"""ONNX Runtime 1.31 refuses models of opset 27 and later."""

INT_ATTRIBUTES: Final = ("N", "K", "group_size", "bits", "signed_codes", "layout_version")
STRING_ATTRIBUTES: Final = ("layout", "plugin_namespace", "plugin_version")
ATTRIBUTES: Final = (*INT_ATTRIBUTES, *STRING_ATTRIBUTES)
"""All required, on every node of the domain."""
PLUGIN_INT_ATTRIBUTES: Final = ("has_bias", "epilogue", "act_bits", "row_order")
PLUGIN_ATTRIBUTES: Final = (*ATTRIBUTES, *PLUGIN_INT_ATTRIBUTES)
"""All required, on every node of the plugin form."""

PLUGIN_FIELDS: Final = (
    "N", "K", "group_size", "bits", "layout_version", "has_bias", "epilogue", "act_bits",
)  # fmt: skip
"""Attributes that a plugin's creator declares: integers, all required. The others are for readers and the parser."""
ABI_FIELD: Final = "abi"
"""Written beside `PLUGIN_FIELDS` into a compiled engine; no attribute."""
NO_EPILOGUE: Final = 0
CONCATENATED_ROWS: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearOp:
    """One operator of the domain.

    Attributes:
        name: Op type, also the name of its function body and of the plugin.
        bits: Width of a code.
        act_bits: Width of an activation; 16 leaves it in T.
        symmetric: Whether it has no zero points.
        tiles: Layout of the codes in the plugin form; None where there is no plugin.
    """

    name: str
    bits: int
    act_bits: int = 16
    symmetric: bool = False
    tiles: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of its inputs in both forms, without the bias that a plugin may have behind them."""
        return ("x", "qweight", "scales", *(() if self.symmetric else ("zeros",)))


OPS: Final = {
    "w3a16": LinearOp(name="W3Linear", bits=3, tiles="w3t"),
    "w4a16": LinearOp(name="W4A16Linear", bits=4, tiles="w4t"),
    "w4a8": LinearOp(name="W4A8Linear", bits=4, act_bits=8, symmetric=True, tiles="w4t"),
    "w8a8": LinearOp(name="W8A8Linear", bits=8, act_bits=8, symmetric=True),
    "w8a16": LinearOp(name="W8A16Linear", bits=8, symmetric=True),
}
"""Operator of every scheme that has one."""

PLUGINS: Final = {name: op.tiles for name, op in OPS.items() if op.tiles is not None}
"""Layout of the tiles of every scheme whose operator is also a plugin."""


def op_named(name: str) -> LinearOp | None:
    """The operator of an op type, or None if the domain has no such op."""
    return next((op for op in OPS.values() if op.name == name), None)


def scheme_of(op: LinearOp) -> str:
    """Name of the scheme of an operator, one of `OPS`."""
    return next(name for name, each in OPS.items() if each == op)


def plugin_layers(nodes: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Nodes that an engine must hold as plugin layers, by operator.

    Args:
        nodes: Operator and name of each, in graph order.

    Returns:
        Sorted by operator; names in graph order.
    """
    layers: dict[str, list[str]] = {}
    for op_type, name in nodes:
        layers.setdefault(op_type, []).append(name)
    return dict(sorted(layers.items()))


def past_key_value(layer: int, part: str) -> str:
    """Name of a cache input; ``part`` is ``key`` or ``value``."""
    return f"past_key_values.{layer}.{part}"


def present_key_value(layer: int, part: str) -> str:
    """Name of a cache output; ``part`` is ``key`` or ``value``."""
    return f"present.{layer}.{part}"


def decoder_inputs(layers: int, *, static: bool) -> tuple[str, ...]:
    """Inputs of a decoder graph, in order."""
    fixed = (INPUTS_EMBEDS, ATTENTION_MASK, POSITION_IDS, *((WRITE_INDICES,) if static else ()))
    return (*fixed, *(past_key_value(n, part) for n in range(layers) for part in PARTS))


def decoder_outputs(layers: int) -> tuple[str, ...]:
    """Outputs of a decoder graph, in order."""
    return (LOGITS, *(present_key_value(n, part) for n in range(layers) for part in PARTS))


def node_name(layer: int, role: str) -> str:
    """Name of a node of decoder block ``layer``, for example ``layers.3.q_proj``."""
    return f"layers.{layer}.{role}"


def linear_input(layer: int, role: str) -> str:
    """Name of what a linear reads. Linears with one input share the name of the first of them."""
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(role, role)
    return f"layers.{layer}.{first}.in"


def linear_output(layer: int, role: str) -> str:
    """Name of what a linear of the original model returns, bias included, whether it was fused or not."""
    return f"layers.{layer}.{role}.out"


def hidden_value(layer: int) -> str:
    """Name of the residual stream behind decoder block ``layer``."""
    return f"layers.{layer}.hidden"


def register() -> None:
    """Make ``onnx`` know the domain, so that its checker and shape inference work. Safe to call twice."""
    for op in OPS.values():
        if not onnx.defs.has(op.name, DOMAIN_VERSION, DOMAIN):
            onnx.defs.register_schema(_schema(op))


def _schema(op: LinearOp) -> OpSchema:
    parameter = OpSchema.FormalParameter
    optional = OpSchema.FormalParameterOption.Optional
    scales = ["tensor(float16)", "tensor(float)"] if op.symmetric else ["tensor(float16)"]
    described = {
        "x": ("T", "activations [.., K]"),
        "qweight": ("tensor(int32)", "dense words [N, ceil(K * bits / 32)], or tiles"),
        "scales": ("S", "[N, K / group_size], per channel [N], or tiled"),
        "zeros": ("tensor(int32)", "[N, K / group_size], or tiled"),
    }
    schema = OpSchema(
        op.name,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[
            *(parameter(name, *described[name]) for name in op.inputs),
            parameter("bias", "T", "[N]", param_option=optional),
        ],
        outputs=[parameter("y", "T", "[.., N]")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "activation types"),
            ("S", scales, "FLOAT per channel, FLOAT16 in groups"),
        ],
        attributes=_attributes(),
    )
    schema.set_type_and_shape_inference_function(_infer)
    return schema


def _attributes() -> list[OpSchema.Attribute]:
    """Those of both forms; one schema serves both, so the plugin's own are optional here."""
    integer, text = OpSchema.AttrType.INT, OpSchema.AttrType.STRING
    return [
        *(OpSchema.Attribute(name, integer, required=True) for name in INT_ATTRIBUTES),
        *(OpSchema.Attribute(name, text, required=True) for name in STRING_ATTRIBUTES),
        *(OpSchema.Attribute(name, integer, required=False) for name in PLUGIN_INT_ATTRIBUTES),
    ]


def _infer(context: onnx.shape_inference.InferenceContext) -> None:
    """Copy x's type; its last axis becomes N."""
    output = onnx.TypeProto()
    # None where an operator of another domain computes x, whatever the stubs say.
    x = cast("onnx.TypeProto | None", context.get_input_type(0))
    if x is None:
        return
    output.CopyFrom(x)
    if output.tensor_type.HasField("shape") and output.tensor_type.shape.dim:
        rows = context.get_attribute("N")
        last = output.tensor_type.shape.dim[-1]
        last.Clear()
        if rows is not None:
            last.dim_value = rows.i
    context.set_output_type(0, output)
