"""A double of TensorRT and of the CUDA driver that records every call: no GPU of this project has TensorRT.

It stands in for what cannot exist here and for nothing else. Its names and arguments are those of the documented API; a
test holds the names to the real lean bindings. "Device" memory is host memory, and the one engine it knows is a decoder
that sums what is in its cache, so that a wrong slot, mask, alias or sequence gives a wrong sum.
"""

# ruff: noqa: N802 (the driver's names)
import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np

from mbq_export.backends import _trt_session
from mbq_export.backends._trt_cuda import Cuda
from mbq_export.backends._trt_kept import KeptDecoder
from mbq_export.tensor_file import BFLOAT16

HANGING_S = 600
"""As good as for ever: tests end long before."""
HIDDEN, SLOTS, CHUNK, VOCABULARY = 4, 16, 3, 2
CACHE = (1, 1, SLOTS, HIDDEN)

INPUTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "inputs_embeds": (np.float16, (-1, -1, HIDDEN)),
    "attention_mask": (np.int64, (-1, SLOTS)),
    "position_ids": (np.int64, (-1, -1)),
    "write_indices": (np.int64, (-1,)),
    "past_key_values.0.key": (np.float16, (-1, *CACHE[1:])),
}
OUTPUTS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "logits": (np.float16, (-1, 1, VOCABULARY)),
    "present.0.key": (np.float16, (-1, *CACHE[1:])),
}
LARGEST = {
    "inputs_embeds": (1, CHUNK, HIDDEN),
    "attention_mask": (1, SLOTS),
    "position_ids": (1, CHUNK),
    "write_indices": (1,),
    "past_key_values.0.key": CACHE,
    "logits": (1, 1, VOCABULARY),
    "present.0.key": CACHE,
}


def add_up(at: Callable[[str], np.ndarray]) -> None:
    """Write the embeddings into the cache; the logits are the sum of all that the mask shows, and the position."""
    embeds, mask = at("inputs_embeds"), at("attention_mask")
    past, present = at("past_key_values.0.key"), at("present.0.key")
    start = int(at("write_indices")[0])
    present[...] = past
    present[0, 0, start : start + embeds.shape[1]] = embeds[0]
    seen = (present[0, 0].astype(np.float32) * mask[0][:, None]).sum()
    at("logits")[...] = [[[seen, at("position_ids")[0, -1]]]]


@dataclass(frozen=True)
class Graph:
    """What an engine of the double computes, and its tensors: type and shape by name, -1 for sizes that vary."""

    inputs: Mapping[str, tuple[Any, tuple[int, ...]]]
    outputs: Mapping[str, tuple[Any, tuple[int, ...]]]
    largest: Mapping[str, tuple[int, ...]]
    compute: Callable[[Callable[[str], np.ndarray]], None]


SUMS = Graph(inputs=INPUTS, outputs=OUTPUTS, largest=LARGEST, compute=add_up)

HEADS = 2
"""Of a cache that grows: two, or the place of a position would not depend on how many there are."""


def append_and_add_up(at: Callable[[str], np.ndarray]) -> None:
    """The same sums over a cache that grows: what comes out lies as its own shape says, at the buffer's beginning."""
    embeds, mask, past = at("inputs_embeds"), at("attention_mask"), at("past_key_values.0.key")
    new = np.repeat(embeds[:, None] / HEADS, HEADS, axis=1).astype(np.float16)
    present = np.concatenate([past, new], axis=2)
    assert mask.shape[1] == present.shape[2]
    at("present.0.key").reshape(-1)[: present.size] = present.reshape(-1)
    seen = (present[0].astype(np.float32) * mask[0][:, None]).sum()
    at("logits")[...] = [[[seen, at("position_ids")[0, -1]]]]


