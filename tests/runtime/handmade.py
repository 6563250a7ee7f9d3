"""A model small enough to check by hand: three ONNX graphs, a byte tokenizer, and the same in numpy.

One attention layer with one head over byte tokens. Token 0 ends an answer, token 1 stands for one of the
two feature rows of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mbq_export.backends.ort import open_graph
from mbq_export.families.base import PROMPT, VISION
from mbq_export.families.inputs import ModelInputs
from mbq_export.runtime.request import Engines, Model

HIDDEN, VOCAB, POSITIONS, TILE = 8, 128, 64, 12
END, IMAGE, ROWS_PER_TILE = 0, 1, 2
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Everything the graphs hold."""

    embed: NDArray[np.float32]
    place: NDArray[np.float32]
    query: NDArray[np.float32]
    key: NDArray[np.float32]
    value: NDArray[np.float32]
    head: NDArray[np.float32]
    vision: NDArray[np.float32]


def weights(seed: int = SEED) -> Weights:
    draws = np.random.default_rng(seed)

    def draw(*shape: int) -> NDArray[np.float32]:
        return draws.standard_normal(shape).astype(np.float32)

    return Weights(
        embed=draw(VOCAB, HIDDEN),
        place=draw(POSITIONS, HIDDEN),
        query=draw(HIDDEN, HIDDEN),
        key=draw(HIDDEN, HIDDEN),
        value=draw(HIDDEN, HIDDEN),
        head=draw(HIDDEN, VOCAB),
        vision=draw(TILE, ROWS_PER_TILE * HIDDEN),
    )


def reference_logits(w: Weights, embeds: NDArray[np.float32]) -> NDArray[np.float64]:
    """Logits (T, V) of (T, hidden) embeddings, all at once and without a cache."""
    x = embeds.astype(np.float64) + w.place[: len(embeds)]
    scores = (x @ w.query) @ (x @ w.key).T
    scores[np.triu_indices(len(x), 1)] = -np.inf
    shares = np.exp(scores - scores.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return (x + shares @ (x @ w.value)) @ w.head


def reference_embeds(w: Weights, inputs: ModelInputs) -> NDArray[np.float32]:
    """Embeddings (T, hidden) with the rows of the tiles in place."""
    embeds = w.embed[inputs.input_ids]
    if len(inputs.pixel_values):
        tiles = inputs.pixel_values.reshape(len(inputs.pixel_values), TILE) @ w.vision
        embeds[inputs.input_ids == IMAGE] = tiles.reshape(-1, HIDDEN)
    return embeds


class Bytes:
    """Bytes as tokens: the stand-in for a tokenizer, with characters of up to four tokens."""

    eos_ids = frozenset({END})

    def inputs(
        self, prompt: str, images: Sequence[object] = (), answer: str | None = None
    ) -> ModelInputs:
        text = (prompt + (answer or "")).encode()
        ids = np.array([IMAGE] * ROWS_PER_TILE * len(images) + list(text), np.int64)
        return ModelInputs(
            input_ids=ids,
            pixel_values=np.array(images, np.float32).reshape(-1, 3, 2, 2),
            image_sizes=np.full((len(images), 2), 2, np.int64),
            tiles_per_image=np.ones(len(images), np.int64),
            token_classes=np.where(ids == IMAGE, VISION, PROMPT).astype(np.int8),
        )

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i not in {END, IMAGE}).decode(errors="replace")


def merge(
    embeds: NDArray[np.float32], features: NDArray[np.float32], inputs: ModelInputs
) -> NDArray[np.float32]:
    embeds[inputs.input_ids == IMAGE] = features.reshape(-1, HIDDEN)
    return embeds


def model(
    folder: Path,
    *,
    kv: str = "concat",
    logits: str = "all",
    w: Weights | None = None,
    limit: int = POSITIONS,
) -> Model:
    """Write the graphs and load them."""
    w = w or weights()
    engines = Engines(
        vision=open_graph(_vision(w, folder / "vision.onnx"), threads=1),
        embed=open_graph(_embed(w, folder / "embed.onnx"), threads=1),
        decoder=open_graph(
            decoder(w, folder / f"{kv}_{logits}.onnx", kv=kv, logits=logits), threads=1
        ),
    )
    return Model(engines=engines, preprocessor=Bytes(), merge=merge, limit=limit)


def _own_slots(kv: str) -> list[onnx.NodeProto]:
    """Slot of each new token."""
    if kv == "static":
        return [helper.make_node("Identity", ["position_ids"], ["own_slots"])]
    return [
        helper.make_node("Shape", ["attention_mask"], ["total"], start=1, end=2),
        helper.make_node("Gather", ["position_ids", "minus_one"], ["newest"], axis=1),
        helper.make_node("Sub", ["position_ids", "newest"], ["from_end"]),
        helper.make_node("Add", ["from_end", "total"], ["behind"]),
        helper.make_node("Sub", ["behind", "unit"], ["own_slots"]),
    ]


