"""The decoder, written node by node from a family's sizes: prefill and decode in one graph.

    RMSNorm ── q,k,v ── heads ── rotate q,k ── append to cache ── attention ── o ──(+)──►
    RMSNorm ── gate, up ── silu(gate) * up ── down ──(+)──► layers.i.hidden

Linears of the checkpoint become ``mbq`` nodes; what it did not quantize becomes a MatMul.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mbq_export.errors import FormatError
from mbq_export.export import ops, weights
from mbq_export.export.attention import Cache, attend, declare_cache, updated, visibility
from mbq_export.export.graph import FLOAT, INT64, Dims, Emitter, columns_of, dims_of, packed_node
from mbq_export.export.primitives import spelled_norm
from mbq_export.export.rope import Rotary

if TYPE_CHECKING:
    import onnx_ir as ir

    from mbq_export.checkpoint import QuantCheckpoint
    from mbq_export.export.profile import OpProfile
    from mbq_export.export.record import GraphForm
    from mbq_export.families.base import ModelFamily, TextShape

GRAPH_NAME: Final = "decoder_model_merged"
LM_HEAD: Final = "lm_head"
NORM: Final = "RMSNormalization"


def decoder_graph(
    checkpoint: QuantCheckpoint, *, family: ModelFamily, form: GraphForm, profile: OpProfile
) -> ir.Model:
    """Write the reference form of the decoder, projections unfused, without function bodies.

    Args:
        checkpoint: Weights; constants of the graph read them while the graph is saved.
        family: Module paths and sizes.
        form: dtype, cache form, logits and context of the graph.
        profile: Op level.

    Raises:
        FormatError: E4005 for a decoder this builder does not write, E4103 for a missing tensor.
    """
    shape = family.text_shape(checkpoint.config)
    _check_kind(shape)
    return _Decoder(
        checkpoint, family, shape, form, Emitter(profile=profile, dtype=form.dtype)
    ).build()


def _check_kind(shape: TextShape) -> None:
    """Refuse what no test of ours covers."""
    unknown = {"activation": shape.activation != "silu", "qk_norm": shape.qk_norm}
    for name, bad in unknown.items():
        if bad:
            raise FormatError(
                "E4005",
                f"A decoder with {name} = {getattr(shape, name)!r} cannot be exported.",
                why="graphs are written for gated SiLU blocks without norms on q and k",
                fix="use a model of a supported family: mbq-export models",
            )


@dataclass(frozen=True)
class _Decoder:
    checkpoint: QuantCheckpoint
    family: ModelFamily
    shape: TextShape
    form: GraphForm
    g: Emitter

    def build(self) -> ir.Model:
        g, shape = self.g, self.shape
        context = self.form.max_context or shape.max_positions
        slots = context if self.form.kv == "static" else None
        embeds = g.input(ops.INPUTS_EMBEDS, self.residual)
        mask = g.input(ops.ATTENTION_MASK, [ops.BATCH, slots or ops.TOTAL], dtype=INT64)
        ids = g.input(ops.POSITION_IDS, [ops.BATCH, ops.SEQUENCE], dtype=INT64)
        cache = declare_cache(g, shape, slots=slots)
        rotary = Rotary(g, shape, positions=context, ids=ids)
        visible = visibility(g, embeds=embeds, mask=mask, cache=cache)
        hidden = embeds
        presents: list[ir.Value] = []
        for layer in range(shape.layers):
            mixed, pair = self.attention(layer, hidden, rotary, cache, visible)
            hidden = self.mlp(layer, mixed)
            presents += pair
        return g.model(GRAPH_NAME, [self.logits(hidden), *presents])

    @property
    def residual(self) -> list[int | str]:
        return [ops.BATCH, ops.SEQUENCE, self.shape.hidden]

    def attention(
        self, layer: int, hidden: ir.Value, rotary: Rotary, cache: Cache, visible: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        x = self.norm(layer, hidden, "input_layernorm", ops.linear_input(layer, "q_proj"))
        q = self.heads(layer, x, "q_proj", self.shape.heads)
        k = self.heads(layer, x, "k_proj", self.shape.kv_heads)
        v = self.heads(layer, x, "v_proj", self.shape.kv_heads)
        q = rotary.rotate(q, ops.node_name(layer, "q_rotary"))
        k = rotary.rotate(k, ops.node_name(layer, "k_rotary"))
        keys = updated(self.g, layer, "key", new=k, cache=cache)
        values = updated(self.g, layer, "value", new=v, cache=cache)
        mixed = attend(self.g, layer, self.shape, qkv=(q, keys, values), visible=visible)
        out = self.linear(layer, mixed, "self_attn.o_proj")
        name = ops.node_name(layer, "attention_residual")
        total = self.g.op("Add", [hidden, out], self.g.value(f"{name}.out", self.residual))
        return total, [keys, values]

    def mlp(self, layer: int, hidden: ir.Value) -> ir.Value:
        g = self.g
        wide: Dims = [ops.BATCH, ops.SEQUENCE, self.shape.intermediate]
        x = self.norm(
            layer, hidden, "post_attention_layernorm", ops.linear_input(layer, "gate_proj")
        )
        gate = self.linear(layer, x, "mlp.gate_proj")
        up = self.linear(layer, x, "mlp.up_proj")
        # Sigmoid and Mul, not Swish: every op level has them.
        opened = g.op("Sigmoid", [gate], g.value(f"layers.{layer}.sigmoid.out", wide))
        silu = g.op("Mul", [gate, opened], g.value(f"layers.{layer}.silu.out", wide))
        product = g.op(
            "Mul",
            [silu, up],
            g.value(ops.linear_input(layer, "down_proj"), wide),
            name=ops.node_name(layer, "gated"),
        )
        down = self.linear(layer, product, "mlp.down_proj")
        name = ops.node_name(layer, "mlp_residual")
        return g.op(
            "Add", [hidden, down], g.value(ops.hidden_value(layer), self.residual), name=name
        )

    def logits(self, hidden: ir.Value) -> ir.Value:
        g, shape = self.g, self.shape
        rows: int | str = ops.SEQUENCE
        if self.form.logits == "last":
            rows = 1
            last = g.numbers("last.index", [-1])
            out = g.value("last.out", [ops.BATCH, 1, shape.hidden])
            hidden = g.op("Gather", [hidden, last], out, axis=1)
        normed = self.rms_norm(
            hidden,
            f"{self.family.final_norm}.weight",
            g.value("norm.out", [ops.BATCH, rows, shape.hidden]),
        )
        dims: Dims = [ops.BATCH, rows, shape.vocab]
        direct = g.dtype == FLOAT
        scores = g.value(ops.LOGITS if direct else "lm_head.out", dims)
        self.multiply(normed, LM_HEAD, self.family.head, scores)
        if direct:
            return scores
        return g.op("Cast", [scores], g.value(ops.LOGITS, dims, dtype=FLOAT), to=FLOAT)

    def norm(self, layer: int, x: ir.Value, role: str, out: str) -> ir.Value:
        module = f"{self.family.blocks}.{layer}.{role}.weight"
        name = ops.node_name(layer, role)
        return self.rms_norm(x, module, self.g.value(out, self.residual), name=name)

    def rms_norm(self, x: ir.Value, tensor: str, out: ir.Value, *, name: str = "norm") -> ir.Value:
        weight = self.plain(f"{name}.weight", tensor, (self.shape.hidden,))
        epsilon = self.shape.norm_eps
        if not self.g.has(NORM):
            return spelled_norm(self.g, x, weight, out, name=name, epsilon=epsilon)
        return self.g.op(NORM, [x, weight], out, name=name, axis=-1, epsilon=epsilon, stash_type=1)

    def heads(self, layer: int, x: ir.Value, role: str, count: int) -> ir.Value:
        g, width = self.g, self.shape.head_dim
        flat = self.linear(layer, x, f"self_attn.{role}")
        name = ops.node_name(layer, f"{role[0]}_heads")
        by_token = g.op(
            "Reshape",
            [flat, g.numbers(f"heads.{count}", [0, 0, count, width])],
            g.value(f"{name}.by_token.out", [ops.BATCH, ops.SEQUENCE, count, width]),
        )
        dims: Dims = [ops.BATCH, count, ops.SEQUENCE, width]
        return g.op("Transpose", [by_token], g.value(f"{name}.out", dims), perm=[0, 2, 1, 3])

    def linear(self, layer: int, x: ir.Value, path: str) -> ir.Value:
        role = path.rpartition(".")[2]
        module = self.family.linear_path(layer, path)
        name = ops.node_name(layer, role)
        out = ops.linear_output(layer, role)
        bias = self.biased(role)
        rows = self.g.value(f"{name}.rows" if bias else out, [*self.residual[:2], self.width(role)])
        self.multiply(x, name, module, rows)
        if not bias:
            return rows
        vector = self.plain(f"{name}.bias", f"{module}.bias", (self.width(role),))
        return self.g.op(
            "Add", [rows, vector], self.g.value(out, dims_of(rows)), name=f"{name}.add_bias"
        )

    def biased(self, role: str) -> bool:
        if role in {"q_proj", "k_proj", "v_proj"}:
            return self.shape.qkv_bias
        return role == "o_proj" and self.shape.o_bias

    def width(self, role: str) -> int:
        shape = self.shape
        return {
            "q_proj": shape.heads * shape.head_dim,
            "k_proj": shape.kv_heads * shape.head_dim,
            "v_proj": shape.kv_heads * shape.head_dim,
            "gate_proj": shape.intermediate,
            "up_proj": shape.intermediate,
        }.get(role, shape.hidden)

    def multiply(self, x: ir.Value, name: str, module: str, out: ir.Value) -> None:
        """By codes where the checkpoint has them, else by floats; a bias is the caller's."""
        if module in self.checkpoint.records:
            source = weights.PackedSource.of(self.checkpoint, module)
            self.g.append(packed_node(self.g.constant, x, name=name, source=source, out=out))
        else:
            self.matmul(x, name, module, out)

    def matmul(self, x: ir.Value, name: str, module: str, out: ir.Value) -> None:
        dims = (columns_of(x), columns_of(out))
        read = weights.tensor_reader(self.checkpoint, f"{module}.weight")
        weight = weights.transposed_tensor(f"{name}.weight", read, shape=dims, dtype=self.g.dtype)
        result = self.g.op("MatMul", [x, self.g.constant(weight)], out, name=name)
        producer = result.producer()
        assert producer is not None
        producer.metadata_props[ops.SOURCE] = module

    def plain(self, name: str, tensor: str, shape: tuple[int, ...]) -> ir.Value:
        read = weights.tensor_reader(self.checkpoint, tensor)
        return self.g.constant(weights.plain_tensor(name, read, shape=shape, dtype=self.g.dtype))