GROWING_SUMS = Graph(
    inputs={
        **{name: INPUTS[name] for name in ("inputs_embeds", "position_ids")},
        "attention_mask": (np.int64, (-1, -1)),
        "past_key_values.0.key": (np.float16, (-1, HEADS, -1, HIDDEN)),
    },
    outputs={
        "logits": OUTPUTS["logits"],
        "present.0.key": (np.float16, (-1, HEADS, -1, HIDDEN)),
    },
    largest={
        **{name: LARGEST[name] for name in ("inputs_embeds", "position_ids", "logits")},
        "attention_mask": (1, SLOTS + CHUNK),
        "past_key_values.0.key": (1, HEADS, SLOTS, HIDDEN),
        "present.0.key": (1, HEADS, SLOTS + CHUNK, HIDDEN),
    },
    compute=append_and_add_up,
)


class TensorIOMode(Enum):
    """As in the bindings."""

    INPUT = 0
    OUTPUT = 1


@dataclass
class RecordedCuda:
    """Functions of the driver over host memory; a recorded graph is a list of calls to make."""

    calls: list[str] = field(default_factory=list)
    memory: dict[int, Any] = field(default_factory=dict)
    fails: dict[str, int] = field(default_factory=dict)
    captured: list[Callable[[], None]] | None = None
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self.fails:
                return self.fails[name]
            act = getattr(type(self), f"_{name}", None)
            if act is not None:
                act(self, *arguments)
            return 0

        return call

    def _cuStreamCreate(self, stream: Any, _flags: int) -> None:
        stream._obj.value = 77

    def _cuMemAlloc_v2(self, address: Any, size: Any) -> None:
        room = ctypes.create_string_buffer(b"\xff" * size.value, size.value)  # NaN until zeroed
        address._obj.value = ctypes.addressof(room)
        self.memory[address._obj.value] = room

    def _cuMemsetD8Async(self, address: Any, value: Any, size: Any, _stream: Any) -> None:
        ctypes.memset(address.value, value.value, size.value)

    def _cuMemcpyHtoDAsync_v2(self, address: Any, data: Any, size: Any, _stream: Any) -> None:
        ctypes.memmove(address.value, data.value, size.value)

    def _cuMemcpyDtoHAsync_v2(self, data: Any, address: Any, size: Any, _stream: Any) -> None:
        ctypes.memmove(data.value, address.value, size.value)

    def _cuStreamBeginCapture_v2(self, _stream: Any, _mode: int) -> None:
        self.captured = []

    def _cuStreamEndCapture(self, _stream: Any, graph: Any) -> None:
        graph._obj.value = 1000 + len(self.graphs)
        self.graphs[graph._obj.value] = self.captured or []
        self.captured = None

    def _cuGraphInstantiateWithFlags(self, ready: Any, graph: Any, _flags: Any) -> None:
        ready._obj.value = graph.value

    def _cuGraphLaunch(self, ready: Any, _stream: Any) -> None:
        for act in self.graphs[ready.value]:
            act()