def decoder(w: Weights, path: Path, *, kv: str, logits: str) -> Path:
    """Write the decoder: visible are keys j <= P + i that the mask lets through.

    Where the cache grows, P is what the mask has more than there are tokens, so positions may begin behind hidden slots.
    """
    slots = "past" if kv == "concat" else POSITIONS
    cache = {"key": "k", "value": "v"}
    inputs = [
        helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, [1, "t", HIDDEN]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, [1, "t"]),
    ]
    nodes = [
        helper.make_node("Gather", ["place", "position_ids"], ["here"]),
        helper.make_node("Add", ["inputs_embeds", "here"], ["x"]),
        helper.make_node("MatMul", ["x", "query"], ["q"]),
    ]
    if kv == "static":
        inputs.append(helper.make_tensor_value_info("write_indices", TensorProto.INT64, [1]))
    for name, short in cache.items():
        shape = [1, 1, slots, HIDDEN]
        inputs.append(helper.make_tensor_value_info(f"past.{name}", TensorProto.FLOAT, shape))
        nodes += [
            helper.make_node("MatMul", ["x", name], [f"{short}_flat"]),
            helper.make_node("Unsqueeze", [f"{short}_flat", "one"], [f"{short}_new"]),
            helper.make_node("Concat", [f"past.{name}", f"{short}_new"], [f"new.{name}"], axis=2)
            if kv == "concat"
            else helper.make_node(
                "TensorScatter",
                [f"past.{name}", f"{short}_new", "write_indices"],
                [f"new.{name}"],
                axis=-2,
            ),
        ]
    nodes += [
        *_own_slots(kv),
        helper.make_node("Unsqueeze", ["own_slots", "two"], ["rows"]),
        helper.make_node("Shape", ["new.key"], ["key_slots"], start=2, end=3),
        helper.make_node("Squeeze", ["key_slots"], ["slots"]),
        helper.make_node("Range", ["zero", "slots", "unit"], ["columns"]),
        helper.make_node("LessOrEqual", ["columns", "rows"], ["causal"]),
        helper.make_node("Cast", ["attention_mask"], ["exists"], to=TensorProto.BOOL),
        helper.make_node("Unsqueeze", ["exists", "one"], ["exists3"]),
        helper.make_node("And", ["causal", "exists3"], ["visible"]),
        helper.make_node("Squeeze", ["new.key", "one"], ["keys"]),
        helper.make_node("Squeeze", ["new.value", "one"], ["values"]),
        helper.make_node("Transpose", ["keys"], ["keys_t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["q", "keys_t"], ["scores"]),
        helper.make_node("Where", ["visible", "scores", "never"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "values"], ["seen"]),
        helper.make_node("Add", ["x", "seen"], ["h"]),
    ]
    if logits == "last":
        nodes.append(helper.make_node("Gather", ["h", "minus_one"], ["h_last"], axis=1))
    nodes.append(
        helper.make_node("MatMul", ["h_last" if logits == "last" else "h", "head"], ["logits"])
    )
    width = 1 if logits == "last" else "t"
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, width, VOCAB])]
    outputs += [
        helper.make_tensor_value_info(
            f"new.{name}", TensorProto.FLOAT, [1, 1, "now" if kv == "concat" else POSITIONS, HIDDEN]
        )
        for name in cache
    ]
    constants = {
        "place": w.place,
        "query": w.query,
        "key": w.key,
        "value": w.value,
        "head": w.head,
        "never": np.float32(-1e30),
        "one": np.array([1]),
        "two": np.array([2]),
        "minus_one": np.array([-1]),
        "zero": np.array(0),
        "unit": np.array(1),
    }
    return _save(path, nodes, inputs, outputs, constants)


def _embed(w: Weights, path: Path) -> Path:
    return _save(
        path,
        [helper.make_node("Gather", ["table", "ids"], ["embeds"])],
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "t"])],
        [helper.make_tensor_value_info("embeds", TensorProto.FLOAT, [1, "t", HIDDEN])],
        {"table": w.embed},
    )


def _vision(w: Weights, path: Path) -> Path:
    return _save(
        path,
        [
            helper.make_node("Reshape", ["tiles", "flat"], ["rows"]),
            helper.make_node("MatMul", ["rows", "weight"], ["wide"]),
            helper.make_node("Reshape", ["wide", "tall"], ["features"]),
        ],
        [helper.make_tensor_value_info("tiles", TensorProto.FLOAT, ["n", 3, 2, 2])],
        [
            helper.make_tensor_value_info(
                "features", TensorProto.FLOAT, ["n", ROWS_PER_TILE, HIDDEN]
            )
        ],
        {
            "flat": np.array([-1, TILE]),
            "tall": np.array([-1, ROWS_PER_TILE, HIDDEN]),
            "weight": w.vision,
        },
    )


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, NDArray[np.generic]],
) -> Path:
    tensors = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, tensors)
    opset = helper.make_opsetid("", 24)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=12), path)
    return path