@dataclass
class Engine:
    """ICudaEngine of a decoder."""

    cuda: RecordedCuda
    aliases: bool = True
    graph: Graph = SUMS

    @property
    def num_io_tensors(self) -> int:
        return len(self.graph.inputs) + len(self.graph.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.graph.inputs, *self.graph.outputs][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.graph.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return {**self.graph.inputs, **self.graph.outputs}[name][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {**self.graph.inputs, **self.graph.outputs}[name][1]

    def get_aliased_input_tensor(self, name: str) -> str:
        cache = name.startswith("present.")
        return name.replace("present.", "past_key_values.") if self.aliases and cache else ""

    def create_execution_context(self) -> "Context":
        return Context(engine=self)


@dataclass
class Context:
    """IExecutionContext of a decoder."""

    engine: Engine
    addresses: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        largest = self.engine.graph.largest[name]
        return all(size <= most for size, most in zip(shape, largest, strict=True))

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        self.engine.cuda.calls.append("execute_async_v3")
        if self.engine.cuda.captured is not None:
            self.engine.cuda.captured.append(self._compute)
        else:
            self._compute()
        return True

    def _compute(self) -> None:
        self.engine.graph.compute(self._at)

    def _at(self, name: str) -> np.ndarray:
        shape = self.shapes.get(name, self.engine.graph.largest[name])
        dtype = np.dtype(self.engine.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        room = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(room, dtype).reshape(shape)


class Logger:
    """ILogger."""

    WARNING = 2

    def __init__(self, severity: int) -> None:
        self.severity = severity


@dataclass
class Runtime:
    """IRuntime: an engine for a file that says ``engine``, None for any other."""

    cuda: RecordedCuda

    def get_plugin_registry(self) -> Any:
        return SimpleNamespace(load_library=lambda _: None, all_creators=[])

    def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
        return Engine(self.cuda) if data == b"engine" else None


def nptype(dtype: Any) -> Any:
    """Types are numpy's own here; of bfloat16 the bindings say this."""
    if dtype == BFLOAT16:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return dtype


def module(cuda: RecordedCuda) -> Any:
    """The module, as the child would have imported it."""
    return SimpleNamespace(
        Logger=Logger,
        Runtime=lambda _logger: Runtime(cuda),
        TensorIOMode=TensorIOMode,
        DataType=SimpleNamespace(BF16=BFLOAT16),
        nptype=nptype,
    )


def decoder(
    cuda: RecordedCuda, *, aliases: bool = True, graph: Graph = SUMS
) -> _trt_session.LoadedEngine:
    """A decoder, bound."""
    engine = Engine(cuda, aliases=aliases, graph=graph)
    loaded = _trt_session.LoadedEngine(
        trt=module(cuda),
        cuda=Cuda(cuda),
        engine=engine,
        context=engine.create_execution_context(),
        largest=graph.largest,
    )
    loaded.bind()
    return loaded


def kept(engine: _trt_session.LoadedEngine) -> KeptDecoder:
    """A decoder engine with its cache."""
    return KeptDecoder(engine=engine, slots=SLOTS, chunk=CHUNK, logits="logits", width=VOCABULARY)


def step(decoder: KeptDecoder, values: Sequence[float], at: int, sequence: int = 1) -> list[float]:
    """Feed tokens whose embeddings are ``values`` in every column; return the logits."""
    embeds = np.repeat(np.array(values, np.float16)[None, :, None], HIDDEN, axis=2)
    positions = np.arange(at, at + len(values), dtype=np.int64)[None]
    feeds = {"inputs_embeds": embeds, "position_ids": positions}
    outputs = decoder.run({**feeds, "sequence": np.array([sequence], np.int64)})
    assert list(outputs) == ["logits"]
    return [float(each) for each in outputs["logits"][0, 0]]


def child(what: str) -> None:
    """Be the child of a session that holds the double; ``what`` may tell it to die, to fail or to hang."""
    cuda = RecordedCuda(fails={"cuMemAlloc_v2": 2} if what == "memory" else {})
    if what == "never-loads":
        _trt_session.load_engine = lambda *_: time.sleep(HANGING_S)  # type: ignore[assignment]
    if what == "never-reads":
        _trt_session.serve = lambda *_: time.sleep(HANGING_S)  # type: ignore[assignment]

    def load(job: Any) -> Any:
        os.write(1, b"printed by a library\n")
        return replace_compute(module(cuda), what) if job else None

    _trt_session.loaded = load
    _trt_session.Cuda = lambda: Cuda(cuda)  # type: ignore[misc,assignment]
    _trt_session.main(["", "job.json"])


def replace_compute(trt: Any, what: str) -> Any:
    """Make the engine's run end the process."""
    if what == "die":
        Context._compute = lambda _: ctypes.string_at(0)  # type: ignore[method-assign,assignment]
    if what == "hang":
        Context._compute = lambda _: time.sleep(HANGING_S)  # type: ignore[method-assign,assignment]
    return trt


if __name__ == "__main__":
    child(sys.argv[1])
